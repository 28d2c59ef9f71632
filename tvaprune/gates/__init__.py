"""Gates on three axes over frozen weights: what is trained, and how."""
