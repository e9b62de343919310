"""The training loop and its steps, in torch alone."""
