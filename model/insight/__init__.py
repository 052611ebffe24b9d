"""Looks inside a model: the steps of a query, and tasks that show what it does with its context."""
