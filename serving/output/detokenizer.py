"""Turns tokens into text as they arrive: holds back what may still change, and ends the text before
a stop string."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Takes the bytes of tokens. The texts that it returns, joined, are the whole output decoded at
    once (errors replaced), cut before the stop string that is complete first, however the bytes are
    split into tokens. Stop strings that are complete within the first `min_tokens` do not count."""

    def __init__(self, *, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stop = stop
        self._min_tokens = min_tokens  # still to come
        self._num_uncut = 0  # held characters of those tokens
        self._undecoded = b""  # the start of a character
        self._held = ""
        self.num_released_chars = 0
        self.stopped = False

    @property
    def num_chars(self) -> int:
        """The number of characters so far, including held ones: where the text of the next token
        starts."""
        return self.num_released_chars + len(self._held)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is held, so that whole characters, without stop strings, are final as
        they come."""
        return not (self._undecoded or self._held)

    def push(self, token: bytes) -> str:
        """Returns the text that this token makes final. Not to be called after `stopped`."""
        self._decode(token)
        if self._min_tokens > 0:
            self._min_tokens -= 1
            self._num_uncut = len(self._held)
        return self._release(final=False)

    def finish(self) -> str:
        """Returns the rest of the text after the last token."""
        if self.stopped:
            return ""
        self._decode(b"", final=True)
        return self._release(final=True)

    def _decode(self, token: bytes, *, final: bool = False) -> None:
        content = self._undecoded + token
        text, num_bytes = codecs.utf_8_decode(content, "replace", final)
        self._undecoded = content[num_bytes:]
        self._held += text

    def _release(self, *, final: bool) -> str:
        num_final = self._num_final(final=final) if self._stop else len(self._held)
        text, self._held = self._held[:num_final], "" if self.stopped else self._held[num_final:]
        self.num_released_chars += len(text)
        self._num_uncut = max(0, self._num_uncut - len(text))
        return text

    def _num_final(self, *, final: bool) -> int:
        """Returns how many of the held characters no stop string can take back any more."""
        num_final = _first_complete(self._held, self._stop, after=self._num_uncut)
        self.stopped = num_final is not None
        if num_final is not None:
            return num_final
        return len(self._held) - (0 if final else _longest_start_of_stop(self._held, self._stop))


def _first_complete(text: str, stop: Sequence[str], *, after: int) -> int | None:
    """Returns where the stop string starts that ends first beyond `after` characters of `text`; of
    several that end there, the longest."""
    matches = [
        (start + len(s), start)
        for s in stop
        if (start := text.find(s, max(0, after + 1 - len(s)))) >= 0
    ]
    return min(matches)[1] if matches else None


def _longest_start_of_stop(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of `text` with which a stop string starts."""
    longest = max((len(s) for s in stop), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next(
        (length for length in lengths if any(s.startswith(text[-length:]) for s in stop)), 0
    )
