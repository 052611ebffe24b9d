"""The token store: built, read, ordered into batches."""
