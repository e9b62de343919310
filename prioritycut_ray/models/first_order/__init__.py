"""The first-order motion model (method §1)."""
