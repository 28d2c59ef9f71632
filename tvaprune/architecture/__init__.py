"""What a decoder with grouped-query attention looks like: its sizes, its modules and tensors, its parameter counts."""
