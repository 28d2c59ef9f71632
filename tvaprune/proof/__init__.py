"""Checks that the pruned model computes what the masked model computes, and the certificate that records them."""
