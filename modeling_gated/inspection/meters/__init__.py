"""Meters of attention, activations and gates."""
