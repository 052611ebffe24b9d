"""Builds, reads and orders the token store."""
