"""From a text to the training steps at which its word-for-word spans were learned."""
