"""How well a clip was rebuilt."""
