"""Keeps a run's records: ledger, checkpoints, settings, history."""
