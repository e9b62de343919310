"""A trained animator at work: users' pictures and videos in, animations out."""
