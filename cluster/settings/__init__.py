"""The typed settings, their flags, and the code folders that they run."""
