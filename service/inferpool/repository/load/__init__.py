"""Everything that runs a model to find something out before it serves."""
