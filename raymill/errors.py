"""The errors of this package. The text of `UserError` is for the user: shown as a single line,
without a traceback."""


class UserError(Exception):
    """The user can fix this. The text says what was wrong, what was expected, and what to do."""

    def __str__(self) -> str:
        # A file's name may hold line ends, terminal control sequences, and bytes that are not text.
        return "".join(
            char if char.isprintable() else repr(char)[1:-1] for char in super().__str__()
        )


class CheckpointError(UserError):
    """The folder is not a complete, unaltered checkpoint."""


class LostPeerError(RuntimeError):
    """A message between the workers of a step did not arrive, though none failed."""


class OpenGroupError(RuntimeError):
    """A message of several failed to begin, which leaves NCCL's group of them open: this thread can
    send no more."""
