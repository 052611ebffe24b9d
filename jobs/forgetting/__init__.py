"""Trains a run again without some of its documents, from before it learned any of them."""
