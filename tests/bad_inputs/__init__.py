"""Wrong inputs of every stage, as a user can make them, and what the stages say: `python -m tests.bad_inputs`."""
