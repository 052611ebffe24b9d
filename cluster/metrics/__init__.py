"""The metrics that raymill exports: their table, and how a process exports its own."""
