"""Trains each contender of `bench_loss` on the same rows: raymill's own step with AdamW or Muon, and
nanoGPT's and nanochat's recipes as plain loops with `torch.optim`.

B sequences, T tokens of each. A row is T + 1 neighboring characters of a text, at a place that
follows from the seed and the row's number alone.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cluster.settings.run import RunConfig
from jobs.exact.compute import autocast
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from model.config import GPTConfig
from model.gpt import GPT, initial_weights
from model.numerics import Precision
from model.training.optimizer import learning_rate
from raymill.state.train_state import ALONE
from raymill.step_timer import StepTimer
from tests.benchmarks.plain_gpt2 import PlainGPT2, Shape

Tokens = npt.NDArray[np.int64]

NUM_EVALUATIONS = 20
"""Of a run, the last one after its last step."""

NUM_VALIDATION_ROWS = 256


@dataclass(frozen=True)
class Corpus:
    """A text as the numbers of its characters."""

    vocab_size: int
    train: Tokens
    validation: Tokens

    @classmethod
    def of(cls, text: str) -> "Corpus":
        """Keeps the last tenth for validation, as nanoGPT does."""
        characters = {character: number for number, character in enumerate(sorted(set(text)))}
        numbers = np.array([characters[character] for character in text])
        border = len(numbers) * 9 // 10
        return cls(len(characters), numbers[:border], numbers[border:])


@dataclass(frozen=True)
class Task:
    """What all contenders have in common."""

    n_layer: int
    n_head: int
    n_embd: int
    seq_len: int
    batch_size: int  # sequences of a step
    num_steps: int
    precision: Precision = "fp32"  # of raymill's contenders; the others are fp32

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len


class Rows:
    """Rows at random places of a text, as `BatchGradient` asks for them."""

    def __init__(self, tokens: Tokens, seq_len: int, seed: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed

    def samples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets (B, T)."""
        rows: list[Tokens] = []
        for index in indices:
            random = np.random.default_rng((self._seed, int(index)))
            start = int(random.integers(len(self._tokens) - self._seq_len))
            rows.append(self._tokens[start : start + self._seq_len + 1])
        batch = torch.from_numpy(np.stack(rows))
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def read_ahead(self, indices: Any) -> None:
        """Nothing is read from a disk."""


@dataclass
class Curve:
    """What became of a run."""

    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of validation, in nats a character
    seconds: list[float] = field(default_factory=list)  # of this process's processors, in steps


class Contender:
    """Takes the steps of one run."""

    def step(self, step: int) -> None:
        raise NotImplementedError

    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        """Returns the mean loss of the targets (B, T)."""
        raise NotImplementedError


class Ours(Contender):
    """raymill's own gradient and update, by one worker."""

    def __init__(
        self,
        corpus: Corpus,
        task: Task,
        seed: int,
        *,
        optimizer: str,
        peak: float,
        **train: Any,
    ) -> None:
        """`train` has settings of that section beside those of the task, or in their place."""
        train = {
            "optimizer": optimizer,
            "learning_rate": peak,
            "global_batch_size": task.batch_size,
            "micro_batch_size": task.batch_size,
            "max_tokens": task.num_steps * task.step_tokens,
            "precision": task.precision,
            "seed": seed,
        } | train
        shape = asdict(_shape(corpus, task))
        values = {"model": shape, "train": train, "scaling": {"max_workers": 1}}
        self._config = RunConfig.model_validate(values)
        self._task = task
        self._model = GPT(self._config.model)
        self._model.init_weights(seed)
        self._state = run_state(self._model, self._config.train, device=torch.device("cpu"))
        rows: Any = Rows(corpus.train, task.seq_len, seed)
        self._gradient = step_gradient(self._config, self._state, rows, ALONE, eot_id=None)
        self._timer = StepTimer()

    def step(self, step: int) -> None:
        train = self._config.train
        rate = learning_rate(
            step * self._task.step_tokens,
            peak=train.learning_rate,
            warmup_tokens=train.max_tokens // 20,
            decay_tokens=train.max_tokens,
            min_ratio=train.min_learning_rate_ratio,
        )
        measured = self._gradient.of_step(step, self._timer)
        self._state.apply(norm=measured.norm, learning_rate=rate)

    @torch.no_grad()
    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        with autocast(self._config, inputs.device):
            return float(self._model.loss(inputs, targets, scale=1.0 / targets.numel()))


class PlainLoop(Contender):
    """A loop with optimizers of PyTorch, each of whose groups has a peak of its own."""

    def __init__(
        self,
        model: PlainGPT2,
        optimizers: Sequence[torch.optim.Optimizer],
        corpus: Corpus,
        task: Task,
        seed: int,
        *,
        share_of_peak: Callable[[int], float],
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._rows = Rows(corpus.train, task.seq_len, seed)
        self._batch_size = task.batch_size
        self._share_of_peak = share_of_peak
        for group in self._groups:
            group["peak"] = group["lr"]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for optimizer in self._optimizers:
            groups += optimizer.param_groups
        return groups

    def step(self, step: int) -> None:
        for group in self._groups:
            group["lr"] = group["peak"] * self._share_of_peak(step)
            if "ns_steps" in group:  # nanochat's momentum grows over 300 steps
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 300)
        first = (step - 1) * self._batch_size
        self._model(*self._rows.samples(range(first, first + self._batch_size))).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        return float(self._model(inputs, targets))


def nanogpt(corpus: Corpus, task: Task, seed: int) -> PlainLoop:
    """nanoGPT's config/train_shakespeare_char.py: AdamW from 1e-3 by a cosine down to 1e-4, with a
    twentieth of the steps to warm up, and a second moment of 0.99. It starts from raymill's initial
    weights of the seed, which follow the rule of its model.py."""
    shape = _shape(corpus, task)
    model = PlainGPT2(shape)
    model.load_state_dict(_as_plain(initial_weights(GPTConfig(**asdict(shape)), seed)))
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def share_of_peak(step: int) -> float:
        return learning_rate(
            step, peak=1.0, warmup_tokens=task.num_steps // 20, decay_tokens=task.num_steps,
            min_ratio=0.1,
        )  # fmt: skip

    return PlainLoop(model, [optimizer], corpus, task, seed, share_of_peak=share_of_peak)


def nanochat(corpus: Corpus, task: Task, seed: int) -> PlainLoop:
    """The rates of nanochat's scripts/base_train.py: Muon at 0.02 for the blocks' matrices, AdamW
    at 0.2 for embeddings and 0.004 for a head of its own, both over the root of the width by 768,
    all constant until the last fifth, which falls to zero. Its own blocks are others."""
    torch.manual_seed(seed)
    model = PlainGPT2(_shape(corpus, task), is_fused=False, is_tied=False)
    nn.init.normal_(model.tokens.weight, std=1.0)
    nn.init.zeros_(model.head.weight)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    scale = (task.n_embd / 768) ** -0.5
    embeddings = [model.tokens.weight, model.positions.weight]
    groups = [
        {"params": embeddings, "lr": 0.2 * scale},
        {"params": [model.head.weight], "lr": 0.004 * scale},
        {"params": vectors, "lr": 0.004 * scale},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0)

    def share_of_peak(step: int) -> float:
        return min(1.0, (task.num_steps - step + 1) / (task.num_steps / 5))

    return PlainLoop(model, [adamw, muon], corpus, task, seed, share_of_peak=share_of_peak)


def trained(contender: Contender, corpus: Corpus, task: Task) -> Curve:
    """Takes all steps, and validates on the same rows every twentieth of them."""
    validation = Rows(corpus.validation, task.seq_len, 0).samples(range(NUM_VALIDATION_ROWS))
    points = {
        math.ceil(task.num_steps * part / NUM_EVALUATIONS) for part in range(1, NUM_EVALUATIONS + 1)
    }
    curve, seconds = Curve(), 0.0
    for step in range(1, task.num_steps + 1):
        start_s = time.process_time()
        contender.step(step)
        seconds += time.process_time() - start_s
        if step in points:
            curve.tokens.append(step * task.step_tokens)
            curve.losses.append(contender.loss(*validation))
            curve.seconds.append(seconds)
    return curve


def _as_plain(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns raymill's parameters under the plain model's names, linear layers as (out, in)."""
    plain: dict[str, Tensor] = {}
    for name, values in weights:
        plain_name = name
        for ours, theirs in _PLAIN_NAMES.items():
            plain_name = plain_name.replace(ours, theirs)
        is_linear = values.dim() == 2 and plain_name.startswith("blocks.")
        plain[plain_name] = values.T if is_linear else values
    plain["head.weight"] = plain["tokens.weight"]
    return plain


_PLAIN_NAMES = {
    "transformer.": "",
    "wte.": "tokens.",
    "wpe.": "positions.",
    "h.": "blocks.",
    "attn.c_attn.": "attention.qkv.",
    "attn.c_proj.": "attention.proj.",
    "mlp.c_fc.": "up.",
    "mlp.c_proj.": "down.",
}


def _shape(corpus: Corpus, task: Task) -> Shape:
    return Shape(corpus.vocab_size, task.seq_len, task.n_layer, task.n_head, task.n_embd)
