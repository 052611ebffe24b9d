"""Measures held-out text during training, with the same figures for any number of workers, and
completes prompts."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, seq_len, way_to_compute
from cluster.settings.train import TrainConfig
from jobs.exact.compute import autocast, micro_batch, num_counted
from jobs.exact.run_state import decoder_of
from jobs.run.storage_retry import patiently
from jobs.tokens.token_stream import TokenStream
from model.decoder import Decoder
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.text.tokenizer import Tokenizer
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup

SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """The sums of a text's rows."""

    nats: float
    num_counted: float  # tokens whose loss counts
    num_tokens: int  # counted or not, as the bytes are
    bytes_per_token: float

    @property
    def figures(self) -> dict[str, float]:
        """`val_loss` (nats per counted token) and `val_bits_per_byte`."""
        bits = self.nats / self.num_tokens / math.log(2)
        return {
            "val_loss": self.nats / max(1.0, self.num_counted),
            "val_bits_per_byte": bits / self.bytes_per_token,
        }


class Validator:
    """Measures what a run holds out and its other texts, and completes its prompts. All ranks call
    it together."""

    def __init__(
        self,
        config: RunConfig,
        state: TrainState,
        group: WorkerGroup,
        *,
        held_out: TokenStream | None,
        sets: Mapping[str, TokenStream],
        tokenizer: Tokenizer,
        eot_id: int | None,
        tell: Callable[..., None],
    ) -> None:
        """`sets` are the texts of `data.validation` by name. `tell` writes an event into the
        ledger, on rank 0."""
        self._config, self._state, self._group, self._tell = config, state, group, tell
        self._held_out, self._sets, self._tokenizer = held_out, sets, tokenizer
        self._eot_id = eot_id

    def validate(self, step: int, *, moves: Callable[[], None]) -> dict[str, Any]:
        """Returns the figures of the held-out rows, or else of all sets together, None for a figure
        that is not finite. Records them with samples and the figures of each set. `moves` is called
        before each batch."""
        measure = partial(
            measured,
            config=self._config,
            state=self._state,
            group=self._group,
            eot_id=self._eot_id,
            moves=moves,
        )
        held_out = [measure(self._held_out)] if self._held_out else []
        measured_sets = {name: measure(rows) for name, rows in self._sets.items()}
        if not held_out and not measured_sets:
            return {}  # a replay of a run that only sets validate: its steps need none of them
        figures = together(held_out or list(measured_sets.values())).figures
        by_set = {name: text.figures for name, text in measured_sets.items()}
        completed: list[dict[str, str]] = []
        if self._group.rank == 0 or self._state.gathered:
            with self._state.weights_in_use(), autocast(self._config, self._state.device):
                completed = samples(decoder_of(self._state), self._tokenizer, self._config.train)
        sets = {"sets": by_set} if by_set else {}
        self._tell("validation", step=step, **figures, **sets, samples=completed)
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


@torch.no_grad()
def measured(
    rows: TokenStream,
    *,
    config: RunConfig,
    state: TrainState,
    group: WorkerGroup,
    eot_id: int | None,
    moves: Callable[[], None] = lambda: None,
) -> Measured:
    """Measures held-out rows; calls `moves` before each batch."""
    size = config.train.micro_batch_size
    most_rows = max(1, config.train.eval_max_tokens // seq_len(config))
    num_rows = rows.count_rows(at_most=most_rows)
    batches = [range(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
    # Each element has one contributor, so the all-reduce adds only zeros and rounds nothing.
    # losses, and tokens counted
    figures = torch.zeros(2, len(batches), dtype=torch.float64, device=state.device)
    decoder_of(state).eval()
    with state.weights_in_use():
        for first in range(0, len(batches), group.world_size):
            index = first + group.rank
            if index >= len(batches) and not state.gathered:
                break
            moves()
            # A rank without one helps to gather the weights
            batch = batches[min(index, len(batches) - 1)]
            read = patiently(lambda: rows.rows(batch), "tokens")  # noqa: B023 (called at once)
            with autocast(config, state.device):
                loss = (
                    decoder_of(state)
                    .loss(*micro_batch(read, config, state.device, eot_id=eot_id))
                    .double()
                )
            if index < len(batches):
                figures[0, index], figures[1, index] = loss, num_counted(read[1])
    decoder_of(state).train()
    figures = figures.cpu()  # over gloo, which fails where a worker is lost
    if group.world_size > 1:
        with group.message():
            dist.all_reduce(figures)
    # PyTorch adds in as many columns as the processor has; `fsum` rounds once
    is_portable = way_to_compute(config) == "portable"
    nats, num_counted_tokens = (
        math.fsum(row.tolist()) if is_portable else float(row.sum()) for row in figures
    )
    return Measured(
        nats, num_counted_tokens, num_rows * seq_len(config), rows.bytes_per_token(num_rows)
    )


def together(texts: Sequence[Measured]) -> Measured:
    """Returns the figures of several texts as those of one."""
    if len(texts) == 1:
        return texts[0]
    num_tokens = sum(text.num_tokens for text in texts)
    num_bytes = sum(text.num_tokens * text.bytes_per_token for text in texts)
    counted = sum(text.num_counted for text in texts)
    return Measured(sum(text.nats for text in texts), counted, num_tokens, num_bytes / num_tokens)


def check_prompts(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a prompt that the model could not continue."""
    longest = config.model.n_positions - 1
    for prompt in config.train.sample_prompts:
        num_tokens = len(tokenizer.encode_whole(prompt))
        if not 1 <= num_tokens <= longest:
            raise ConfigError(
                f"train.sample_prompts: {prompt[:40]!r} has {num_tokens} tokens, expected 1 to {longest}, which the "
                f"model can continue within its context of {longest + 1} (model.n_positions); change it or leave it out"
            )


@torch.no_grad()
def samples(model: Decoder, tokenizer: Tokenizer, config: TrainConfig) -> list[dict[str, str]]:
    """Returns each `prompt` and its continuation `text`, with a fixed seed. Whatever is drawn, the
    model computes as often as on all ranks, which may have to gather its weights each time."""
    model.eval()
    found = []
    for prompt in config.sample_prompts:
        prompt_ids = tokenizer.encode_whole(prompt)
        new_ids = generate(
            model,
            prompt_ids,
            max_tokens=min(SAMPLE_TOKENS, model.config.n_positions - len(prompt_ids)),
            params=SamplingParams(temperature=0.8, seed=config.seed),
            num_ids=tokenizer.vocab_size,
        )
        own_ids = [*itertools.takewhile(lambda token_id: token_id != tokenizer.eot_id, new_ids)]
        found.append({"prompt": prompt, "text": tokenizer.decode(own_ids, continues=True)})
    model.train()
    return found
