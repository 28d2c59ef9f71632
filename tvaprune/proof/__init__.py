"""That the pruned model computes what the masked model computes: checks, and the certificate that records them."""
