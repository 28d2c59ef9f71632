"""Exports of the pruned model: GGUF, the model card, certification."""
