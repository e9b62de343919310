"""A trained animator at work: people's pictures and videos in, animations out."""
