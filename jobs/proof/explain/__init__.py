"""Explains a step: which lane, row and document made its loss what it is."""
