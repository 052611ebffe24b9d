"""Documents packed into one row that see nothing of each other.

An end-of-text token is the last target of its document and the first input of the next one: a document's first token
is predicted from the end-of-text token alone, as when text is generated without a prompt. What a row starts with, up
to its first end-of-text token, is the rest of a document.
"""

import torch
from torch import Tensor


def document_mask(token_ids: Tensor, *, eot_id: int) -> tuple[Tensor, Tensor]:
    """Of token_ids (B, T): positions (B, T), which restart at 0 at each end-of-text token, and the attention mask
    (B, 1, T, T), true where a token sees another: in its own document, up to itself."""
    places = torch.arange(token_ids.shape[1], device=token_ids.device)  # (T,)
    starts = torch.where(token_ids == eot_id, places, 0).cummax(dim=1).values  # (B, T), of each token's document
    same = starts[:, :, None] == starts[:, None, :]  # (B, T, T)
    return places - starts, (same & (places <= places[:, None]))[:, None]
