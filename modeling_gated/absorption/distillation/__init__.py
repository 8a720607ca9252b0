"""Distillation of an edited model from the source model."""
