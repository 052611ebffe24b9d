"""The engine's tokens as text, as parts of an answer, and as JSON."""
