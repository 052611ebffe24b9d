"""The record of an audit: what was asked, what was computed again, and the verdict."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from jobs.proof.tokenize_again import Outcome


@dataclass(frozen=True)
class ComputedInterval:
    """An interval of the run whose steps were taken again."""

    first: int
    last: int
    computed: str  # when, in UTC
    now: bool  # and not by this user before an interruption
    equal: bool
    verdict: str
    hashes: int  # compared
    validations: int  # compared
    seconds: float


@dataclass(frozen=True)
class AuditRecord:
    run: str
    head: str  # SHA-256 of the last line that is signed, or else of the last one
    nonce: str  # of the auditor
    begun: str  # when, in UTC, as `ended`
    signed_by: str | None
    timestamped_by: str | None
    signed_lines: int | None
    workers: int
    hardware: dict[str, str]  # the auditor's
    hardware_of_run: list[dict[str, str]]
    code_version: str  # the auditor's
    code_of_run: list[str]
    intervals_of_run: int
    problems: list[str]
    uncovered: list[str]  # what this audit does not look at
    intervals: list[ComputedInterval] = field(default_factory=list)
    # Not in the JSON of an audit that has not come so far
    tokenized: Outcome | None = None
    unseen: dict[str, float] | None = None  # by share of forged intervals: none was drawn
    ended: str | None = None
    valid: bool | None = None
    verdict: str | None = None

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Self:
        """Returns the record that `json` wrote."""
        intervals = [ComputedInterval(**of_interval) for of_interval in values["intervals"]]
        made = values.get("tokenized")
        tokenized = None if made is None else Outcome(**made)
        return cls(**values | {"intervals": intervals, "tokenized": tokenized})

    def json(self) -> dict[str, Any]:
        late = {one.name for one in fields(self) if one.default is None}
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in late
        }

    def with_interval(self, computed: ComputedInterval) -> "AuditRecord":
        return replace(self, intervals=[*self.intervals, computed])

    def with_tokenized(self, made: Outcome) -> "AuditRecord":
        return replace(
            self,
            tokenized=made,
            problems=self.problems + made.problems,
            uncovered=self.uncovered + made.uncovered,
        )
