"""Parts of the model that only training needs: the learning rate, and memory for long-lived buffers."""
