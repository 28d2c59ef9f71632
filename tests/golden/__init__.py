"""Checkpoints and artifacts that each release wrote, a directory a version, and the test that later ones read them."""
