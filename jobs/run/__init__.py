"""A run's records: ledger, checkpoints, settings, history."""
