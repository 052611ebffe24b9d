"""Checkpoints and what else is stored of a model: written whole or not at all, read, proven."""
