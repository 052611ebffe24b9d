"""Looks inside one query, and shows it on a page."""
