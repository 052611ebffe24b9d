"""Finds workers that compute wrong, and decides what becomes of them and of what they computed."""
