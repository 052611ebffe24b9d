"""Attention, and what a token may see: all of its row before it, or, where documents share a row,
its own document.

Shapes: B sequences, T tokens of each, H heads of width D, G heads of keys and values, each for H /
G heads in turn.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import Window, for_each_head
from model.linear_cross_entropy import IGNORE_INDEX

_LEAST_DOCUMENTS = 64
_USUAL_TOKENS = 128  # of the shortest documents that rows usually have, in the mean
_GROWTH = 4


class Documents(NamedTuple):
    """The documents in rows of tokens, for attention without a mask: B x T tokens end to end are so
    many sequences."""

    starts: Tensor  # (size + 1,), int32: where each begins, and the end; the last may be empty
    longest: int  # tokens, at most

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns what each token sees of its own document, up to itself, (B, T, H, D), from q (B,
        T, H, D), k and v (B, T, G, D). CUDA, fp16 or bf16."""
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (takes seconds, which a CPU need not wait)

        q_flat, k_flat, v_flat = (part.flatten(0, 1) for part in (q, k, v))  # (B x T, H or G, D)
        lengths = (self.starts, self.starts, self.longest, self.longest)
        are_shared = k.shape[2] != q.shape[2]
        # Causal
        y = varlen_attn(
            q_flat, k_flat, v_flat, *lengths, window_size=(-1, 0), enable_gqa=are_shared
        )
        assert isinstance(y, Tensor)
        return y.view(q.shape)


Mask = Tensor | Documents | None
"""The places of its row that a token may see: where a mask (B, 1, T, T) is true, its own document, or, without
one, all before it.
"""


def document_positions(token_ids: Tensor, targets: Tensor | None = None, *, eot_id: int) -> Tensor:
    """Returns positions (B, T) for token_ids (B, T), which restart at 0 at each end-of-text token,
    or at each BOS where that is `eot_id`: the tokenizer's `start_id`.

    An end-of-text token is the last target of its document and the first input of the next one: a
    document's first token is predicted from it alone, as in text generated without a prompt. A row
    may start in a document's middle. Where targets (B, T) are not counted, the rows have
    conversations. These begin with such a token that is not counted either; one that is counted
    ends an answer, which more turns may follow.
    """
    places = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
    begins = token_ids == eot_id
    if targets is not None and (uncounted := targets == IGNORE_INDEX).any():
        begins[:, 1:] &= uncounted[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def document_mask(positions: Tensor) -> Tensor:
    """Returns the attention mask (B, 1, T, T) of documents at `positions` (B, T), true where a
    token sees another."""
    places = torch.arange(positions.shape[1], device=positions.device)  # (T,)
    starts = places - positions
    same = starts[:, :, None] == starts[:, None, :]  # (B, T, T)
    return (same & (places <= places[:, None]))[:, None]


def packed_documents(positions: Tensor) -> Documents:
    """Returns the documents at `positions` (B, T), on a CPU, as their number decides a shape. Empty
    ones pad it to one size for all rows, as a compiled model is compiled for each."""
    begins = (positions == 0).flatten().nonzero().flatten()
    size = _padded(len(begins), num_tokens=positions.numel())
    starts = torch.full((size + 1,), positions.numel(), dtype=torch.int32)
    starts[: len(begins)] = begins
    return Documents(starts, positions.shape[1])


def _padded(num_documents: int, *, num_tokens: int) -> int:
    """Returns the number of documents in so many tokens, with empty ones: the same whatever rows
    are read, unless documents are very short. Four sizes more are enough for any."""
    usual = num_tokens // _USUAL_TOKENS
    size = max(_LEAST_DOCUMENTS, 1 << (usual - 1).bit_length())
    while size < num_documents:
        size *= _GROWTH
    return size


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    window: Window | None,
    mask: Mask,
    dropout: float,
) -> Tensor:
    """Returns what each token sees, (B, T, H, D), from q (B, T, H, D), k and v (B, T, G, D); scores
    are scaled by 1 / sqrt(D)."""
    if window is not None:
        return window.attend(layer, *(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    if isinstance(mask, Documents):
        return mask.attend(q, k, v)
    if not _shares_heads(q, mask):
        k, v = (for_each_head(part, q.shape[2], dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H or G, T, D)
    are_shared = k.shape[1] != q.shape[1]
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=are_shared
    )
    return y.transpose(1, 2)


def _shares_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Reports whether a head of keys and values stays one in memory for all heads that share it:
    FlashAttention can.

    PyTorch's other kernels on GPUs, for fp32 or with a mask, cannot: they would leave the product
    to operations that keep all scores. On CPUs, gradients of keys and values would be summed in
    another order, and earlier runs' bits change.
    """
    return q.is_cuda and q.dtype is torch.bfloat16 and mask is None
