"""The serving endpoint as its clients and its operators see it."""
