"""The engine as a process beside its replica."""
