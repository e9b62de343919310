"""Shards, and the stream of frame pairs that training draws from them."""
