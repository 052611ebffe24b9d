"""Grammars that answers follow: checked, compiled and turned into the tokens that may come next."""
