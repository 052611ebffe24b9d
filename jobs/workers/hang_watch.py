"""Publishes where a worker stands, at the launcher's meeting place; on rank 0 it looks where all
stand, and judges.

Each worker sets its own key at each look. Rank 0 reads the others' only while it stands still
itself, and its verdict is one key, which each worker reads when its round is over: so a look costs
as much for any number of workers.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from jobs.workers.hang_verdict import Standing, verdict
from jobs.workers.watchdog import Beat, Hang, Place, Waits
from raymill.workers.worker_group import Meeting

_VERDICT = "hang"
_LONGEST_LOOK_S = 2.0  # a worker that was stopped meanwhile has not stood still by itself
_FRESH_S = 5.0


class HangWatch:
    """One worker's looks in one round."""

    def __init__(
        self,
        store: dist.Store,
        meeting: Meeting,
        *,
        rank: int,
        world_size: int,
        beat: Callable[[], Beat],
        hang_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._store, self._meeting, self._rank, self._world_size = store, meeting, rank, world_size
        self._beat, self._hang_timeout_s = beat, hang_timeout_s
        self._stood_s, self._last_look_s = 0.0, clock()
        self._num_looks = 0
        self._position: tuple[Place, int] | None = None
        # Each worker's last standing, and when rank 0 first read it
        self._known = [b"null"] * world_size
        self._known_since = [0.0] * world_size

    @staticmethod
    def enter(store: dist.Store, rank: int) -> None:
        """Makes the keys that later looks read; a worker calls it before it meets the others."""
        store.compare_set(_VERDICT, "", "null")
        store.set(f"standing/{rank}", "null")

    def look(self) -> Hang | None:
        """Publishes where this worker stands. Returns rank 0's verdict once the workers hang, after
        storing it."""
        standing = self._standing()
        self._num_looks += 1
        self._store.set(
            f"standing/{self._rank}", json.dumps(asdict(standing) | {"look": self._num_looks})
        )
        if self._rank or standing.stood_s < self._hang_timeout_s:
            return None
        hang = self._judged()
        if hang is not None:
            self._store.set(_VERDICT, json.dumps(asdict(hang)))
        return hang

    def verdict(self) -> Hang | None:
        """Returns the verdict that ended the round, None if something else did."""
        hang = self._last_verdict()
        return hang if hang is not None and hang.round == self._meeting.number else None

    def _last_verdict(self) -> Hang | None:
        values = json.loads(self._store.get(_VERDICT))
        return Hang.from_json(values) if values else None

    def _standing(self) -> Standing:
        beat, now_s = self._beat(), self._clock()
        is_waiting = Waits.WORKERS in beat.waits_for
        is_excused = Waits.STORAGE in beat.waits_for or (
            beat.place is Place.AROUND and not is_waiting
        )
        position = (beat.place, beat.num_moves)
        self._stood_s += min(now_s - self._last_look_s, _LONGEST_LOOK_S)
        if is_excused or position != self._position:
            self._stood_s = 0.0
        self._position, self._last_look_s = position, now_s
        progress = self._meeting.progress
        return Standing(
            round=self._meeting.number,
            place=beat.place,
            step=progress.step,
            stood_s=self._stood_s,
            usual_step_s=beat.usual_step_s,
            is_waiting=is_waiting,
            messages=progress.messages(),
        )

    def _judged(self) -> Hang | None:
        """Judges if all workers still publish. One that does not is silent, and its own watchdog
        sees to it."""
        published = self._store.multi_get([f"standing/{rank}" for rank in range(self._world_size)])
        now_s, standings = self._clock(), list[Standing]()
        for rank, content in enumerate(published):
            if content != self._known[rank]:
                self._known[rank], self._known_since[rank] = content, now_s
            values = json.loads(content)
            if (
                not values
                or values["round"] != self._meeting.number
                or now_s - self._known_since[rank] > _FRESH_S
            ):
                return None
            del values["look"]
            standings.append(Standing(**values | {"place": Place(values["place"])}))
        return verdict(standings, hang_timeout_s=self._hang_timeout_s, last=self._last_verdict())
