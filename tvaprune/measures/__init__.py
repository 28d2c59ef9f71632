"""What came of it: perplexity, zero-shot accuracy, speed."""
