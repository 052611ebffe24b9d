"""The plan that the driver makes before a run trains, with the run's storage and the rows that it
reads."""

from dataclasses import dataclass, field

from cluster.settings.run import RunConfig, max_steps, run_storage, seq_len
from cluster.storage.uris import Storage, open_storage
from jobs.run.base import Base
from jobs.tokens.division import BY_DOCUMENTS, Division, HeldOut
from jobs.tokens.holes import NO_HOLES, Holes
from jobs.tokens.token_store import Split
from jobs.tokens.token_stream import TokenStream


@dataclass(frozen=True)
class Replay:
    """The work of a replay beside its steps: all that the repeated run has recorded."""

    hashed: frozenset[int]  # steps after which it takes the state's hash
    validated: frozenset[int]  # steps after which it validates


@dataclass(frozen=True)
class RunPlan:
    """The driver's decisions before training: plain values, the same for every attempt and every
    worker."""

    config: RunConfig  # with the model's vocabulary and the run id filled in
    tokens_uri: str
    tokenizer_json: bytes
    code_version: str
    # The driver's number among the run's writers; writers of older drivers are refused
    launcher: int = 0
    until: int | None = None  # the step after which it ends before its time
    replay: Replay | None = None  # it compares hashes of its state, and stores none
    # The name of the launch, by which its keepers are found; None without keepers
    launch: str | None = None
    # Token store of each set in `data.validation`
    validation_uris: dict[str, str] = field(default_factory=dict)
    division: Division = BY_DOCUMENTS  # of the token store into what trains and what validates
    holes: Holes = NO_HOLES  # what it does not read of the texts to train on
    base: Base | None = None  # the frozen weights that an adapter stands on
    command: str = ""  # what a person types to continue it, if that is known

    @property
    def run(self) -> Storage:
        return run_storage(self.config)

    @property
    def last_step(self) -> int:
        return max_steps(self.config) if self.until is None else self.until


def open_stream(plan: RunPlan, split: Split = "train") -> TokenStream:
    """Returns the run's rows of a split."""
    return TokenStream(
        open_storage(plan.tokens_uri),
        split=split,
        seq_len=seq_len(plan.config),
        seed=plan.config.train.seed,
        window_rows=plan.config.train.shuffle_window_rows,
        num_samples=plan.config.train.max_tokens // seq_len(plan.config) if split == "train" else 0,
        near_bytes=plan.config.scaling.shard_cache_bytes,
        division=plan.division,
        holes=plan.holes if split == "train" else NO_HOLES,
    )


def open_held_out(plan: RunPlan) -> TokenStream | None:
    """Returns the rows that the run holds out; None where the texts of `data.validation` are all
    that validates it."""
    return None if plan.division.held_out is HeldOut.NOTHING else open_stream(plan, "val")


def open_validation_sets(plan: RunPlan) -> dict[str, TokenStream]:
    """Returns the rows of each text of `data.validation`, by name."""
    return {
        name: TokenStream(open_storage(uri), split="train", seq_len=seq_len(plan.config))
        for name, uri in plan.validation_uris.items()
    }
