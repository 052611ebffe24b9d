"""What ranks compute a second time, and the checksums by which they compare it."""
