"""Files and folders at any place that fsspec knows."""
