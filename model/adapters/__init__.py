"""Adapters: weights that are trained beside frozen ones."""
