"""The training loop, one attempt at a run, its guards, validation, and writers."""
