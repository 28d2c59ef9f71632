"""Published pruning methods, on the same axes and budget as the gates."""
