"""A run on spot nodes that come and go as in a trace, before it starts."""
