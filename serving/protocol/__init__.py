"""Requests, errors, strict JSON, the served model."""
