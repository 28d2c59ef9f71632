"""The pruned model for other programs and other people: GGUF, model card, sealing."""
