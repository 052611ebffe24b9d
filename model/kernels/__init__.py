"""The kernels that serve and train on CPUs with the same bits on every processor."""
