"""Tells from the checksums of an audited step which workers computed or hold something wrong: pure
functions, alike on every rank.

Whoever contradicts what most say is wrong. Two workers of which each repeats its own answer cannot
be told apart.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from jobs.exact.audits.audit import Audit, Shown
from jobs.exact.audits.excerpt import Repeated, ShownSum


class What(StrEnum):
    """A fault."""

    GRADIENT = "gradient"  # of a lane, or of a micro-batch where the gradient is sharded
    LOSS = "loss"  # of a micro-batch
    SUM = "sum"  # of the gradients of some lanes
    UPDATE = "update"  # of values that one rank alone owns
    WEIGHTS = "weights"  # a rank's copy of them
    VECTORS = "vectors"  # its copy of what the update rule keeps, as AdamW's moments
    SNAPSHOTS = "snapshots"  # nodes' copies of both in their memory
    SELF_TEST = "self_test"  # the gradient of the tiny step before a worker trains


@dataclass(frozen=True)
class Turn:
    """One turn of one rank in a step, or all of them."""

    rank: int
    number: int | None  # of the rank's turns; None for all of them


@dataclass(frozen=True)
class Corruption:
    """Something wrong that one rank has shown."""

    what: What
    rank: int
    shown: int  # the checksum
    right: int
    repeats: bool = False  # it was wrong again when asked again
    turn: Turn | None = None  # whose gradient it is
    votes: Sequence[int] = ()  # how many answers were the right one, and this one


@dataclass(frozen=True)
class Undecided:
    """Something that ranks have shown differently, and nobody can tell yet which of them is
    wrong."""

    what: What
    shown: Mapping[int, int]  # the checksum by rank


@dataclass(frozen=True)
class Verdict:
    corruptions: Sequence[Corruption] = ()
    undecided: Sequence[Undecided] = ()

    @property
    def is_clean(self) -> bool:
        return not self.corruptions and not self.undecided


CLEAN = Verdict()


def of_copies(shown: Sequence[Shown], *, holders: Sequence[Sequence[int]]) -> Verdict:
    """Returns the verdict about the copies of the weights and of the rule's vectors. `holders` has
    for each of the two, by rank, a number that ranks with the same copy share."""
    corruptions: list[Corruption] = []
    undecided: list[Undecided] = []
    for what, copies in zip((What.WEIGHTS, What.VECTORS), holders, strict=True):
        checksums = of_state(shown, what)
        for copy in sorted({*copies}):
            by_rank = {rank: checksums[rank] for rank, held in enumerate(copies) if held == copy}
            right = most_common([*by_rank.values()])
            if right is None:
                undecided.append(Undecided(what, by_rank))
            else:
                corruptions += _differing(what, by_rank, right)
    return Verdict(corruptions, undecided)


def of_state(shown: Sequence[Shown], what: What) -> list[int]:
    """Returns the checksums of a part of the state by rank."""
    return [row.values if what is What.WEIGHTS else row.vectors for row in shown]


def named_later(what: What, earlier: Mapping[int, int], shown: Sequence[Shown]) -> list[Corruption]:
    """Returns who was wrong where ranks had shown different checksums of a part of the state, once
    the steps that lead to it were taken again. Nobody is named where all were wrong: a wrong copy
    has wrong gradients, which reach all others in the next step, and it does not show whose was
    wrong first. Nor is anybody where ranks are gone: those that are left may hold other parts."""
    now = of_state(shown, what)
    corruptions: list[Corruption] = []
    if max(earlier) >= len(now):
        return corruptions
    for rank, checksum in earlier.items():
        if checksum != now[rank]:
            corruptions.append(Corruption(what, rank, checksum, now[rank]))
    return corruptions if len(corruptions) < len(earlier) else []


def _differing(what: What, by_rank: Mapping[int, int], right: int) -> list[Corruption]:
    corruptions: list[Corruption] = []
    for rank, checksum in by_rank.items():
        if checksum != right:
            votes = votes_for(right, checksum, [*by_rank.values()])
            corruptions.append(Corruption(what, rank, checksum, right, votes=votes))
    return corruptions


def disputed_turns(audit: Audit, shown: Sequence[Shown]) -> list[Turn]:
    """Returns the turns of which the rank itself and the one that computed them again have shown
    different checksums."""
    disputed: list[Turn] = []
    for rank, subject in enumerate(audit.subjects):
        if shown[rank].other_turn != shown[subject].own_turn:
            disputed.append(Turn(subject, None if audit.checks_all else audit.turns[subject]))
    return sorted(disputed, key=lambda turn: turn.rank)


def of_turns(
    audit: Audit,
    shown: Sequence[Shown],
    disputed: Sequence[Turn],
    answers: Sequence[Sequence[int]],
) -> Verdict:
    """Returns the verdict about disputed turns; `answers` has for each what every rank found when
    all computed it once more."""
    corruptions: list[Corruption] = []
    undecided: list[Undecided] = []
    for turn, asked_again in zip(disputed, answers, strict=True):
        auditor = audit.subjects.index(turn.rank)
        given = [
            (turn.rank, shown[turn.rank].own_turn),
            (auditor, shown[auditor].other_turn),
            *enumerate(asked_again),
        ]
        answers_given = [answer for _, answer in given]
        right = most_common(answers_given)
        if right is None:
            by_rank = {rank: asked_again[rank] for rank in (turn.rank, auditor)}
            undecided.append(Undecided(What.GRADIENT, by_rank))
            continue
        wrong = {rank: answer for rank, answer in given if answer != right}
        for rank, answer in sorted(wrong.items()):
            repeats, votes = asked_again[rank] != right, votes_for(right, answer, answers_given)
            corruptions.append(Corruption(What.GRADIENT, rank, answer, right, repeats, turn, votes))
    return Verdict(corruptions, undecided)


def of_repeated(what: What, repeated: Repeated) -> Verdict:
    """Returns the verdict about sums or updates that ranks noted: what most find when all make the
    same again is right. A wrong sum makes those wrong that others make of it, who are not to
    blame."""
    undecided: list[Undecided] = []
    wrong: list[tuple[ShownSum, Corruption]] = []
    for noted, answers in zip(repeated.shown, repeated.answers, strict=True):
        right = most_common(answers)
        if right is None:
            undecided.append(Undecided(what, dict(enumerate(answers))))
            continue
        given = [*enumerate(answers), (noted.rank, noted.checksum)]
        for rank, answer in sorted({at for at in given if at[1] != right}):
            is_noted = (rank, answer) == (noted.rank, noted.checksum)
            repeats = is_noted and answers[rank] != right
            votes = votes_for(right, answer, [shown for _, shown in given])
            wrong.append((noted, Corruption(what, rank, answer, right, repeats, votes=votes)))
    by_rank: dict[int, Corruption] = {}
    for noted, corruption in wrong:
        is_made_of_wrong = any(_leads_to(before, noted) for before, _ in wrong)
        if not is_made_of_wrong and (corruption.repeats or corruption.rank not in by_rank):
            by_rank[corruption.rank] = corruption
    return Verdict([*by_rank.values()], undecided[:1])


def _leads_to(before: ShownSum, after: ShownSum) -> bool:
    """Reports whether one sum is made of the other one."""
    is_within = before.lanes.start >= after.lanes.start and before.lanes.stop <= after.lanes.stop
    order_before = (len(before.lanes), before.is_last)
    is_before = order_before < (len(after.lanes), after.is_last)
    return is_within and is_before and before.span.meets(after.span)


def of_self_tests(checksums: Sequence[str], kinds: Sequence[object]) -> Verdict:
    """Returns the verdict about the hashes of the gradients, in hexadecimal, that ranks have found
    in their self-tests: empty where it failed, which is wrong wherever another rank's did not.
    Ranks of different kinds of hardware are not compared."""
    corruptions: list[Corruption] = []
    undecided: list[Undecided] = []
    numbers = [int(checksum or "0", 16) for checksum in checksums]
    for number, kind in enumerate(kinds):
        ranks = [rank for rank, other in enumerate(kinds) if other == kind]
        if number != ranks[0]:
            continue  # seen with the first of its kind
        right = most_common([numbers[rank] for rank in ranks if checksums[rank]] or [0])
        if right is None:
            undecided.append(Undecided(What.SELF_TEST, {rank: numbers[rank] for rank in ranks}))
            continue
        for rank in ranks:
            if numbers[rank] != right or not checksums[rank]:
                answers = [numbers[other] for other in ranks]
                corruption = Corruption(
                    What.SELF_TEST,
                    rank,
                    numbers[rank],
                    right,
                    repeats=True,
                    votes=votes_for(right, numbers[rank], answers),
                )
                corruptions.append(corruption)
    return Verdict(corruptions, undecided)


def most_common(answers: Sequence[int]) -> int | None:
    """Returns the answer that more have given than any other one; None where no answer has."""
    (first, count), *others = Counter(answers).most_common(2)
    if others and others[0][1] == count:
        return None
    return first


def votes_for(right: int, shown: int, answers: Sequence[int]) -> tuple[int, int]:
    """Returns how many of the answers were the right one, and how many the one that was shown."""
    counts = Counter(answers)
    return counts[right], counts[shown]
