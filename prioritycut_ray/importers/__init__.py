"""Published weights of other code → a run."""
