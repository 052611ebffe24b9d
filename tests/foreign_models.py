"""Families of models that transformers computes, at shapes small enough for a test."""

from typing import Any

from model.foreign_config import ForeignConfig

VOCAB = 301

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8}
_DELTA_KINDS = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_KINDS = ["sliding_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": _KINDS},
    "olmo2": {},
    "olmo3": {"sliding_window": 8, "layer_types": _KINDS},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "smollm3": {},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "gpt_neox": {},
    "falcon": {"attention_dropout": 0.1, "hidden_dropout": 0.1},
    "bloom": {"n_layer": 3, "hidden_dropout": 0.1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "llama": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "gpt2": {
        "n_layer": 3,
        "n_embd": 48,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 80,
        "activation_function": "silu",
        "scale_attn_by_inverse_layer_idx": True,
        **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    },
}
"""By transformers' model_type: what its config.json says besides the common shape."""

ON_CPUS_ALONE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **_MAMBA,
    },
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 24, "n_groups": 1},
    "olmo_hybrid": {"layer_types": _DELTA_KINDS, **_DELTA},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0},
    "qwen3_5_text": {"head_dim": 16, "layer_types": _DELTA_KINDS, **_DELTA},
    "qwen3_next": {
        "head_dim": 16,
        "layer_types": _DELTA_KINDS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **_DELTA,
    },
}
"""Those that need operations which have no deterministic form on a GPU (`cuda_alerts`)."""

ROFORMER = {**_SHAPE, "model_type": "roformer", "embedding_size": 48, "is_decoder": True}
"""A decoder whose sinusoidal positions transformers freezes."""

QUICK = ("qwen3", "qwen3_moe", "gemma3_text")
"""Those that every run of the tests looks at: a plain one, one of experts, one with a tied head and
windows."""

WITH_DROPOUT = ("falcon", "bloom")

WITHOUT_DOCUMENTS = ("bloom", "mamba", *ON_CPUS_ALONE)
"""Those whose tokens see the documents before their own: `train.document_mask` is refused."""

UNROUNDED = (
    "qwen3_moe",
    "mixtral",
    "falcon",
    "mamba",
    *[name for name in ON_CPUS_ALONE if name != "opt"],
)
"""Those with matrices outside linear modules: of experts, of convolutions, and with a product of
their own."""


def small(family: str, **changes: Any) -> ForeignConfig:
    """Returns the family's small model."""
    own = (FAMILIES | ON_CPUS_ALONE)[family]
    return ForeignConfig.of({"model_type": family, **_SHAPE, **own, **changes})
