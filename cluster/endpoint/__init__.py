"""The serving endpoint as its clients and operators see it."""
