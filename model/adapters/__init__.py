"""What is trained beside weights that are frozen."""
