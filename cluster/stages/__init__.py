"""A stage as a Ray job: it is started and followed, and its log is kept."""
