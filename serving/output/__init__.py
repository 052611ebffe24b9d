"""What the engine draws, as text, parts of an answer, and JSON."""
