"""Videos → WebDataset shards."""
