"""The edit of a model without sinks, layer by layer: sinks found, gates fitted, attention blocks refined."""
