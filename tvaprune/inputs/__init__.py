"""What goes in: the model, the texts, the tasks, and the windows that are sampled from them."""
