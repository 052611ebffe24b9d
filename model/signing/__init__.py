"""Signatures of checkpoints, whose makers and times are checked."""
