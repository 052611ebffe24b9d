"""What processors and GPUs compute at speed, and what GPUs have."""
