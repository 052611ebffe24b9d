"""The decoder's operations for training on a CPU, with hand-written gradients, and the memory that
they are lent."""
