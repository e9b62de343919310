"""Training on Ray Train: driver, workers, failures; the same run on a laptop and on a cluster."""
