"""Looks inside one query, says where its text was learned, and shows both on a page."""
