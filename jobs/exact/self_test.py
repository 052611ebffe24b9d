"""Checks before a worker trains that its device computes the gradient that the model defines, and
the same one twice.

A tiny step goes the whole way of a real one, with the run's own precision, documents and
recomputation, and is held against autograd in float64. Fused kernels are then compiled for one
block of the run's own shape, which is held against plain operations. No other way to compute draws
the same dropout: so these two are without. The run's own dropout follows, which must give the same
gradients twice, about as long as without it. Thus the kernels that the run trains with are compiled
here, and their gradients are hashed.

Of a model of transformers, whose operations are PyTorch's, a few of its own layers are tested too
(`foreign_test`). Its fused kernels are compiled for a layer of each kind, and for rows with and
without a border of documents.
"""

import dataclasses
import hashlib
import math
from typing import assert_never

import torch
from torch import Tensor

from cluster.settings.run import RunConfig, seq_len, way_to_compute
from jobs.exact.compute import first_weights, micro_batch
from jobs.exact.foreign_test import one_graph_of_each_kind, test_foreign
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from jobs.exact.untested import why_untested
from jobs.tokens.batch_plan import Indices
from model.config import GPTConfig, Shape
from model.decoder import Decoder
from model.decoders.foreign_layer import layer_of
from model.decoders.make import new_decoder
from model.foreign_config import ForeignConfig
from model.kernels.native_library import NoNativeLibraryError
from model.operations import PLAIN, use_operations
from raymill.errors import UserError
from raymill.state.train_state import ALONE
from raymill.step_timer import StepTimer

_MOST_LONGER = 10.0
"""How many times as long, or as short, dropout that drops nearly nothing may make a gradient."""

_LEAST = 1e-3
"""Of the whole gradient's length: a parameter of transformers' whose gradient is shorter is held
against so much. One that has no effect, such as a bias of keys before a softmax, has rounding
alone."""

_HEAD_DIM = 64  # for a model that has no heads

_FROM_KINK = 4.0  # values spread by less than 1
_EOT = 3
_SEED = 1

# What most models of transformers are like
_LLAMA = GPTConfig(architecture="llama", activation_function="swiglu")

_OPERATIONS = {
    "ln_f": "the last norm, or the head's loss",
    "model.norm": "the last norm, or the head's loss",
    "layernorm": "a norm",
    "lm_head": "the head's loss",
    "mlp": "a feed-forward layer",
    "attn": "attention",
    "ln_": "a norm",
    "wpe": "the embedding of positions",
    "wte": "the embedding of tokens, or the head's loss",
    "embed_tokens": "the embedding of tokens, or the head's loss",
}
"""By the first part that a parameter's name has: what computes its gradient."""


class _Rows:
    """Rows that are a function of their number."""

    def __init__(self, config: RunConfig) -> None:
        self._shape = (config.train.micro_batch_size, seq_len(config) + 1)
        self._vocab_size = config.model.vocab_size
        self._is_foreign = config.model.by_transformers

    def samples(self, indices: Indices | range) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(indices[0]))
        rows = torch.randint(self._vocab_size, self._shape, generator=generator)
        if self._is_foreign:
            rows[rows == _EOT] += 1
        # transformers has no mask for rows without a border, which is another graph
        if not self._is_foreign or indices[0] == 0:
            rows[:, self._shape[1] // 2] = _EOT
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def read_ahead(self, indices: Indices) -> None:
        pass


def self_test(config: RunConfig, device: torch.device) -> str:
    """Returns the SHA-256 of a tiny step's gradients, which workers with the same hardware have in
    common. Raises `UserError`, which names the operation, where a gradient is wrong or is another
    one the next time, `UntestedError` where the test cannot be taken here, and `ForeignModelError`
    where a model of transformers cannot be trained anywhere."""
    try:
        return _checksum(config, device)
    except (RuntimeError, MemoryError, NoNativeLibraryError) as error:
        untested = why_untested(error, device)
        if untested is None:
            raise
        raise untested from error


def _checksum(config: RunConfig, device: torch.device) -> str:
    shape = config.model
    if shape.by_transformers:
        test_foreign(_in_plain(config), device)
    tiny = _in_tiny(config)
    gradients = _check(tiny, device, exact=_in_float64(tiny))
    if isinstance(shape, GPTConfig):
        assert isinstance(tiny.model, GPTConfig)
        dropping = dataclasses.replace(tiny.model, dropout=shape.dropout)
        gradients |= _dropped(tiny, device, dropping, like=gradients)
    if way_to_compute(config) == "compiled":
        gradients |= _of_blocks(config, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the run lays out differently
    return _hash(gradients)


def _of_blocks(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """Returns the gradients of one block, or of one of each kind, which the run's own kernels
    computed."""
    match config.model:
        case GPTConfig() as shape:
            few: Shape = dataclasses.replace(shape, n_layer=1)
            without: Shape = dataclasses.replace(shape, n_layer=1, dropout=0.0)
        case ForeignConfig() as shape:
            few = shape.shortened()
            without = few.without_dropout()
        case _:
            assert_never(config.model)
    blocks = _with(
        config,
        without,
        micro_batch_size=config.train.micro_batch_size,
        seq_len=seq_len(config),
    )
    exact = _gradients(_in_plain(blocks), device)
    with one_graph_of_each_kind(config):
        gradients = _check(blocks, device, exact=exact)
        gradients |= _dropped(blocks, device, few, like=gradients)
    return {f"block.{name}": gradient for name, gradient in gradients.items()}


def _in_plain(config: RunConfig) -> RunConfig:
    train = config.train.model_copy(update={"compute": "plain"})
    return config.model_copy(update={"train": train})


def _hash(gradients: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(gradients):
        digest.update(f"{name}\0".encode())
        digest.update(gradients[name].contiguous().numpy().data)
    return digest.hexdigest()


def _check(
    config: RunConfig,
    device: torch.device,
    *,
    exact: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Returns the gradients that were checked."""
    gradients = _steady_gradients(config, device)
    within = config.train.numerics.tolerance
    least = _least_length(config, exact)
    # From the loss backward: what comes after a wrong operation is wrong too
    for name in reversed(exact):
        expected = exact[name].double()
        difference = gradients[name].double() - expected
        error = float(difference.norm() / expected.norm().clamp(min=least))
        if not error < within:  # it may be NaN
            raise UserError(
                f"{_what(name, device)} has a gradient of {name} that is {error:.1g} off, relative to autograd in a "
                f"wider type, and {within:g} is allowed in {config.train.precision}: nothing was trained. Try --train."
                "compute plain, and another version of PyTorch or of the driver"
            )
    return gradients


def _dropped(
    config: RunConfig,
    device: torch.device,
    shape: Shape,
    *,
    like: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Returns the gradients of the same model with the run's dropout, if it has any; `like` are
    those without it."""
    dropout = shape.dropout
    if not dropout:
        return {}
    gradients = _steady_gradients(config.model_copy(update={"model": shape}), device)
    most = _MOST_LONGER / (1 - dropout)
    least = _least_length(config, like)
    for name in reversed(like):
        length, without = (one[name].double().norm().clamp(min=least) for one in (gradients, like))
        ratio = float(length / without)
        if not 1 / most < ratio < most:  # it may be NaN
            raise UserError(
                f"{_what(name, device)} has, with dropout {dropout:g}, a gradient of {name} that is {ratio:.1g} times "
                f"as long as without it, and {1 / most:.1g} to {most:.1g} is allowed: nothing was trained. Try --train."
                "compute plain, and another version of PyTorch or of the driver"
            )
    return {f"dropout.{name}": gradient for name, gradient in gradients.items()}


def _least_length(config: RunConfig, gradients: dict[str, Tensor]) -> float:
    """Returns what the length of a gradient counts for at least."""
    if not config.model.by_transformers:
        return 0.0
    lengths = [gradient.double().norm() for gradient in gradients.values()]
    return _LEAST * float(torch.stack(lengths).norm())


def _steady_gradients(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """Returns gradients that are the same twice, unless equal bits are not asked for."""
    gradients = _gradients(config, device)
    if not config.train.exact:
        return gradients
    again = _gradients(config, device)
    # From the loss backward: what comes after an unsteady operation is unsteady too
    for name in reversed(gradients):
        if not torch.equal(gradients[name], again[name]):
            raise UserError(
                f"{_what(name, device)} gives {name} another gradient each time, so that no run would have the same "
                "bits twice: nothing was trained. Try --train.compute plain, or --train.exact false without equal bits"
            )
    return gradients


def _what(name: str, device: torch.device) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
    operations = [operation for part, operation in _OPERATIONS.items() if part in name]
    return f"on {kind}, {[*operations, layer_of(name)][0]}"


def _gradients(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """Returns the gradient of a step by parameter, on the CPU, as training computes it."""
    state = run_state(_model(config), config.train, device=device)
    gradient = step_gradient(
        config,
        state,
        _Rows(config),  # type: ignore[arg-type]
        ALONE,
        eot_id=_eot_id(config),
    )
    try:
        gradient.of_step(1, StepTimer())
        return {name: view.cpu() for name, view in state.by_parameter(state.gradient).items()}
    finally:
        gradient.close()
        state.close()


def _in_float64(config: RunConfig) -> dict[str, Tensor]:
    """Returns the same, by autograd alone, in float64 and on the CPU."""
    model = _model(config).double()
    use_operations(model, PLAIN)
    made = _Rows(config)
    num_rows = config.train.global_batch_size
    scale = 1 / (num_rows * seq_len(config))
    for first in range(0, num_rows, config.train.micro_batch_size):
        rows = made.samples(range(first, num_rows))
        batch = micro_batch(rows, config, torch.device("cpu"), eot_id=_eot_id(config))
        model.loss(*batch, scale=scale).backward()
    gradients: dict[str, Tensor] = {}
    for name, weights in model.named_parameters():
        if weights.grad is not None:
            gradients[name] = weights.grad
    return gradients


def _model(config: RunConfig) -> Decoder:
    model = new_decoder(config.model)
    model.init_weights(_SEED)
    if way_to_compute(config) == "portable":
        for name, values in first_weights(config, _SEED):
            model.get_parameter(name).data.copy_(values)
    if isinstance(config.model, GPTConfig) and config.model.activation_function == "relu":
        _keep_from_kink(model)
    return model


def _keep_from_kink(model: Decoder) -> None:
    """Makes every value that ReLU sees far from zero, where rounding alone would decide about its
    gradient."""
    for name, bias in model.named_parameters():
        if name.endswith("mlp.c_fc.bias"):
            bias.data[0::2] = _FROM_KINK
            bias.data[1::2] = -_FROM_KINK


def _eot_id(config: RunConfig) -> int | None:
    return _EOT if config.train.document_mask else None


def _in_tiny(config: RunConfig) -> RunConfig:
    """Returns the run with two lanes of a few short sequences, and two narrow layers with heads as
    wide as its own.

    The wider the heads, the smaller the weights: with logits of attention that grow with the width,
    its softmax would take rounding to bf16 for a fault.
    """
    width = 2 * (config.model.head_dim or _HEAD_DIM)
    like = config.model if isinstance(config.model, GPTConfig) else _LLAMA
    shape = dataclasses.replace(
        like,
        vocab_size=97,
        n_positions=64,
        n_layer=2,
        n_head=2,
        n_kv_head=1 if like.network.groups_heads else None,
        n_embd=width,
        n_inner=None,
        dropout=0.0,
        initializer_range=0.8 / math.sqrt(width),
    )
    way = way_to_compute(config)
    compute = "plain" if way == "compiled" else way
    return _with(config, shape, micro_batch_size=2, seq_len=64, compute=compute, exact=True)


def _with(
    config: RunConfig, shape: object, *, micro_batch_size: int, **changes: object
) -> RunConfig:
    """Returns the run with another shape of the model, in steps of two lanes of one micro-batch."""
    step = {
        "audit_every_steps": 0,
        "micro_batch_size": micro_batch_size,
        "micro_batches_per_lane": 1,
        "global_batch_size": 2 * micro_batch_size,
        "batch_ramp_tokens": 0,
        "batch_ramp_start": None,
    }
    train = config.train.model_copy(update=step | changes)
    return config.model_copy(update={"model": shape, "train": train})
