"""Pack videos into WebDataset shards, and inspect the result."""
