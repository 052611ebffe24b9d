"""The only place with Ray Train's private names."""
