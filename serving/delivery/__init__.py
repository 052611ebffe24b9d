"""Versions of the model: promotion, rollback, scaling."""
