"""The training loop, an attempt at it, its guards, validation, and writers."""
