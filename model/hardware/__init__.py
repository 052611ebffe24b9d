"""Speeds and types of processors and GPUs, and the memory of GPUs."""
