"""Held-out clips, reconstructed and scored beside "copy the source frame"; reports of it."""
