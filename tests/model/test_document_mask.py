"""The document mask: a document in a packed row computes as if it were alone, and without the mask
nothing changes."""

import torch

from model.attention import document_mask, document_positions
from model.gpt import GPT
from model.linear_cross_entropy import IGNORE_INDEX
from tests.model.small_models import small_model

EOT = 96


def packed(*lengths: int, first_is_cut: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns a row (1, T + 1) of random documents, and its parts, each with the end-of-text token
    before it."""
    generator = torch.Generator().manual_seed(sum(lengths))
    end = torch.tensor([EOT])
    documents = [torch.randint(0, EOT, (length,), generator=generator) for length in lengths]
    parts = [torch.cat([end, document]) for document in documents]
    if first_is_cut:
        parts[0] = documents[0]
    return torch.cat([*parts, end])[None], parts


def test_positions_and_mask_by_example() -> None:
    positions = document_positions(torch.tensor([[5, 6, EOT, 7, EOT, EOT, 8]]), eot_id=EOT)
    mask = document_mask(positions)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    assert mask.shape == (1, 1, 7, 7)
    seen = [row.nonzero().flatten().tolist() for row in mask[0, 0]]
    assert seen == [[0], [0, 1], [2], [2, 3], [4], [5], [5, 6]]


def test_conversations_are_apart_but_their_turns_are_not() -> None:
    """An end-of-text token that is counted ends an answer; one that is not begins a conversation,
    as does BOS."""
    inputs = torch.tensor([[5, EOT, EOT, 6, 7, EOT, 8, 9]])
    targets = torch.tensor(
        [[EOT, IGNORE_INDEX, IGNORE_INDEX, 7, EOT, IGNORE_INDEX, IGNORE_INDEX, 3]]
    )
    assert document_positions(inputs, targets, eot_id=EOT).tolist() == [[0, 1, 0, 1, 2, 3, 4, 5]]
    assert document_positions(inputs, eot_id=EOT).tolist() == [[0, 0, 0, 1, 2, 0, 1, 2]]
    # A row within a long answer
    inside = torch.tensor([[EOT, 6, 7, 8]]), torch.tensor([[6, 7, 8, EOT]])
    assert document_positions(*inside, eot_id=EOT).tolist() == [[0, 1, 2, 3]]


def test_a_document_computes_as_if_it_were_alone(model: GPT) -> None:
    """Checks logits and gradients of documents that start inside the row, at its front, cut, and
    empty."""
    rows = [
        packed(*lengths, first_is_cut=cut)
        for lengths, cut in [((7, 12, 0, 9), True), ((1, 5, 21), False)]
    ]
    parameters = list(model.parameters())
    for tokens, parts in rows:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        positions = document_positions(inputs, eot_id=EOT)
        alone = torch.cat([model.logits(model(part[None]))[0] for part in parts])
        mask = document_mask(positions)
        logits = model.logits(model(inputs, positions=positions, mask=mask))[0]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
        loss = model.loss(inputs, targets, positions, mask)
        # Each document's last target, an end-of-text token, is the first input of the next one.
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        pieces = [targets[:, end - len(part) : end] for end, part in zip(ends, parts, strict=True)]
        losses = [model.loss(part[None], piece) for part, piece in zip(parts, pieces, strict=True)]
        torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-6, atol=0)
        expected = torch.autograd.grad(torch.stack(losses).sum(), parameters)
        for gradient, other in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)
        # Unmasked they do see each other
        assert (model.loss(inputs, targets) - loss).abs().item() > 1e-2


def test_without_an_end_the_mask_is_the_causal_one() -> None:
    model = small_model().double()
    tokens = torch.randint(0, EOT, (2, 31), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = document_positions(inputs, targets, eot_id=EOT)
    masked = model.loss(inputs, targets, positions, document_mask(positions))
    torch.testing.assert_close(masked, model.loss(inputs, targets))
