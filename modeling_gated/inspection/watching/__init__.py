"""Meters are shown what a model computes, without changing it."""
