"""Training and evaluation on Ray: driver, workers, failures; on a laptop and on a cluster alike."""
