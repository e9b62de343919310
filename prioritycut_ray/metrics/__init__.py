"""Metrics of how well a clip is rebuilt."""
