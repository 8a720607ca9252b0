"""Layer-by-layer edit of a model: find sinks, fit gates, refine attention blocks."""
