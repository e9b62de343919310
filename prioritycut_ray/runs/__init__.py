"""The folder of a run, and what it holds. Imports neither torch nor Ray."""
