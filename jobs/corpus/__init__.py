"""Reads the files of a corpus as documents."""
