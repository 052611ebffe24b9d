"""Lets versions of one shape share an engine that has room for the weights of one: they compute in
turns.

Each sequence names its weights. While those of another version compute, it waits. A turn ends once
it has lasted a while: nothing new starts, the sequences that run finish with the weights that they
began with, and the weights of the sequence that has waited longest replace them in place. The
weights that leave remain on disk.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from model.files.checkpoint_folder import StoredModel
from raymill.errors import UserError
from serving.engine.messages import Admission, FinishReason, SequenceRequest, StepReport, TokenEvent

if TYPE_CHECKING:
    from serving.engine.vllm_engine import VllmEngine  # usually in another environment

MIN_TURN_S = 2.0  # while sequences of another version wait
REPLACEMENTS_PER_TURN = 8.0  # a turn lasts as many times as long as replacing the weights took

_log = logging.getLogger(__name__)

Stamp = tuple[str, int, int, int]  # a file's name, inode, size and time of change


class WeightTurns:
    """The engine's interface, for sequences of several versions. Weights 0 are the ones that it was
    started with."""

    def __init__(
        self, engine: "VllmEngine", checkpoint: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._checkpoints: dict[int, tuple[Path, list[Stamp]]] = {}
        self._adapters: set[int] = set()
        self.add_weights(0, checkpoint)
        self._current = 0
        self._used = {0}
        self._turn_ends_s = -math.inf
        self._waiting: dict[int, SequenceRequest] = {}  # by sequence, the oldest first
        self._announced: set[int] = set()
        self._num_running = 0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work or bool(self._waiting)

    def add_weights(self, weights: int, checkpoint: Path) -> None:
        """Gives the number `weights` to a checkpoint, whose files must stay as they are. An adapter
        takes no turns: the engine computes it beside its base, with which it was started and which
        nothing then replaces."""
        if StoredModel(checkpoint).is_adapter:
            self._adapters.add(weights)
            self._engine.add_adapter(weights, checkpoint)
        else:
            self._checkpoints[weights] = checkpoint, _stamps(checkpoint)

    def submit(self, request: SequenceRequest) -> None:
        is_now = request.weights == self._current and not self._is_over
        if is_now or request.weights in self._adapters:
            self._engine.submit(request)
        else:
            self._waiting[request.seq_id] = request

    def cancel(self, seq_id: int) -> None:
        if self._waiting.pop(seq_id, None) is None:
            self._engine.cancel(seq_id)

    def step(self, on_admission: Callable[[Admission], None] | None = None) -> StepReport:
        """Runs a step of the engine, or replaces the weights."""
        if is_over := self._is_over:
            self._waiting |= {request.seq_id: request for request in self._engine.take_back()}
        else:
            self._release()
        self._announce(on_admission)
        if is_over and not self._engine.has_work:
            return self._begin_turn()
        report = self._engine.step(on_admission)
        self._num_running = report.num_running
        return report._replace(num_waiting=report.num_waiting + len(self._waiting))

    @property
    def _is_over(self) -> bool:
        """Whether sequences of another version wait, and the turn has lasted long enough or has
        nothing to do."""
        others_wait = any(request.weights != self._current for request in self._waiting.values())
        return others_wait and (self._clock() >= self._turn_ends_s or not self._engine.has_work)

    def _release(self) -> None:
        for request in [
            waiting for waiting in self._waiting.values() if waiting.weights == self._current
        ]:
            del self._waiting[request.seq_id]
            self._engine.submit(request)

    def _announce(self, on_admission: Callable[[Admission], None] | None) -> None:
        """Reports those that wait as begun: nobody is refused for having waited for a version's
        turn."""
        fresh = sorted(self._waiting.keys() - self._announced)
        self._announced = set(self._waiting)
        if fresh and on_admission is not None:
            on_admission(Admission(fresh, self._num_running, len(self._waiting)))

    def _begin_turn(self) -> StepReport:
        """Replaces the weights. Its report, before any step with them, keeps this time out of what
        reading a prompt is taken to cost. New weights that do not fit end their own sequences; any
        other failure ends this process."""
        began_s = self._clock()
        weights = next(
            request.weights
            for request in self._waiting.values()
            if request.weights != self._current
        )
        checkpoint, stamps = self._checkpoints[weights]
        events: list[TokenEvent] = []
        try:
            if _stamps(checkpoint) != stamps:
                raise UserError(f"{checkpoint} has been written to since it was verified")
            self._engine.replace_weights(checkpoint)
        except UserError as error:
            if weights in self._used:
                raise
            _log.error("the weights cannot be replaced: %s", error)
            refused = [
                request.seq_id for request in self._waiting.values() if request.weights == weights
            ]
            events = [
                TokenEvent(seq_id, None, FinishReason.ERROR, None, None) for seq_id in refused
            ]
            for seq_id in refused:
                del self._waiting[seq_id]
        else:
            self._current = weights
            self._used.add(weights)
            took_s = self._clock() - began_s
            self._turn_ends_s = self._clock() + max(MIN_TURN_S, REPLACEMENTS_PER_TURN * took_s)
            _log.warning("the weights of %s are in use, after %.2f s", checkpoint, took_s)
        self._release()
        self._num_running = 0
        return StepReport(
            events,
            num_running=0,
            num_waiting=len(self._waiting),
            kv_cache_usage=0.0,
            num_prompt_tokens=0,
        )


def _stamps(checkpoint: Path) -> list[Stamp]:
    files = [(file.name, file.stat()) for file in sorted(checkpoint.glob("*.safetensors"))]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in files]
