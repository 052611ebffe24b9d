"""Gives all choices of a prompt its log-probabilities, which the engine computes for the first of
them alone."""

from collections.abc import Sequence

from serving.engine.messages import Candidates, SequenceRequest, TokenEvent


class SharedPrompts:
    """Takes the events of one request's sequences. A prompt's log-probabilities come with the first
    event of its first choice. Another choice finds the prompt in the cache and may be faster, so
    its events wait for that one."""

    def __init__(self, sequences: Sequence[SequenceRequest], *, num_choices: int) -> None:
        """The sequences are the choices of the first prompt, then those of the next one and so
        on."""
        self._reader: dict[int, int] = {}  # by sequence, the one that reads its prompt
        for place, sequence in enumerate(sequences):
            first = sequences[place - place % num_choices]
            if first.num_prompt_logprobs is not None:
                self._reader[sequence.seq_id] = first.seq_id
        self._scores: dict[int, list[Candidates | None]] = {}  # by reader
        self._waiting: dict[int, list[TokenEvent]] = {}  # by reader

    def take(self, event: TokenEvent) -> list[TokenEvent]:
        """Returns the events that can be answered now, each with the log-probabilities of its
        prompt."""
        reader = self._reader.get(event.seq_id)
        if reader is None:
            return [event]
        if reader in self._scores:
            return [event._replace(prompt_logprobs=self._scores[reader])]
        if event.seq_id != reader:
            self._waiting.setdefault(reader, []).append(event)
            return []
        scores = self._scores[reader] = event.prompt_logprobs or []
        others = self._waiting.pop(reader, [])
        return [event, *[other._replace(prompt_logprobs=scores) for other in others]]
