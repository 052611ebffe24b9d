"""A causal language model whose module is transformers' own, as a `Decoder`.

Names, layers, head and initial weights are the module's: nothing here knows a family of models.

Shapes: B sequences, T tokens of each, C = n_embd, V vocabulary, N = B x T, K tokens of a chunk.
"""

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import Mask
from model.decoder import Decoder
from model.decoders.foreign_layer import Layer
from model.foreign_config import (
    ForeignConfig,
    ForeignModelError,
    cannot_be,
    empty_module,
    imported,
    layers_of,
    require_version,
)
from model.kv_cache import Cache, ModuleCache
from model.operations import is_of_compiler, is_out_of_memory
from model.shapes import CHUNK_TOKENS, GPU_CHUNK_TOKENS
from raymill.errors import UserError

_NUMBERED = re.compile(r"\D*\.\d+\.")  # as `raymill.state.flat_layout` finds a block's parameters


class ForeignModel(Decoder):
    """transformers' own module, whose parameters are on torch's device `meta` until `adopt`."""

    config: ForeignConfig

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config = config
        require_version()
        module = empty_module(config)
        _refuse_own_tensors(module)
        rule: Any = module._init_weights
        self._rule: Callable[[nn.Module], None] = rule
        # Its children and not itself, so that parameters have its names
        for name, child in module.named_children():
            self.add_module(name, child)
        inside, layers = layers_of(module, config)
        self._inside = f"{inside}."  # what the names of the layers' parameters begin with
        self._body_name, *self._parts = inside.split(".")
        self._has_computed = False
        self._layers = [Layer(layer) for layer in layers]
        for layer in self._layers:
            layer.module.forward = partial(_compute_layer, self, layer)
        self.rounds_matrices = all(_multiplies_alone(layer.module) for layer in self._layers)
        self._check_names()
        self._make_buffers()
        self._head = self._head_alone(module)

    @property
    def blocks(self) -> Sequence[Layer]:
        return self._layers

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The head's weight: a tied embedding too."""
        parameters: dict[nn.Parameter, None] = {}
        for name, child in self.named_children():
            if name != self._body_name:
                parameters |= dict.fromkeys(child.parameters())
        return [*parameters]

    @property
    def takes_positions(self) -> bool:
        """Whether it is told the positions of tokens, by which documents in a row are kept
        apart."""
        return "position_ids" in self._body_arguments

    @property
    def _body_arguments(self) -> Mapping[str, inspect.Parameter]:
        body = self.get_submodule(self._body_name)
        return inspect.signature(type(body).forward).parameters

    def forward(
        self,
        token_ids: Tensor,
        *,
        kv_cache: Cache | ModuleCache | None = None,
        positions: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Returns hidden states (B, T, C) after the final norm, from token_ids (B, T). Where
        positions (B, T) begin again, transformers begins another document, of which its own masks
        let no token see the one before."""
        assert mask is None, "transformers makes its own masks"
        # Workers refuse a model in their self-test: later their messages may fail in here too
        if self._has_computed or (dist.is_available() and dist.is_initialized()):
            return self._hidden_states(token_ids, kv_cache, positions)
        with refusing(self.config):
            hidden = self._hidden_states(token_ids, kv_cache, positions)
        self._has_computed = True
        return hidden

    def _hidden_states(
        self, token_ids: Tensor, kv_cache: Cache | ModuleCache | None, positions: Tensor | None
    ) -> Tensor:
        named: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        body = self.get_submodule(self._body_name)
        if kv_cache is None:
            hidden: Tensor = body(input_ids=token_ids, use_cache=False, **named)[0]
            return hidden
        assert isinstance(kv_cache, ModuleCache)
        output = body(input_ids=token_ids, use_cache=True, cache=kv_cache.states, **named)
        kv_cache.states = output.cache
        after_norm: Tensor = output[0]
        return after_norm

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V), at least fp32, from hidden (..., C), scaled or capped as the
        model does."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        logits: Tensor = self._head(inputs_embeds=rows, use_cache=False).logits  # (1, ..., V)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.view(*hidden.shape[:-1], -1)

    def loss_of(self, hidden: Tensor, targets: Tensor, *, scale: float = 1.0) -> Tensor:
        rows, labels = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        size = GPU_CHUNK_TOKENS if hidden.is_cuda else CHUNK_TOKENS
        has_gradient = torch.is_grad_enabled()
        total: Tensor = _HeadLoss.apply(
            self, size, labels, has_gradient, rows, *self.head_parameters
        )
        return total * scale

    def init_weights(self, seed: int) -> None:
        self.adopt(dict(initial_weights(self.config, seed)))

    def new_cache(self, num_tokens: int) -> ModuleCache | None:
        return ModuleCache() if "cache" in self._body_arguments else None

    def name_of(self, path: str) -> str:
        """Returns the name by which the parameter at a path in the module is known."""
        return path

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the tensors themselves the parameters, tied ones in all of their places; frozen
        parameters of the module stay frozen; constants, such as frequencies of rotary positions, go
        to their device."""
        places: dict[nn.Parameter, list[str]] = {}
        for path, parameter in nn.Module.named_parameters(self, remove_duplicate=False):
            places.setdefault(parameter, []).append(path)
        for parameter, paths in places.items():
            values = weights[self.name_of(paths[0])]
            adopted = nn.Parameter(values, requires_grad=parameter.requires_grad)
            for path in paths:
                place, _, last = path.rpartition(".")
                setattr(self.get_submodule(place), last, adopted)
        device = next(iter(weights.values())).device
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:  # frozen weights that are not there yet
                    module.register_buffer(name, buffer.to(device), persistent=False)

    def pieces(self) -> Iterator[tuple[str, nn.Module]]:
        """Yields what may be made one after the other: each layer, and each module around them that
        has parameters."""
        layers = {id(layer.module) for layer in self._layers}
        for name, module in self.named_modules():
            is_around = not name.startswith(self._inside)
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if id(module) in layers or (is_around and has_parameters):
                yield name, module

    def initialize(self, module: nn.Module) -> None:
        """Gives a module, and its parts, values by the model's own rule."""
        with refusing(self.config, "given new weights"), torch.no_grad(), torch.device("cpu"):
            module.apply(self._rule)

    def _check_names(self) -> None:
        """Raises `ForeignModelError` where a number in a parameter's name is not its layer's."""
        for name, _ in nn.Module.named_parameters(self):  # by its place, whatever it is stored as
            if bool(_NUMBERED.match(name)) != name.startswith(self._inside):
                raise ForeignModelError(
                    f"config.json: model_type {self.config.model_type!r} has layers beside those of its decoder, "
                    f"such as that of {name}, which raymill does not train"
                )

    def _head_alone(self, module: nn.Module) -> Callable[..., Any]:
        """Returns what computes the head alone, by the whole module's own code: a view of it, in
        which something else takes the place of its body."""
        head = copy.copy(module)
        head._modules = {**module._modules, self._body_name: _Given(self._parts)}
        hidden = torch.empty(1, 1, self.config.n_embd, device="meta")
        try:
            shape = head(inputs_embeds=hidden, use_cache=False).logits.shape
            if shape != (1, 1, self.config.vocab_size):
                raise ValueError(f"its logits have the shape {tuple(shape)}")
        except Exception as error:  # of any class
            raise ForeignModelError(
                f"config.json: the head of model_type {self.config.model_type!r} cannot be computed alone ({error}), "
                "as raymill does so that all logits never exist at a time"
            ) from error
        return head.__call__

    def _make_buffers(self) -> None:
        """Computes the constants that layers share, such as the frequencies of rotary positions."""
        for name, module in self.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            if not buffers:
                continue
            kept = [buffer for buffer in module.state_dict() if buffer in buffers]
            if kept:
                raise ForeignModelError(
                    f"config.json: model_type {self.config.model_type!r} keeps {name}.{kept[0]} beside its parameters, "
                    "which raymill would neither train nor store"
                )
            for buffer, values in buffers.items():
                empty = torch.empty(values.shape, dtype=values.dtype, device="cpu")
                module.register_buffer(buffer, _marked(empty), persistent=False)
            with refusing(self.config, "made"), torch.no_grad(), torch.device("cpu"):
                self._rule(module)
            for buffer, values in module.named_buffers(recurse=False):
                _require_values(f"{name}.{buffer}", values)


@contextmanager
def refusing(config: ForeignConfig, done: str = "computed") -> Iterator[None]:
    """Lasts while transformers' code does something with a model for the first time, of which an
    exception of any class is a refusal. A device that fails or has no memory left is none, and
    kernels that cannot be compiled are not the model's own."""
    try:
        yield
    except (UserError, torch.AcceleratorError):
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_of_compiler(error):
            raise
        raise cannot_be(config, done, error) from error


def _compute_layer(model: ForeignModel, layer: Layer, x: Tensor, *others: Any, **named: Any) -> Any:
    """Takes the place of a layer's own `forward`."""
    return layer.as_returned(model.ops.block(layer, x, layer.by_name(others) | named))


def _refuse_own_tensors(module: nn.Module) -> None:
    for name, _ in module.named_parameters(recurse=False):
        raise ForeignModelError(
            f"{type(module).__name__} has a parameter {name} outside its layers and its head, which raymill does not "
            "train"
        )


def _multiplies_alone(layer: nn.Module) -> bool:
    """Reports whether each matrix in a layer is the weight of a linear module, whose product alone
    reads it. Experts and modules with products of their own may read theirs in other ways."""
    kinds = (nn.Linear, imported().Conv1D)
    for module in layer.modules():
        has_matrix = any(one.dim() >= 2 for one in module.parameters(recurse=False))
        if has_matrix and type(module) not in kinds:
            return False
    return True


class _Given(nn.Module):
    """Takes the place of all but the head: what it is given are the hidden states. So does each
    part on the way to the layers, such as the decoder in OPT's model, which its head calls."""

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        return self if name in self.__dict__.get("_parts", ()) else super().__getattr__(name)

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> "_Hidden":
        return _Hidden([inputs_embeds])


class _Hidden(list[Tensor]):
    """The output of a body that has hidden states alone, whatever else a head would pass on."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def initial_weights(config: ForeignConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields fresh weights by the model's own rule, of which one layer is in memory at a time. Each
    piece draws from a generator of its own, on the CPU: the values depend on the seed alone."""
    model = ForeignModel(config)
    wanted = {name for name, _ in model.named_parameters()}
    for name, piece in model.pieces():
        is_layer = next(piece.children(), None) is not None
        piece.to_empty(device="cpu", recurse=is_layer)
        for parameter in piece.parameters():
            _marked(parameter.data)
        with seeded(f"weights:{seed}:{name}"):
            piece.apply(_as_constructed)
            model.initialize(piece)
        for short, parameter in piece.named_parameters():
            whole = f"{name}.{short}"
            _require_values(whole, parameter)
            if whole in wanted:
                yield whole, parameter.detach()
        piece.to("meta")


def _as_constructed(module: nn.Module) -> None:
    """Draws as PyTorch's constructors do, for what the model's rule leaves as they made it."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset) and type(module).__module__.startswith("torch.nn."):
        reset()


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """Lasts while the process's generator draws what a name says, and leaves it as it was."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest) >> 1)
        yield


def _marked(values: Tensor) -> Tensor:
    """Makes values recognizable as not set."""
    return values.fill_(torch.nan) if values.is_floating_point() else values.zero_()


def _require_values(name: str, values: Tensor) -> None:
    if bool(values.isnan().any()):
        raise ForeignModelError(
            f"transformers' rule for new weights leaves {name} without values; begin from weights that exist "
            "(train.init_from)"
        )


class _HeadLoss(torch.autograd.Function):
    """The summed cross-entropy of the model's own head, whose logits exist for a chunk of tokens at
    a time: each chunk is turned into its share of the gradients in the forward pass, as in
    `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        model: ForeignModel,
        chunk_tokens: int,
        targets: Tensor,
        with_grad: bool,
        hidden: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        losses: list[Tensor] = []
        grads_hidden: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(parameters)
        chunks = zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        for some, labels in chunks:
            with torch.set_grad_enabled(with_grad):
                h = some.detach().requires_grad_(with_grad)  # (K, C)
                loss = model.ops.head_losses(model, h, labels)  # (K,)
                of_chunk = loss.sum()
            losses.append(loss.detach())
            if not with_grad:
                continue
            of_hidden, *of_parameters = torch.autograd.grad(
                of_chunk, [h, *parameters], allow_unused=True
            )
            grads_hidden.append(of_hidden)
            for number, gradient in enumerate(of_parameters):
                before = sums[number]
                sums[number] = gradient if before is None else before.add_(gradient)
        if with_grad:
            ctx.save_for_backward(torch.cat(grads_hidden), *sums)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_times(ctx.saved_tensors, grads[0])


def _times(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Multiplies gradients, in place where one has memory of its own: that of a head is large."""
    storages = [None if one is None else one.untyped_storage().data_ptr() for one in gradients]
    products: list[Tensor | None] = []
    for one, storage in zip(gradients, storages, strict=True):
        if one is None:
            products.append(None)
        elif storages.count(storage) == 1 and 0 not in one.stride():
            products.append(one.mul_(factor))
        else:
            products.append(one * factor)
    return products
