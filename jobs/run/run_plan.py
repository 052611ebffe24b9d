"""What the driver settles before a run trains, where the run keeps its things, and the rows that it reads."""

import hashlib
from dataclasses import dataclass, field
from functools import partial

from cluster.settings.run import RunConfig, max_steps, seq_len
from cluster.storage.uris import Storage, open_storage
from jobs.tokens.token_store import Split, TokenStoreError
from jobs.tokens.token_stream import TokenStream

TOKENIZING_FAILED = "tokenizing-failed"
"""In the run's storage: why the growing token store will not be finished."""


@dataclass(frozen=True)
class RunPlan:
    """What the driver settled before training: plain values, the same for every attempt and every worker."""

    config: RunConfig  # with the model's vocabulary and the run id filled in
    tokens_uri: str
    tokenizer_json: bytes
    code_version: str
    pinned: frozenset[str]  # names of published checkpoints of this run
    growing: bool = False  # the token store is still being written
    launcher: int = 0  # the driver's number among the run's writers; those of older ones are turned away
    until: int | None = None  # a replay ends after this step
    launch: str | None = None  # names the keepers of this launch's snapshots; None where there are none
    validation_uris: dict[str, str] = field(default_factory=dict)  # token stores of the sets of `data.validation`

    @property
    def run(self) -> Storage:
        return run_storage(self.config)

    @property
    def identity(self) -> str:
        """Of all that a training state depends on, and of the launch."""
        train, model = self.config.train.model_dump_json(), self.config.model
        parts = (self.launch, self.run.uri, train, model, self.tokens_uri, self.tokenizer_json)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def last_step(self) -> int:
        return self.until or max_steps(self.config)


def run_storage(config: RunConfig) -> Storage:
    """Where the run keeps its ledger, checkpoints and report."""
    return open_storage(config.storage.uri).child(f"runs/{config.run_id}")


def check_writer(run: Storage) -> None:
    """Raises `TokenStoreError` when the driver found that tokenizing failed."""
    if run.exists(TOKENIZING_FAILED):
        raise TokenStoreError(run.read_bytes(TOKENIZING_FAILED).decode())


def open_stream(plan: RunPlan, split: Split) -> TokenStream:
    """The run's rows of a split, which may still be growing."""
    return TokenStream(
        open_storage(plan.tokens_uri),
        split=split,
        seq_len=seq_len(plan.config),
        seed=plan.config.train.seed,
        window_rows=plan.config.train.shuffle_window_rows,
        growing=plan.growing,
        check=partial(check_writer, plan.run),
    )


def open_validation_sets(plan: RunPlan) -> dict[str, TokenStream]:
    """The rows of each text of `data.validation`, by name."""
    return {
        name: TokenStream(open_storage(uri), split="train", seq_len=seq_len(plan.config))
        for name, uri in plan.validation_uris.items()
    }


def num_validation_rows(stream: TokenStream, config: RunConfig) -> int:
    """The rows that a validation computes; waits until so many are sealed."""
    return stream.count_rows(at_most=max(1, config.train.eval_max_tokens // seq_len(config)))
