"""Verify, replay and compare runs by their hashes."""
