"""Copies a worker's state into its node's memory after a step, and back from some node's memory
after a failure.

A keeper is a process on each node that owns the memory, and outlives the workers for the launch of
a run (`keepers`). Where every rank holds the whole state, the ranks of a node divide it among them,
so each node has a copy; of a sharded state each rank writes its own share. Without a keeper, as
outside a Ray job, nothing is kept and training is the same.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.output.progress import say
from jobs.exact.stored_state import MOST_TRIES, damaged_state
from jobs.snapshots.choice import (
    Holding,
    Snapshot,
    choose,
    contradictions,
    interval,
    num_slots,
    reader_of,
    sharded_area,
)
from jobs.snapshots.keepers import CHUNK_BYTES, NoRoom, ask_patiently, fetch, find_keepers, read_s
from jobs.snapshots.slots import Bytes, Checksum, Header, Slots
from raymill.state.host_copies import HostCopy
from raymill.state.span import PackedSpans, Span
from raymill.state.state_shares import StatePiece, StateShares
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup

NUM_SHARES = {"cuda": 8, "cpu": 1}
"""Shares of a state that is not sharded, by the kind of device. The GPUs of a node copy at the same
time; the number does not follow theirs, so that the next attempt finds the same memory. A CPU's
ranks compete for its memory anyway."""

# Snapshots after which all ranks agree on their interval
_FIRST_AGREEMENT, _AGREEMENT_EVERY = 4, 64
_RETRY_S = 1.0
_FP32_BYTES = 4


@dataclass(frozen=True)
class Share:
    """The part of the state in one area of a node's memory. An area has slots, which are written in
    turn."""

    area: str
    rank: int  # its number among the shares
    count: int  # of shares
    tensors: Mapping[str, Sequence[Tensor]]  # views of the state by name

    @property
    def views(self) -> list[Tensor]:
        return list(itertools.chain.from_iterable(self.tensors.values()))

    @property
    def num_bytes(self) -> int:
        return sum(view.nbytes for view in self.views)


class Snapshots:
    """The snapshots of one worker in one attempt, with the keepers of its launch, if that has
    any."""

    def __init__(self, launch: str | None, group: WorkerGroup) -> None:
        self._launch, self._group = launch, group
        self._node = ray.get_runtime_context().get_node_id() if self._launch else ""
        self._node_of_rank: list[str] = group.gather(self._node) if self._launch else []
        self._memory: dict[str, tuple[str, Slots]] = {}  # path and mapping by area
        self._why_none = self._known_reason = ""  # of this worker; of any at the last agreement
        self._retry_at = 0.0
        self._interval, self._num_written, self._last_written = 1, 0, 0
        self._copies: list[list[HostCopy] | None] = []  # by each snapshot since the last agreement
        self._step_s: list[float] = []
        self._last: tuple[int, float] | None = None
        # The last whole step, due or not
        self._whole: tuple[int, int, dict[str, Any], int] | None = None

    def newest(
        self,
        *,
        explained_step: int,
        at_least: int,
        is_left_out: Callable[[int], bool],
        after_attempt: int,
    ) -> Snapshot | None:
        """Returns the snapshot that `choose` takes of all that the keepers hold; called by rank
        0."""
        if self._launch is None:
            return None
        keepers = find_keepers(self._launch)
        holdings = _holdings(keepers)
        while True:
            snapshot = choose(
                holdings,
                explained_step=explained_step,
                at_least=at_least,
                is_left_out=is_left_out,
                after_attempt=after_attempt,
            )
            if snapshot is None:
                return None
            damaged = _damaged(snapshot, keepers)
            if not damaged:
                return snapshot
            for held in damaged:
                name = f"the snapshot of step {held.header.step} on node {held.node}"
                say(f"{name} is damaged or cannot be read; not used")
            holdings = [held for held in holdings if held not in damaged]

    def contradictions(self, *, after_attempt: int) -> list[Holding]:
        """Returns what the function of this name does of all that the keepers hold; called by rank
        0."""
        if self._launch is None:
            return []
        holdings = _holdings(find_keepers(self._launch))
        return contradictions(holdings, after_attempt=after_attempt)

    def restore(self, snapshot: Snapshot, state: TrainState) -> dict[str, Any]:
        """Loads the state on every rank; returns `carried`. Raises `DamagedStateError` where a rank
        has other bits than the snapshot, also when it is loaded once more."""
        for _ in range(MOST_TRIES):
            self.load(snapshot, state)
            are_right = self._group.gather(_has_arrived(snapshot, state))
            if all(are_right):
                return snapshot.header.carried
        raise damaged_state(are_right, f"the snapshot of step {snapshot.header.step}")

    def load(self, snapshot: Snapshot, state: TrainState) -> None:
        """Loads the state on every rank, a piece at a time."""
        shares = (self._pieces(holders, state) for holders in snapshot.shares)
        pieces = itertools.chain.from_iterable(shares)
        StateShares(state).load(snapshot.header.num_updates, pieces)

    def _pieces(self, holders: list[Holding], state: TrainState) -> Iterator[StatePiece]:
        """Yields a share from this node's memory where every node has it; else one rank broadcasts
        it to all."""
        header = holders[0].header
        by_node = {held.node: held for held in holders}
        reader = reader_of(by_node, self._node_of_rank)
        spans_of_names: dict[str, PackedSpans] = {}
        names: list[str] = []
        in_tensor: list[range] = []  # bytes of one tensor
        in_share: list[range] = []  # the same bytes of the share, whose tensors lie end to end
        first = 0
        for name in header.names:
            spans = StateShares(state).spans(name, header.rank, world_size=header.world_size)
            spans_of_names[name] = spans
            tensor_bytes = _FP32_BYTES * spans.num_values
            for start in range(0, tensor_bytes, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, tensor_bytes)
                names.append(name)
                in_tensor.append(range(start, stop))
                in_share.append(range(first + start, first + stop))
            first += tensor_bytes
        assert first == header.num_bytes, f"{header.num_bytes} bytes, expected {first}"
        chunks: Iterable[Bytes | None] = itertools.repeat(None)
        if reader in (None, self._group.rank):
            chunks = self._read(by_node.get(self._node, holders[0]), in_share)
        for name, span, chunk in zip(names, in_tensor, chunks, strict=False):
            place = Span(span.start // _FP32_BYTES, span.stop // _FP32_BYTES)
            values = torch.empty(0) if chunk is None else torch.from_numpy(chunk.view(np.float32))
            if reader is not None and self._group.world_size > 1:
                if chunk is None:
                    values = torch.empty(len(place), device=state.device)
                values = values.to(state.device)
                dist.broadcast(values, reader)
            yield StatePiece(name, spans_of_names[name].cut(place), values)

    def _read(self, held: Holding, spans: list[range]) -> Iterable[Bytes]:
        """Returns these bytes of a share, in place where it is in this node's memory."""
        assert self._launch is not None
        keeper = ray.get_actor(held.node, namespace=self._launch)
        if held.node != self._node:
            # Torch warns of what it could not write
            return map(np.copy, fetch(held, keeper, spans))
        slots = Slots.at(str(ray.get(keeper.path.remote(held.area))), num_slots(held.area))
        assert slots.holds(held.header, held.slot), "nobody writes during a restore"
        return (slots.data(held.slot)[span.start : span.stop] for span in spans)

    def after_step(
        self,
        step: int,
        state: TrainState,
        *,
        attempt: int,
        carried: dict[str, Any],
        is_due: bool = False,
    ) -> str | None:
        """Begins a snapshot if `is_due` or the interval is over; every rank calls this alike after
        every step, once the ledger has the step.

        Returns why some node keeps none, when that has just begun; an empty string when it is just
        over; else None.
        """
        if self._launch is None:
            return None
        self._whole = (step, attempt, carried, state.num_updates)
        if self._last is not None and step == self._last[0] + 1:
            self._step_s.append(time.perf_counter() - self._last[1])
        news = None
        if is_due or step >= self._last_written + self._interval:
            self._copies.append(self._write(step, state, attempt=attempt, carried=carried))
            self._last_written = step
            self._num_written += 1
            agree_every = _FIRST_AGREEMENT if self._known_reason else _AGREEMENT_EVERY
            if self._num_written in (1, _FIRST_AGREEMENT) or self._num_written % agree_every == 0:
                news = self._agree(attempt)
        self._last = (step, time.perf_counter())
        return news

    def rescue(self, state: TrainState) -> None:
        """Completes the snapshot of the last whole step, due or not, after another worker was lost:
        this one may hold the only newer state, and writes the shares of its node's other workers if
        they do not.

        Where one group alone holds a sharded state, that is left alone: the lost share has no newer
        form than its own last snapshot.
        """
        state.copies.wait()
        if self._whole is None or state.sharding.is_sole_copy:
            return
        step, attempt, carried, num_updates = self._whole
        if num_updates == state.num_updates:  # no step without a line has updated it
            self._retry_at = 0.0
            self._write(step, state, attempt=attempt, carried=carried, is_rescue=True)
            state.copies.wait()

    def _write(
        self,
        step: int,
        state: TrainState,
        *,
        attempt: int,
        carried: dict[str, Any],
        is_rescue: bool = False,
    ) -> list[HostCopy] | None:
        """Begins the copies of this worker's shares. Returns None where its node has no room for
        them."""
        shares = self._shares(state, is_rescue=is_rescue)
        if not self._opened(shares, attempt):
            return None
        copies = []
        for share in shares:
            header = Header(
                attempt=attempt,
                step=step,
                rank=share.rank,
                world_size=share.count,
                num_updates=state.num_updates,
                names=list(share.tensors),
                carried=carried,
            )
            _, slots = self._memory[share.area]
            write = partial(_write_pieces, slots, header)
            copies.append(state.copies.start("snapshot", share.views, write))
        return copies

    def _shares(self, state: TrainState, *, is_rescue: bool) -> list[Share]:
        """Returns what this worker writes; in a rescue also what the other workers of its node
        would."""
        if not state.sharding.is_whole:
            rank, count = state.sharding.place, state.sharding.num_holders
            area = sharded_area(self._group.rank, count, self._node_of_rank)
            return [Share(area, rank, count, StateShares(state).own_views())]
        neighbors = [rank for rank, node in enumerate(self._node_of_rank) if node == self._node]
        num_turns, count = len(neighbors), NUM_SHARES[state.device.type]
        own_turn = neighbors.index(self._group.rank)
        shares = []
        for turn in range(num_turns if is_rescue else 1):
            for rank in range((own_turn + turn) % num_turns, count, num_turns):
                tensors = StateShares(state).views(rank, world_size=count)
                shares.append(Share(f"share-{rank}-of-{count}", rank, count, tensors))
        return shares

    def _opened(self, shares: Sequence[Share], attempt: int) -> bool:
        """Maps this worker's memory on its node. Returns False while the node has no living keeper
        with room."""
        for area, (path, slots) in list(self._memory.items()):
            if not slots.is_at(path):
                del self._memory[area]
        missing = [share for share in shares if share.area not in self._memory]
        if missing and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + _RETRY_S
            self._map(missing, attempt)
        return all(share.area in self._memory for share in shares)

    def _map(self, shares: Sequence[Share], attempt: int) -> None:
        """Asks this node's keeper for the areas of shares, and maps those that it has room for."""
        self._why_none = f"node {self._node} has no keeper that answers"
        keeper = find_keepers(str(self._launch)).get(self._node)
        if keeper is None:
            return
        questions = {}
        for share in shares:
            questions[share.area] = keeper.open.remote(share.area, share.num_bytes, attempt)
        answers = ask_patiently(questions, dict.fromkeys(questions, self._node))
        refusals = [answer.reason for answer in answers.values() if isinstance(answer, NoRoom)]
        if refusals:
            self._why_none = refusals[0]
        for area, answer in answers.items():
            if not isinstance(answer, NoRoom):
                self._memory[area] = answer, Slots.at(answer, num_slots(area))

    def _agree(self, attempt: int) -> str | None:
        """Agrees on one interval for all ranks, because the shares of a state must be of one step.
        Returns what `after_step` does."""
        written = [copies for copies in self._copies if copies is not None]
        costs_s = []
        for copies in written[:-1]:  # the last may be in flight
            costs_s.append(sum(copy.exposed_s for copy in copies))
        cost_s = min(costs_s, default=0.0)
        step_s = median(self._step_s) if self._step_s else float("inf")
        wrote_all = len(written) == len(self._copies) > 1
        reason = self._why_none if self._copies[-1] is None else ""
        answers = self._group.gather((cost_s, step_s, wrote_all, reason))
        copy_s, steps_s, wrote, reasons = zip(*answers, strict=True)
        self._interval = interval(copy_s=max(copy_s), step_s=min(steps_s))
        self._copies.clear()
        self._step_s.clear()
        if self._group.rank == 0 and all(wrote):
            for keeper in find_keepers(str(self._launch)).values():
                keeper.close_older.remote(attempt)
        before, self._known_reason = self._known_reason, max(reasons)
        return self._known_reason if bool(self._known_reason) != bool(before) else None


def _holdings(keepers: Mapping[str, Any]) -> list[Holding]:
    questions = {node: keeper.holdings.remote() for node, keeper in keepers.items()}
    answers = ask_patiently(questions, {node: node for node in questions})
    return list(itertools.chain.from_iterable(answers.values()))


def _damaged(snapshot: Snapshot, keepers: Mapping[str, Any]) -> list[Holding]:
    """Returns the holdings of a snapshot whose data are not whole, or whose keepers do not answer.

    Only what is chosen is read: both slots of 1.3B parameters take a keeper 4 to 8 s.
    """
    chosen = list(itertools.chain.from_iterable(snapshot.shares))
    nodes = dict(enumerate(held.node for held in chosen))
    questions = {n: keepers[nodes[n]].is_whole.remote(held) for n, held in enumerate(chosen)}
    num_bytes = sum(held.header.num_bytes for held in chosen)
    are_whole = ask_patiently(questions, nodes, timeout_s=read_s(num_bytes))
    return [held for number, held in enumerate(chosen) if not are_whole.get(number)]


def _has_arrived(snapshot: Snapshot, state: TrainState) -> bool:
    """Reports whether this rank's state has the bits that its keepers' memory has, of the shares
    that it holds whole: a chunk may have been altered on its way. Of a state that is divided
    otherwise than the snapshot no rank holds one."""
    sharding = state.sharding
    own = None if sharding.is_whole else (sharding.place, sharding.num_holders)
    for holders in snapshot.shares:
        header = holders[0].header
        if own in (None, (header.rank, header.world_size)):
            checksum = Checksum()
            share = StateShares(state).views(header.rank, world_size=header.world_size)
            views = [*itertools.chain.from_iterable(share.values())]
            pieces = views if state.device.type == "cpu" else state.copies.pieces(views)
            for piece in pieces:
                checksum.add(piece.numpy().view(np.uint8))
            if checksum.value != header.checksum:
                return False
    return True


def _write_pieces(slots: Slots, header: Header, pieces: Iterator[Tensor]) -> None:
    slots.write(header, (piece.numpy().view(np.uint8) for piece in pieces))
