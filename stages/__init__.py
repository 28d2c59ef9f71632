"""One script a stage, run as `python -m stages.NAME` from the repository root."""
