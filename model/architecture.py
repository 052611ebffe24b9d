"""The architectures: parameters, counts, and names elsewhere. One frozen record for GPT-2
and one for Llama.

The setting `model.architecture` names a record, and whoever needs to know one asks it. Another
architecture is a record here, and its modules in a file beside `model.gpt` and `model.llama`. This
module does not import PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

ArchitectureName = Literal["gpt2", "llama"]

Activation = Literal["gelu", "gelu_exact", "relu", "swiglu"]
"""`gelu` is GPT-2's tanh approximation (`gelu_new` in Hugging Face), `gelu_exact` the erf form,
`swiglu` is Llama's."""

Dim = Literal["C", "3C", "F", "G", "V", "n_positions"]
"""The length of one side of a parameter: C = n_embd, F = ffn_width, G = kv_width, V =
vocab_size."""


class Initial(Enum):
    """The values with which a parameter begins."""

    ZEROS = auto()  # biases
    ONES = auto()  # the weights of norms
    NORMAL = auto()  # with a standard deviation of `initializer_range`
    # The same, divided by the root of the number of projections into the residual stream
    INTO_THE_STREAM = auto()


@dataclass(frozen=True)
class Fused:
    """How a parameter is made of several matrices that lie side by side."""

    axis: int  # along which it is cut into them
    dims: tuple[Dim, ...]  # the side of each along that axis


@dataclass(frozen=True)
class Parameter:
    """One parameter, or one of each block. A block's parameter that has two sides is a hidden
    matrix: it multiplies activations."""

    dims: tuple[Dim, ...]
    initial: Initial
    is_looked_up: bool = False  # rows are taken from it, and nothing is multiplied
    fused: Fused | None = None


def _normal(*dims: Dim) -> Parameter:
    return Parameter(dims, Initial.NORMAL)


def _into_the_stream(*dims: Dim) -> Parameter:
    return Parameter(dims, Initial.INTO_THE_STREAM)


def _bias(dim: Dim) -> Parameter:
    return Parameter((dim,), Initial.ZEROS)


_NORM = Parameter(("C",), Initial.ONES)

# GPT-2's, (in, out)
_QUERY_KEY_VALUE = Parameter(("C", "3C"), Initial.NORMAL, fused=Fused(1, ("C", "C", "C")))

HEAD = _normal("V", "C")
"""The output head, where the token embedding is not the same."""


@dataclass(frozen=True)
class ParameterNames:
    """The parameters in the order of `GPT.named_parameters`. An output head of its own comes last,
    as lm_head."""

    prefix: str  # of all that follow
    before: Mapping[str, Parameter]  # the blocks
    blocks: str  # with a number, the prefix of each
    block: Mapping[str, Parameter]
    norms: Mapping[str, str]  # of a block, in order, each with the module that reads it
    after: Mapping[str, Parameter]
    tied: str  # to a head that is not one of its own: the token embedding


@dataclass(frozen=True)
class StageNames:
    """Names in `raymill inspect` of the values on a batch's way to the loss."""

    norm: str
    embeddings: str  # what they are made of
    # A block's query, key and value: name, dims, how many there are
    projections: tuple[tuple[str, str, int], ...]
    has_gate: bool  # beside what the feed-forward layer has in its middle


@dataclass(frozen=True)
class KeptValues:
    """Values that a block keeps of each token for its backward pass."""

    of_norms: int  # fp32 values C wide: what norms read, and a second one where they keep it
    # Values C wide more, where projections do not share the rounded inputs of their products
    own_inputs: int
    of_ffn: int  # values F wide
    norm_numbers: int  # fp32


@dataclass(frozen=True)
class HfKeys:
    """A model of this architecture in Hugging Face's config.json and files. Its model_type is our
    name."""

    class_name: str
    names: dict[str, str]  # our settings by theirs, in the order in which they are written
    copies: dict[str, str]  # the same, written after those and never read
    fixed: dict[str, Any]  # settings that `GPT` does not have, with the only value that it computes
    defaults: dict[str, Any]  # our settings where config.json does not say
    buffers: tuple[str, ...]  # endings of tensors that are no parameters
    has_all_sizes: bool  # a size that follows from others stands there too


@dataclass(frozen=True)
class KernelNames:
    """The CPU kernels' arguments besides a block's norms, in the order of
    model/kernels/native/decoder.cpp."""

    number: int  # of the architecture that has such blocks
    matrices: tuple[tuple[str, ...], ...]  # those of one tuple lie side by side, as one matrix


@dataclass(frozen=True)
class GgufLayout:
    """How llama.cpp takes a model, where that is not as Hugging Face stores it."""

    activation: Activation | None = None  # the only one that it computes
    turns_neighbors: bool = False  # by rotary positions, instead of values half a head apart
    transposed: tuple[str, ...] = ()  # endings of matrices that are (in, out)
    has_rotation: bool = True


@dataclass(frozen=True, eq=False)
class Architecture:
    """An architecture, but for the modules that compute it."""

    name: ArchitectureName
    activations: tuple[Activation, ...]
    settings: frozenset[str]  # of `GPTConfig`, which only this architecture has
    has_rotation: bool  # positions turn queries and keys; without it they have an embedding
    ffn_width: Callable[[int], int]  # from n_embd, where n_inner does not say
    parameters: ParameterNames
    stages: StageNames
    kept: KeptValues
    hf: HfKeys
    gguf: GgufLayout
    kernels: KernelNames

    @property
    def groups_heads(self) -> bool:
        """Whether several heads may share keys and values."""
        return "n_kv_head" in self.settings


def _four_times(n_embd: int) -> int:
    return 4 * n_embd


def _two_thirds_of_four_times(n_embd: int) -> int:
    """Returns 8/3, which makes three matrices as large as two of 4 times, rounded up to a multiple
    of 64."""
    return -(-8 * n_embd // 3 // 64) * 64


GPT2 = Architecture(
    name="gpt2",
    activations=("gelu", "gelu_exact", "relu"),
    settings=frozenset(),
    has_rotation=False,
    ffn_width=_four_times,
    parameters=ParameterNames(
        prefix="transformer",
        before={
            "wte.weight": _normal("V", "C"),
            "wpe.weight": Parameter(("n_positions", "C"), Initial.NORMAL, is_looked_up=True),
        },
        blocks="h",
        block={  # a projection's weight is (in, out)
            "ln_1.weight": _NORM,
            "ln_1.bias": _bias("C"),
            "attn.c_attn.weight": _QUERY_KEY_VALUE,
            "attn.c_attn.bias": _bias("3C"),
            "attn.c_proj.weight": _into_the_stream("C", "C"),
            "attn.c_proj.bias": _bias("C"),
            "ln_2.weight": _NORM,
            "ln_2.bias": _bias("C"),
            "mlp.c_fc.weight": _normal("C", "F"),
            "mlp.c_fc.bias": _bias("F"),
            "mlp.c_proj.weight": _into_the_stream("F", "C"),
            "mlp.c_proj.bias": _bias("C"),
        },
        norms={"ln_1": "attn", "ln_2": "mlp"},
        after={"ln_f.weight": _NORM, "ln_f.bias": _bias("C")},
        tied="wte.weight",
    ),
    stages=StageNames(
        norm="LayerNorm",
        embeddings="of tokens and positions, added",
        projections=(("query, key, value", "B T 3C", 1),),
        has_gate=False,
    ),
    kept=KeptValues(of_norms=2, own_inputs=0, of_ffn=2, norm_numbers=4),
    hf=HfKeys(
        class_name="GPT2LMHeadModel",
        names={
            "vocab_size": "vocab_size",
            "n_positions": "n_positions",
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "n_inner": "n_inner",
            "tie_word_embeddings": "tie_word_embeddings",
            "layer_norm_epsilon": "layer_norm_epsilon",
            "initializer_range": "initializer_range",
            "activation_function": "activation_function",
            "resid_pdrop": "dropout",
        },
        copies={"embd_pdrop": "dropout", "attn_pdrop": "dropout"},
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        defaults={"dropout": 0.1},
        buffers=(".attn.bias", ".attn.masked_bias"),
        has_all_sizes=False,
    ),
    gguf=GgufLayout(
        activation="gelu",
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        has_rotation=False,
    ),
    kernels=KernelNames(
        number=0,
        matrices=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
)

LLAMA = Architecture(
    name="llama",
    activations=("swiglu",),
    settings=frozenset(("n_kv_head", "rope_theta", "rope_factor", "rope_original_positions")),
    has_rotation=True,
    ffn_width=_two_thirds_of_four_times,
    parameters=ParameterNames(
        prefix="model",
        before={"embed_tokens.weight": _normal("V", "C")},
        blocks="layers",
        block={  # a projection's weight is (out, in)
            "input_layernorm.weight": _NORM,
            "self_attn.q_proj.weight": _normal("C", "C"),
            "self_attn.k_proj.weight": _normal("G", "C"),
            "self_attn.v_proj.weight": _normal("G", "C"),
            "self_attn.o_proj.weight": _into_the_stream("C", "C"),
            "post_attention_layernorm.weight": _NORM,
            "mlp.gate_proj.weight": _normal("F", "C"),
            "mlp.up_proj.weight": _normal("F", "C"),
            "mlp.down_proj.weight": _into_the_stream("C", "F"),
        },
        norms={"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"},
        after={"norm.weight": _NORM},
        tied="embed_tokens.weight",
    ),
    stages=StageNames(
        norm="RMSNorm",
        embeddings="of tokens",
        projections=(("query", "B T C", 1), ("key, value", "B T G", 2)),
        has_gate=True,
    ),
    kept=KeptValues(of_norms=4, own_inputs=3, of_ffn=4, norm_numbers=2),
    hf=HfKeys(
        class_name="LlamaForCausalLM",
        names={
            "vocab_size": "vocab_size",
            "max_position_embeddings": "n_positions",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_kv_head",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "tie_word_embeddings": "tie_word_embeddings",
            "attention_dropout": "dropout",
            "rms_norm_eps": "layer_norm_epsilon",
            "initializer_range": "initializer_range",
        },
        copies={},
        fixed={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
        },
        defaults={
            "activation_function": "swiglu",
            "vocab_size": 32000,
            "n_positions": 2048,
            "n_layer": 32,
            "n_head": 32,
            "n_embd": 4096,
            "n_inner": 11008,
            "layer_norm_epsilon": 1e-6,
            "tie_word_embeddings": False,
        },
        buffers=(".rotary_emb.inv_freq",),
        has_all_sizes=True,
    ),
    gguf=GgufLayout(activation="swiglu", turns_neighbors=True),
    kernels=KernelNames(
        number=1,
        matrices=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {record.name: record for record in (GPT2, LLAMA)}
"""By the word of the setting `model.architecture`, which is Hugging Face's model_type too."""
