"""How many prompt tokens a step may read, so that the sequences that wait for its end do not wait long."""

STEP_S = 0.028
"""A step with prompt tokens takes so long. 35 tokens a second are more than anybody reads."""
BACKLOG_S = 0.2
"""If the prompts that wait take longer than this to read, steps are longer too, in the same proportion."""
LONGEST = 2.0  # times STEP_S
LEAST_TOKENS, MOST_TOKENS = 16, 512
WEIGHT = 0.1  # of the latest step in the means
OUTLIER = 2.0  # times a mean: what exceeds it was held up by something else, and counts as no more


class PromptBudget:
    """The prompt tokens that a step may read while running sequences wait for their next tokens.

    Unless their number is fixed, it follows from what tokens have cost: a step takes `STEP_S`, or twice as long as it
    would without them where that is more. So it adapts to the processor, the model and the number of sequences.
    """

    def __init__(self, fixed: int | None, *, first: int) -> None:
        """`first` is the number until a step has been measured."""
        self._fixed = fixed
        self._first = first
        self._token_s: float | None = None  # what a prompt's token adds to a step
        self._decoding_s: float | None = None  # a step without prompt tokens

    def tokens(self, *, num_unread: int) -> int:
        """Returns the number for the next step, before which `num_unread` tokens of prompts wait."""
        if self._fixed is not None:
            return self._fixed
        if not self._token_s:
            return self._first
        stretch = min(max(num_unread * self._token_s / BACKLOG_S, 1.0), LONGEST)
        decoding_s = self._decoding_s or 0.0
        reading_s = max(stretch * STEP_S - decoding_s, decoding_s)
        return min(max(int(reading_s / self._token_s), LEAST_TOKENS), MOST_TOKENS)

    def observe(self, *, num_prompt_tokens: int, num_continued: int, step_s: float) -> None:
        """Records a step that has read so many prompt tokens, and given so many other sequences a token."""
        if num_prompt_tokens == 0:
            self._decoding_s = _mean(self._decoding_s, step_s)
        elif num_prompt_tokens >= LEAST_TOKENS:  # those of fewer are lost in the rest of the step
            decoding_s = (self._decoding_s or 0.0) if num_continued else 0.0
            self._token_s = _mean(self._token_s, max(step_s - decoding_s, 0.0) / num_prompt_tokens)


def _mean(before: float | None, latest: float) -> float:
    if not before:
        return latest
    return before + WEIGHT * (min(latest, OUTLIER * before) - before)
