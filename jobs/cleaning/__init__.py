"""Decides which documents of a corpus are kept, and in which split."""
