"""The decoders of any shape, and how one is made."""
