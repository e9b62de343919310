"""The networks of the method; they take plain arguments."""
