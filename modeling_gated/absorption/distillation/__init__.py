"""Distillation of an edited model from the original."""
