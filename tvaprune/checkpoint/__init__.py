"""The smaller model: folded weights, compaction, the modeling file, loading, parity."""
