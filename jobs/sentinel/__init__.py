"""Finds workers that compute wrong, and decides the fate of these workers and of their results."""
