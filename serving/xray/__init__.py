"""A look inside one query, and its page."""
