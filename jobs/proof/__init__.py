"""Verify, replay and compare runs by their hashes, and join their steps with documents."""
