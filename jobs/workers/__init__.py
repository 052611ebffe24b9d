"""A worker's life: rendezvous, signals, hangs, failures."""
