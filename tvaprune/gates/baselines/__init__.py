"""Published pruning methods, scored on the same axes, budget and calibration text as the gates."""
