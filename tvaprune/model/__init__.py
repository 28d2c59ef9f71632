"""What a supported model looks like: its axes, its parameter counts, where its weights are cut."""
