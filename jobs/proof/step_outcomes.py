"""Reads from a run's ledger what became of each step, and on which token store it was taken."""

from enum import StrEnum

from jobs.run.ledger import Ledger, Line, void


class Outcome(StrEnum):
    LEARNED = "learned"  # its update is in the run's weights
    SKIPPED = "skipped"  # its batch was read, and the guard left the update out
    ROLLED_BACK = "rolled back"  # the run went back behind it and left its data out
    OTHER_DATA = "other data"  # it was taken on another token store
    NOT_TAKEN = "to come"  # the run has not taken it, or not again after it went back


class StepOutcomes:
    """The outcome of each step by the ledger; of one that was taken again, the last time counts."""

    def __init__(self, ledger: Ledger) -> None:
        self._steps: dict[int, tuple[Outcome, str | None]] = {}
        identity: str | None = None
        for line in ledger.lines:
            if line.get("event") == "start":
                identity = line.get("data_identity")
            self._read(line, identity)

    @property
    def last_step(self) -> int:
        """The last step that the run has taken, 0 before the first."""
        return max(self._steps, default=0)

    def outcome(self, step: int, identity: str | None) -> Outcome:
        """Returns what became of a step, as a step on the token store with this identity."""
        outcome, taken_on = self._steps.get(step, (Outcome.NOT_TAKEN, identity))
        return outcome if taken_on == identity else Outcome.OTHER_DATA

    def identity(self, step: int) -> str | None:
        """Returns the identity of the token store on which a step was taken, None where it was
        not."""
        return self._steps.get(step, (None, None))[1]

    def is_rolled_back(self, step: int) -> bool:
        return self._steps.get(step, (None, None))[0] is Outcome.ROLLED_BACK

    def _read(self, line: Line, identity: str | None) -> None:
        match line.get("event"):
            case None:
                self._steps[line["step"]] = (Outcome.LEARNED, identity)
            case "skip":
                self._steps[line["step"]] = (Outcome.SKIPPED, identity)
            case "rollback":
                for step in range(line["first"], line["last"] + 1):
                    self._steps[step] = (Outcome.ROLLED_BACK, identity)
            case _:
                for way in void([line]):
                    self._steps = {
                        step: known for step, known in self._steps.items() if step <= way.to_step
                    }
