"""Ray Train around the trainer: the same run on a laptop and on a cluster."""
