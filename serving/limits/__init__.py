"""Limits of API keys that hold for all replicas together."""
