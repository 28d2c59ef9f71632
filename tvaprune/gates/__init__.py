"""Which units matter: gates on three axes over frozen weights, and the baselines' scores."""
