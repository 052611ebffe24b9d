"""A Ray cluster of several nodes on this machine, faults for it, and the Jobs API of any Ray cluster."""
