"""Sums whose bits depend on no number of workers: lanes, the tree, buckets, the flat state."""
