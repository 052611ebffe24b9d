"""Stores a run's checkpoints while training continues: the whole state from rank 0, or each
worker's own part of it."""
