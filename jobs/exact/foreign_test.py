"""Checks before a worker trains a model of transformers that its module can be trained exactly.

A model with a few of its layers, as wide as they are, computes rows of random tokens. What differs
between families is asked of the module itself: nothing here knows one.

Shapes: B sequences, T tokens of each, C width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cluster.settings.run import RunConfig, seq_len
from jobs.exact.compute import autocast, choose_operations
from model.decoders.adapted import AdaptedModel
from model.decoders.foreign import ForeignModel, refusing
from model.decoders.make import new_decoder
from model.foreign_config import ForeignConfig, ForeignModelError
from model.linear_cross_entropy import IGNORE_INDEX
from model.operations import compilations, is_of_compiler, product_type
from model.shapes import CHUNK_TOKENS, GPU_CHUNK_TOKENS
from raymill.errors import UserError

_SEED = 1
_NUM_ROWS, _ROW_TOKENS = 2, 32
_NOT_SEEN = torch.finfo(torch.float32).eps ** 0.5  # 3.5e-4
"""The largest relative difference that tokens which are not seen may make. They may make some:
experts compute together whatever tokens they are sent, and the more they are sent, the other way
PyTorch may add up. Such a difference is rounding, of some `eps`; that of tokens which are seen is of
the order of 1, as the weights are large (`_with_large_weights`). This is halfway between, in powers
of 2. Among the 100 decoders of transformers 5.24 that are tested so, tokens that are not seen made
at most 1.6e-7, and those that are at least 0.11."""


def test_foreign(config: RunConfig, device: torch.device) -> None:
    """Raises `UserError`, which names what cannot be exact: a module whose tokens see what follows
    them, or documents beside their own, one with parameters that have no gradient, constants that
    change, another gradient each time, or, in bf16, one with matrices that are rounded."""
    shape = config.model
    assert isinstance(shape, ForeignConfig)
    with refusing(shape):
        model = _narrow_model(shape).to(device)
        choose_operations(model, config)
        _test(model, config)


def _test(model: ForeignModel, config: RunConfig) -> None:
    kind, device = model.config.model_type, next(model.parameters()).device
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(model.config.vocab_size, (_NUM_ROWS, _ROW_TOKENS), generator=generator)
    tokens = drawn.to(device)

    _require_nothing_frozen(model)
    with _with_large_weights(model):
        _require_causal(model, tokens)
        if config.train.document_mask:
            _require_documents(model, tokens)
    constants = [buffer.clone() for buffer in model.buffers()]
    first = _gradients(model, tokens, config)
    again = _gradients(model, tokens, config)
    for name, gradient in first.items():
        if not torch.equal(gradient, again[name]):
            raise UserError(
                f"the gradient of {name} in a model of type {kind!r} is another one each time, so that no "
                "run would have the same bits twice: nothing was trained. --train.exact false trains without equal bits"
            )
    for before, buffer in zip(constants, model.buffers(), strict=True):
        if not torch.equal(before, buffer):
            raise UserError(
                f"a model of type {kind!r} changes constants of its own while it trains, which no "
                "checkpoint has: it cannot be trained exactly"
            )
    if config.train.exact and config.train.numerics.is_rounded and model.rounds_matrices:
        _require_products(model, tokens, config, expected=first)


def _require_products(
    model: ForeignModel, tokens: Tensor, config: RunConfig, *, expected: dict[str, Tensor]
) -> None:
    """Raises `UserError` where gradients are other ones with matrices of the layers that are
    rounded before, as the state has them (`TrainState.matrix_type`)."""
    inside = {id(one) for layer in model.blocks for one in layer.module.parameters()}
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        is_matrix = id(parameter) in inside and parameter.dim() >= 2
        values = parameter.detach()
        weights[name] = values.to(product_type(config.train.numerics)) if is_matrix else values
    model.adopt(weights)
    for name, gradient in _gradients(model, tokens, config).items():
        if not torch.equal(gradient.float(), expected[name]):
            raise UserError(
                f"a model of type {model.config.model_type!r} reads matrices of its layers otherwise than in products "
                f"(the gradient of {name} shows it), so that {config.train.precision} would round them twice: nothing "
                "was trained. Set train.precision to fp32"
            )


@contextmanager
def one_graph_of_each_kind(config: RunConfig) -> Iterator[None]:
    """Lasts while a few layers are compiled. Raises `UserError` where those of a model of
    transformers cannot be, or where layers of one kind are no common graph: the rest would then be
    compiled while the run trains, by each worker for itself."""
    shape, num_before = config.model, compilations.number
    if not isinstance(shape, ForeignConfig):
        yield
        return
    advice = "nothing was trained. Leave train.compute out, or set plain"
    try:
        yield
    except RuntimeError as error:
        if not is_of_compiler(error):
            raise
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"train.compute=compiled: a model of type {shape.model_type!r} cannot be compiled ({reason}): {advice}"
        ) from error
    num_graphs = compilations.number - num_before
    if num_graphs > _most_graphs(config, shape):
        raise UserError(
            f"train.compute=compiled: in a model of type {shape.model_type!r} each layer is another graph: {advice}"
        )


def _most_graphs(config: RunConfig, shape: ForeignConfig) -> int:
    """Returns how many graphs there are: the head's for each size of a chunk, and those of a kind
    of layer, in rows with and without a border of documents, with dropout and without."""
    num_tokens = config.train.micro_batch_size * seq_len(config)
    chunk = GPU_CHUNK_TOKENS if config.scaling.use_gpu else CHUNK_TOKENS
    num_chunk_sizes = 1 + (num_tokens > chunk and num_tokens % chunk > 0)
    num_ways = (1 + config.train.document_mask) * (1 + bool(shape.dropout))
    return num_chunk_sizes + num_ways * shape.num_layer_kinds


def _narrow_model(shape: ForeignConfig) -> ForeignModel:
    model = new_decoder(shape.narrowed())
    assert isinstance(model, ForeignModel)
    model.init_weights(_SEED)
    return model


def _require_nothing_frozen(model: ForeignModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise ForeignModelError(
                f"transformers freezes {name} in a model of type {model.config.model_type!r}, which other rules than a "
                "gradient may move: this kind of model is not trained as a whole. An adapter is (--train.lora-rank)"
            )


@contextmanager
def _with_large_weights(model: ForeignModel) -> Iterator[None]:
    """Lasts while each matrix is drawn from a normal distribution with the variance 1 / n, n the
    values in a row of it: what a layer adds is then about as long as what it is given, as in a model
    that was trained. With fresh weights that a config.json wants to be small, what one token tells
    another one may be as short as rounding."""
    tensors: list[Tensor] = [*model.parameters()]
    if isinstance(model, AdaptedModel):
        tensors += model.frozen.values()
    matrices = [one.detach() for one in tensors if one.dim() >= 2]
    before = [matrix.clone() for matrix in matrices]
    torch.manual_seed(_SEED)
    for matrix in matrices:
        matrix.normal_(std=matrix.shape[-1] ** -0.5)
    try:
        yield
    finally:
        for matrix, values in zip(matrices, before, strict=True):
            matrix.copy_(values)


def _require_causal(model: ForeignModel, tokens: Tensor) -> None:
    half = _ROW_TOKENS // 2
    others = tokens.clone()
    others[:, half:] = (tokens[:, half:] + 1) % model.config.vocab_size
    if _differ(model, tokens, others, slice(0, half)):
        raise UserError(
            f"a model of type {model.config.model_type!r} sees the tokens that follow, which it is to predict: it is "
            "no causal language model"
        )


def _require_documents(model: ForeignModel, tokens: Tensor) -> None:
    kind = model.config.model_type
    if not model.takes_positions:
        raise UserError(
            f"train.document_mask is set, and a model of type {kind!r} is not told where documents begin: leave it out"
        )
    half = _ROW_TOKENS // 2
    positions = torch.arange(_ROW_TOKENS, device=tokens.device).expand_as(tokens) % half
    others = tokens.clone()
    others[:, :half] = (tokens[:, :half] + 1) % model.config.vocab_size
    if _differ(model, tokens, others, slice(half, None), positions=positions):
        raise UserError(
            f"train.document_mask is set, and a model of type {kind!r} sees other documents in a row all the same: "
            "leave it out"
        )


@torch.no_grad()
def _differ(
    model: ForeignModel,
    tokens: Tensor,
    others: Tensor,
    places: slice,
    *,
    positions: Tensor | None = None,
) -> bool:
    """Reports whether other tokens elsewhere make other hidden states at some places."""
    model.eval()
    one = model(tokens, positions=positions)[:, places]
    other = model(others, positions=positions)[:, places]
    model.train()
    return not bool((one - other).norm() <= _NOT_SEEN * one.norm())


def _gradients(model: ForeignModel, tokens: Tensor, config: RunConfig) -> dict[str, Tensor]:
    """Returns the gradient of each parameter. Raises `UserError` where one has none."""
    model.zero_grad()
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    torch.manual_seed(_SEED)  # of dropout
    with autocast(config, tokens.device):
        loss = model.loss(tokens, targets)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise UserError(
                f"{name} in a model of type {model.config.model_type!r} gets no gradient, as training would expect: "
                "this kind of model is not trained"
            )
        gradients[name] = parameter.grad
    return gradients
