"""Bytes by URI, compare-and-swap, leases, and the registry of published checkpoints."""
