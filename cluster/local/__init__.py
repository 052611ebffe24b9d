"""A Ray cluster of several nodes on this machine, and the Jobs API of any Ray cluster."""
