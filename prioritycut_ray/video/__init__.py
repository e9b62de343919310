"""Read and write videos and pictures; no other package imports a video library."""
