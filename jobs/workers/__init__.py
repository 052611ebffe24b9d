"""Runs the life of a worker: rendezvous, signals, hangs, failures."""
