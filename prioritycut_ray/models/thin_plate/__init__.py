"""The thin-plate spline motion model (method §7)."""
