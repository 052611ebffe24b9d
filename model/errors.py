"""The one exception whose text is for the user: shown as a single line, without a traceback."""


class UserError(Exception):
    """Something that the user can mend. The text says what was wrong, what was expected, and what to do."""
