"""The page to talk to a model, and how the files of pages are served."""
