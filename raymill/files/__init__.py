"""Files of named tensors: written whole, hashed, and read at any place."""
