"""Getting quality back: LoRA with distillation from the dense model."""
