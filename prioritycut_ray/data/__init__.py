"""Videos, shards, and the stream of frame pairs."""
