"""What only training needs of the model: the learning rate, and memory for long-lived buffers."""
