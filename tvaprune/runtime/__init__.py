"""How a model runs for inference: packed weights, single tokens, timed passes, text."""
