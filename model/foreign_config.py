"""The shape of a decoder that transformers computes: the content of its config.json, and what
follows from it.

`GPT` computes two shapes with code of its own; any other causal language model is transformers' own
module (`model.decoders.foreign`). This module imports transformers and PyTorch only when it is asked for
something that a config.json alone does not tell.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from model.adapters.lora import Adapter, chosen_targets, linear_layers, put_into, stored_name
from model.architecture import LLAMA, KeptValues
from model.tables import pip_line
from raymill.errors import UserError

if TYPE_CHECKING:
    from torch import nn

FIRST_VERSION, NEXT_MAJOR = (5, 24), (6, 0)
"""The versions of transformers whose modules are trained, as in the extra `hf`."""

_WITHOUT_POSITIONS = 2048
"""The context of a model that has no number of positions, as with ALiBi: the one that BLOOM was
trained with."""

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k")
_EXPERT = ".experts."
_TOKEN_IDS = ("bos_token_id", "eos_token_id")
_OF_CHECKPOINTS = frozenset(
    ("architectures", "dtype", "torch_dtype", "transformers_version", *_TOKEN_IDS)
)
"""Keys in which a checkpoint's config.json may differ: the module's name, how weights are stored, and
the tokenizer's ids."""

_NOT_DETERMINISTIC = " does not have a deterministic implementation"  # torch's words on a GPU
_LONGEST_TEXT = 400  # of transformers' own, in a refusal

_DROPS_LAYERS = "leaves layers out at random, whose gradients then do not exist; set it to 0"
_NOT_EXACT = {
    "layerdrop": _DROPS_LAYERS,
    "layer_drop": _DROPS_LAYERS,
    "output_router_logits": "adds a loss over a batch's routing, which is not trained; set it to false",
    "rescale_every": "divides the stored weights too, in validation; set it to 0, which computes the same",
}
"""Settings that are refused where they are set, and why."""

_DROPOUT = re.compile(r"dropout|pdrop|drop_rate")
_OF_ANOTHER_HEAD = re.compile(r"classifier|summary")


class ForeignModelError(UserError):
    """transformers is missing, or has no module for this config.json that can be trained
    exactly."""


@dataclass(frozen=True)
class ForeignConfig:
    """A causal language model of transformers, perhaps with an adapter. Two are equal if their
    config.json, and their adapters', say the same."""

    content: str
    """config.json, with sorted keys: a text, as a dictionary has no hash."""

    adapter: Adapter | None = None
    """The adapter beside frozen weights; None where all weights are trained."""

    by_transformers: ClassVar[bool] = True

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Raises `ForeignModelError` for what transformers cannot compute, or raymill not train."""
        config = cls(json.dumps(values, sort_keys=True))
        config.refuse_what_is_not_exact()
        return config

    @property
    def values(self) -> dict[str, Any]:
        """The content of config.json."""
        values: dict[str, Any] = json.loads(self.content)
        return values

    @property
    def hf(self) -> Any:
        """transformers' own config, with its defaults. Nothing changes it."""
        return _parsed(self.content)

    def refuse_what_is_not_exact(self) -> None:
        """Raises `ForeignModelError`, naming the setting."""
        if self.values.get("quantization_config"):
            raise ForeignModelError(
                "config.json: quantization_config is set; expected weights of full precision, which training needs"
            )
        if self.hf.is_encoder_decoder or self.hf.get_text_config() is not self.hf:
            raise ForeignModelError(
                f"config.json: model_type {self.model_type!r} is not a decoder of text alone; name the config.json of "
                "its text model"
            )
        for name, reason in _NOT_EXACT.items():
            if getattr(self.hf, name, 0):
                raise ForeignModelError(
                    f"config.json: model_type {self.model_type!r}: {name} {reason}"
                )

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type"))

    @property
    def class_name(self) -> str:
        """The name of transformers' module, by which vLLM knows that it generates."""
        return str(imported().MODEL_FOR_CAUSAL_LM_MAPPING[type(self.hf)].__name__)

    @property
    def vocab_size(self) -> int:
        """The rows of the embedding; the tokenizer may have fewer ids."""
        return int(self.hf.vocab_size)

    @property
    def n_positions(self) -> int:
        """The context length in tokens."""
        longest = max(0, self._number("max_position_embeddings", 0))  # XLNet's is -1
        return int(longest or self.values.get("seq_length") or _WITHOUT_POSITIONS)

    @property
    def n_layer(self) -> int:
        return self._number("num_hidden_layers")

    @property
    def n_embd(self) -> int:
        return self._number("hidden_size")

    @property
    def n_head(self) -> int:
        """The heads of a layer; 0 where no layer has attention, as in Mamba."""
        return self._number("num_attention_heads", 0)

    @property
    def num_kv_heads(self) -> int:
        return self._number("num_key_value_heads", 0) or self.n_head

    @property
    def head_dim(self) -> int:
        """The width of a head; 0 where there are none."""
        return self._number("head_dim", 0) or (self.n_head and self.n_embd // self.n_head)

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def ffn_width(self) -> int:
        """The width of the feed-forward layer that a token passes: of its experts together."""
        dense = self._number("intermediate_size", 0) or 4 * self.n_embd
        if not self.num_experts:
            return dense
        of_expert = self._number("moe_intermediate_size", 0) or dense
        return of_expert * self.num_active_experts

    @property
    def num_experts(self) -> int:
        """The experts of a layer; 0 where it has none."""
        return _first_number(self.hf, _NUM_EXPERTS)

    @property
    def num_active_experts(self) -> int:
        """The experts that compute a token."""
        return min(self.num_experts, _first_number(self.hf, _EXPERTS_OF_A_TOKEN) or 1)

    def _number(self, name: str, *default: int) -> int:
        """Raises `ForeignModelError` where each layer has its own, or the config none."""
        try:
            return int(getattr(self.hf, name, *default) or 0)
        except Exception as error:  # of several packages
            raise cannot_be(self, "read", error) from error

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(getattr(self.hf, "tie_word_embeddings", False))

    @property
    def dropout(self) -> float:
        """The largest dropout probability."""
        return max([0.0, *self._dropouts.values()])

    @property
    def _dropouts(self) -> dict[str, float]:
        probabilities: dict[str, float] = {}
        for name, value in self.hf.to_dict().items():
            is_dropout = _DROPOUT.search(name) and not _OF_ANOTHER_HEAD.search(name)
            if is_dropout and isinstance(value, float):
                probabilities[name] = value
        return probabilities

    @property
    def base(self) -> Self:
        """The model without its adapter."""
        return replace(self, adapter=None)

    def with_adapter(self, adapter: Adapter) -> Self:
        """Returns the model with an adapter beside the layers that it names, or if it names none,
        beside all linear layers of the blocks. Raises `AdapterError`."""
        layers = _linear_layers(empty_module(self.base), self)
        targets = chosen_targets(layers, adapter.targets)
        return replace(self, adapter=replace(adapter, targets=targets))

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that is trained by transformers' name, an adapter's by
        PEFT's, in the module's order; a tied head has none."""
        return dict(_parameter_shapes(self))

    @property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that an adapter stands on; none without one."""
        return {} if self.adapter is None else self.base.parameter_shapes

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.parameter_shapes.values()))

    @property
    def num_active_parameters(self) -> int:
        """The parameters that compute a token, frozen ones too: of a layer's experts only the ones
        that it is sent to."""
        active = 0 if self.adapter is None else self.base.num_active_parameters
        for name, shape in self.parameter_shapes.items():
            size = math.prod(shape)
            if self.num_experts and _EXPERT in name:
                size = size * self.num_active_experts // self.num_experts
            active += size
        return active

    def flops_per_token(self, seq_len: int) -> int:
        """Counts as `GPTConfig.flops_per_token` does, the experts of a token alone. Frozen weights
        have no gradient: 4 for each."""
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.n_embd
        attention = 12 * self.n_layer * self.n_head * self.head_dim * seq_len
        without_gradient = (
            0 if self.adapter is None else self.base.num_active_parameters - looked_up
        )
        return 6 * (self.num_active_parameters - looked_up) + attention - 2 * without_gradient

    @property
    def kept(self) -> KeptValues:
        """Values that a block keeps of each token for backward. It counts as one of Llama's, with the
        experts that a token is sent to: what it really keeps is not known before it has run."""
        return LLAMA.kept

    def as_settings(self) -> dict[str, Any]:
        """Returns what makes two models differ, by name."""
        shape = {name: value for name, value in self.values.items() if name not in _OF_CHECKPOINTS}
        return shape if self.adapter is None else shape | {"adapter": self.adapter}

    def with_vocabulary(self, num_ids: int) -> Self:
        """Returns the model, whose embedding may have more rows than a tokenizer of so many ids
        needs. Raises `ValueError` where it has fewer."""
        if num_ids > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {num_ids} ids and config.json vocab_size {self.vocab_size}, expected at "
                "least as many: name the model's own tokenizer, or lower data.vocab_size"
            )
        return self

    def with_context(self, num_tokens: int) -> Self:
        """Returns the model as one with a context of at most so many tokens."""
        if num_tokens >= self.n_positions:
            return self
        name = self.hf.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        values = self.values | {name: num_tokens}
        return replace(self, content=json.dumps(values, sort_keys=True))

    def narrowed(self) -> Self:
        """Returns the model with few layers (`shortened`) and few tokens, for a test: as wide as it
        is, as a narrower one may not exist."""
        return self.shortened()._with({"vocab_size": 64, "pad_token_id": None})

    def shortened(self) -> Self:
        """Returns the model with few layers, one of each kind if their kinds take turns."""
        values = self.hf.to_dict()
        kinds = _kinds(values, self.n_layer)
        num_layers = min(self.n_layer, max(2, 1 + max(map(kinds.index, kinds))))
        for name, value in values.items():
            if isinstance(value, list) and len(value) == self.n_layer:
                values[name] = value[:num_layers]
        layers = self.hf.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return replace(self, content=json.dumps(values | {layers: num_layers}, sort_keys=True))

    @property
    def num_layer_kinds(self) -> int:
        return len(set(_kinds(self.hf.to_dict(), self.n_layer)))

    def without_dropout(self) -> Self:
        return self._with(dict.fromkeys(self._dropouts, 0.0))

    def _with(self, changes: Mapping[str, Any]) -> Self:
        content = json.dumps(self.hf.to_dict() | changes, sort_keys=True)
        return replace(self, content=content)


def _first_number(config: Any, names: tuple[str, ...]) -> int:
    numbers = [getattr(config, name, None) for name in names]
    return next((int(number) for number in numbers if number), 0)


def _kinds(values: Mapping[str, Any], num_layers: int) -> list[str]:
    """Returns the kind of each layer: what the lists say that have a value for each."""
    lists = [one for one in values.values() if isinstance(one, list) and len(one) == num_layers]
    return [json.dumps([one[layer] for one in lists]) for layer in range(num_layers)]


@functools.cache
def _parsed(content: str) -> Any:
    transformers = imported()
    values = json.loads(content)
    kind = values.get("model_type")
    if kind not in list(transformers.CONFIG_MAPPING):  # it may be a list, which has no hash
        raise _no_causal_model(kind)
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # its checks raise classes of several packages
        raise ForeignModelError(f"config.json: model_type {kind!r}: {_in_words(error)}") from error


@functools.cache
def _parameter_shapes(config: ForeignConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, weights in empty_module(config).named_parameters():
        if config.adapter is None:
            shapes.append((name, tuple(weights.shape)))
        elif weights.requires_grad:
            shapes.append((stored_name(name), tuple(weights.shape)))
    return tuple(shapes)


def layers_of(module: "nn.Module", config: ForeignConfig) -> tuple[str, "nn.ModuleList"]:
    """Returns the name of the decoder's layers, and these."""
    from torch import nn  # noqa: PLC0415 (takes a second, which reading a config.json need not)

    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == config.n_layer:
            return name, part
    raise ForeignModelError(
        f"config.json: model_type {config.model_type!r} has no list of {config.n_layer} layers, which raymill would "
        "share out to workers"
    )


def _linear_layers(module: "nn.Module", config: ForeignConfig) -> "dict[str, nn.Module]":
    blocks, _ = layers_of(module, config)
    return linear_layers(module, blocks)


def imported() -> Any:
    """Returns transformers. Raises `ForeignModelError` where it is missing."""
    try:
        import transformers  # noqa: PLC0415 (optional, and takes a second)
    except ImportError as error:
        raise ForeignModelError(
            f"this model is computed by transformers, which is not installed ({error}): `{pip_line('hf')}`"
        ) from None
    return transformers


def require_version() -> None:
    """Raises `ForeignModelError` for a transformers whose modules are not trained. A config.json and
    the shapes of weights are read by others too, such as the one that vLLM brings."""
    transformers = imported()
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not FIRST_VERSION <= version < NEXT_MAJOR:
        raise ForeignModelError(
            f"transformers {transformers.__version__} is installed, expected at least "
            f"{'.'.join(map(str, FIRST_VERSION))} and below {NEXT_MAJOR[0]}: `{pip_line('hf')}`"
        )


def cannot_be(config: ForeignConfig, done: str, error: Exception) -> ForeignModelError:
    """Returns the refusal of a model with which transformers raises what it raises."""
    model, text = f"a model of type {config.model_type!r}", _in_words(error)
    if _NOT_DETERMINISTIC in text:
        operation = text.partition(_NOT_DETERMINISTIC)[0].split()[-1]
        return ForeignModelError(
            f"{model} needs {operation}, which has no deterministic form on a GPU: nothing was trained. Train it "
            "on CPUs (--scaling.use-gpu false), or without equal bits (--train.exact false)"
        )
    version, what = imported().__version__, f"{type(error).__name__}: {text}"
    return ForeignModelError(
        f"config.json: {model} cannot be {done} with transformers {version} ({what}): it is not trained"
    )


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST_TEXT]


def _no_causal_model(kind: object) -> ForeignModelError:
    return ForeignModelError(
        f"config.json: model_type is {kind!r}, of which transformers {imported().__version__} has no causal language "
        "model; expected a decoder's, such as 'qwen3', 'gemma3_text' or 'olmo2'"
    )


def empty_module(config: ForeignConfig) -> "nn.Module":
    """Returns transformers' module without values, on torch's device `meta`, with the adapter if the
    model has one: then what is frozen requires no gradient. Code that comes with a model is never
    run.

    Attention is PyTorch's where that computes the model, and experts take turns: kernels that group
    them round otherwise on other machines.
    """
    import torch  # noqa: PLC0415 (takes a second, which reading a config.json need not)

    transformers = imported()
    if type(config.hf) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_causal_model(config.model_type)
    try:
        own_copy = type(config.hf).from_dict(config.hf.to_dict())  # a module writes into it
        with torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(
                own_copy, **module_options(config)
            )
    except Exception as error:  # of any class: a module of a config that does not suit it
        raise cannot_be(config, "made", error) from error
    assert isinstance(module, torch.nn.Module)
    if config.adapter is not None:
        put_into(module, config.adapter, _linear_layers(module, config))
    return module


def module_options(config: ForeignConfig) -> dict[str, Any]:
    """Returns how transformers makes a module."""
    import torch  # noqa: PLC0415 (as above)

    # PyTorch's attention leaves out what caps its logits
    has_caps = bool(getattr(config.hf, "attn_logit_softcapping", None))
    return {
        "trust_remote_code": False,
        "dtype": torch.float32,
        "attn_implementation": "eager" if has_caps else None,
        "experts_implementation": "eager",
    }
