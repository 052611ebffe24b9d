"""Figures of a run: the page, why it is slow, comparisons, probes."""
