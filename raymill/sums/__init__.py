"""Sums of gradients along a fixed tree over lanes: who adds what, and what goes from rank to
rank."""
