"""What `tools.measure_gpu` measures on a GPU, in parts that go on after a kill."""
