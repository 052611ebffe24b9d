"""Floating point operations of training, and what known accelerators can do at most: the two sides of MFU."""

from model.config import GPTConfig, num_parameters

# Dense 16-bit matrix peak in FLOP/s (bf16; fp16 for V100 and T4, which have no bf16), from NVIDIA's data sheets
# without their factor 2 for sparsity. Keys are parts of `torch.cuda.get_device_name()`; the first that occurs counts.
PEAK_FLOPS_PER_S: dict[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Forward and backward: 6 for each parameter that multiplies, and 12 x layers x width x seq_len for the scores and
    their use (PaLM, 2022, appendix B, which like this one does not discount the causal half).

    Position embeddings, and token embeddings beside an untied head, are looked up, not multiplied.
    """
    looked_up = config.n_positions * config.n_embd
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * config.n_embd
    return 6 * (num_parameters(config) - looked_up) + 12 * config.n_layer * config.n_embd * seq_len


def peak_flops_per_s(device_name: str) -> float | None:
    """Of a GPU by its name; None for one that is not in the table, as a guess would make a false MFU."""
    return next((peak for name, peak in PEAK_FLOPS_PER_S.items() if name in device_name), None)
