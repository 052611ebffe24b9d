"""The proof on one machine: the same small training with other numbers of workers, by raymill and by
PyTorch's own ways."""
