"""The outside world: configuration, Ray clusters, storage, the checkpoint registry and the command
line."""
