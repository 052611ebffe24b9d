"""How many seeds of a fault a test draws: a few, or as many as `make test-chaos` asks for.

A seed draws a fault's moment and victim. `RAYMILL_TEST_SEEDS=20` sets their number for all tests
that draw them.
"""

import os


def fault_seeds(usual: int) -> range:
    return range(int(os.environ.get("RAYMILL_TEST_SEEDS", usual)))
