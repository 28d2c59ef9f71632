"""The smaller model on disk: folded weights, compaction, layouts, the modeling file, loading."""
