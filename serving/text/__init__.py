"""Turns conversations and texts into tokens; the programs of strangers in a bounded process."""
