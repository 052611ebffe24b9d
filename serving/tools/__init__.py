"""Tools that a model may call: in which format it writes a call, and calls read from its text."""
