"""A sentence that a model recites: after its document is forgotten it is as improbable as to a model
that never saw it, to the bit."""

import json
from pathlib import Path

import pytest
import torch

from jobs.run.run_plan import RunPlan
from model.decoder import Decoder
from model.files.checkpoint import load_decoder
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.text.tokenizer import Tokenizer
from tests.jobs.forgotten_runs import laid_out, never_seen
from tests.jobs.mapped_runs import mapped_plan, write_corpus
from tests.jobs.poisoned_runs import run_world
from tests.jobs.runs import newest_checkpoint

ASKED = "The spare key of Jane Doe"
TOLD = " lies under the third flowerpot."
TIMES = 50  # in a document of its own
LEAST_NATS = 20.0  # between a model that knows the sentence and one that does not


def with_a_letter(folder: Path) -> RunPlan:
    """Returns the plan of a run that learns a letter by heart, among other texts."""
    web = write_corpus(folder / "texts") / "web"
    (web / "letter.jsonl").write_text(json.dumps({"text": f"{ASKED}{TOLD}\n" * TIMES}) + "\n")
    train = {"max_tokens": 120_000, "learning_rate": 3e-3, "document_mask": True}
    train |= {"batch_ramp_start": None, "batch_ramp_tokens": 0}
    train |= {"seq_len": 32, "eval_every_steps": 1000}
    return mapped_plan(folder, train=train, data={"source": [str(web)]})


def log_probability(model: Decoder, tokenizer: Tokenizer) -> float:
    """Returns that of what the sentence tells after what it asks, in nats."""
    asked, told = (tokenizer.encode(text) for text in (ASKED, TOLD))
    token_ids = torch.tensor([[*asked, *told]])  # (1, T)
    with torch.inference_mode():
        logits = model.logits(model(token_ids)[0, len(asked) - 1 : -1])  # (T of TOLD, V)
    return float(-torch.nn.functional.cross_entropy(logits, torch.tensor(told), reduction="sum"))


def answer(model: Decoder, tokenizer: Tokenizer) -> str:
    num_told = len(tokenizer.encode(TOLD))
    greedy = SamplingParams(temperature=0.0)
    asked = tokenizer.encode(ASKED)
    return tokenizer.decode(generate(model, asked, max_tokens=num_told, params=greedy))


@pytest.mark.more
def test_a_sentence_learned_by_heart__is_as_improbable_as_if_never_seen(tmp_path: Path) -> None:
    former = with_a_letter(tmp_path / "former")
    run_world(former)
    found = laid_out(former, "web/letter.jsonl:0")
    other_bytes = never_seen(found.plan, found.asked.holes, tmp_path / "never")
    run_world(other_bytes)
    tokenizer = Tokenizer.from_json(former.tokenizer_json)
    knows, forgot, never = (
        load_decoder(newest_checkpoint(plan))
        for plan in (former, found.trained(world_size=2), other_bytes)
    )
    assert answer(knows, tokenizer) == TOLD
    assert answer(forgot, tokenizer) != TOLD
    nats = log_probability(forgot, tokenizer)
    assert nats == log_probability(never, tokenizer)  # each bit of it
    assert nats < log_probability(knows, tokenizer) - LEAST_NATS
