"""Videos and pictures in and out of files; the only package that imports a video library."""
