"""Adapts Ray Train; the only place with its private names."""
