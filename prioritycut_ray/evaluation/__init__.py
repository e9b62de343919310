"""Video reconstruction on held-out clips: scores with intervals, and the report of them."""
