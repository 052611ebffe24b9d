"""Which documents are kept: quality, duplicates, decontamination."""
