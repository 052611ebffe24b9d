"""Floating point operations of training: one side of MFU, whose other side is what the GPU can do (`gpus.py`)."""

from model.config import GPTConfig, num_parameters


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Forward and backward: 6 for each parameter that multiplies, and 12 x layers x width x seq_len for the scores and
    their use (PaLM, 2022, appendix B, which like this one does not discount the causal half).

    Position embeddings, and token embeddings beside an untied head, are looked up, not multiplied.
    """
    looked_up = config.n_positions * config.n_embd
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * config.n_embd
    return 6 * (num_parameters(config) - looked_up) + 12 * config.n_layer * config.n_embd * seq_len
