"""Compares what is stored of a run with what its ledger recorded, and with what was signed."""
