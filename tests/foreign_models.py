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

QUICK = ("qwen3", "qwen3_moe", "gemma3_text")
"""Those that every run of the tests looks at: a plain one, one of experts, one with a tied head and
windows."""

WITH_DROPOUT = ("falcon", "bloom")

UNROUNDED = ("qwen3_moe", "mixtral", "falcon")
"""Those with matrices outside linear modules: of experts, and with a product of their own."""


def small(family: str, **changes: Any) -> ForeignConfig:
    """Returns the family's small model."""
    return ForeignConfig.of({"model_type": family, **_SHAPE, **FAMILIES[family], **changes})
