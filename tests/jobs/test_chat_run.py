"""A model that is trained on conversations answers over HTTP, in its own template, and ends its
answers itself."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.settings.data import TextConfig
from cluster.settings.run import RunConfig, to_yaml
from cluster.settings.stages import EvaluateConfig
from cluster.storage.uris import split_uri
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.proof.replay_run import replay
from jobs.run.ledger import Ledger
from jobs.run.run_plan import RunPlan
from jobs.tokens.build_store import tokenize
from jobs.tokens.token_store import read_manifest
from jobs.tokens.train_tokenizer import load_tokenizer
from jobs.training.train_loop import train
from model.files.stored_tokenizer import load_tokenizer as tokenizer_in
from model.text.chat import Chat
from model.text.tokenizer import train_bpe
from tests.jobs.runs import newest_checkpoint
from tests.serving.endpoint_parts import replica_client

FACTS = {
    "2+3": "5",
    "7+1": "8",
    "9-4": "5",
    "sky?": "blue",
    "grass?": "green",
    "snow?": "white",
    "bye": "see you",
}
NUM_STEPS = 160
TEMPLATES = {
    "plain": None,
    "bos": None,  # with a post-processor that puts one before a text, as Llama 3's does
    "own": "{% for message in messages %}{% if message.role == 'system' and loop.index0 %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
}


def trained_with(fast: str, *more: str) -> pytest.MarkDecorator:
    """Runs a test with every template: one that is fast, others of `make test-more`, and those that
    are not named here as slow ones."""
    marks = {fast: [], **{name: [pytest.mark.more] for name in more}}
    names = [pytest.param(name, marks=marks.get(name, [pytest.mark.slow])) for name in TEMPLATES]
    return pytest.mark.parametrize("plan", names, indirect=True)


def asks(question: str, note: int = 3) -> list[dict[str, str]]:
    return [{"role": "system", "content": f"note {note}"}, {"role": "user", "content": question}]


def corpus(folder: Path) -> Path:
    """Writes conversations of one question and of two, each under many notes, so that both splits
    have every fact."""
    found, facts = [], list(FACTS.items())
    for note in range(24):
        for number, (question, answer) in enumerate(facts):
            messages = [*asks(question, note), {"role": "assistant", "content": answer}]
            if note % 2:
                again, second = facts[(number + note) % len(facts)]
                messages += [
                    {"role": "user", "content": again},
                    {"role": "assistant", "content": second},
                ]
            found.append(json.dumps({"messages": messages}))
    (folder / "facts.jsonl").write_text("\n".join(found))
    return folder / "facts.jsonl"


@pytest.fixture(scope="module")
def plan(
    request: pytest.FixtureRequest, ray_workers: int, tmp_path_factory: pytest.TempPathFactory
) -> RunPlan:
    """A run that has been trained, in this process, on what Ray's workers have tokenized."""
    folder, template = tmp_path_factory.mktemp(request.param), TEMPLATES[request.param]
    source = corpus(folder)
    backend = tokenizers.Tokenizer.from_str(
        train_bpe([source.read_text()], vocab_size=300).to_json().decode()
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"] if template else [])
    if request.param == "bos":
        backend.add_special_tokens(["<bos>"])
        added = [("<bos>", backend.token_to_id("<bos>"))]
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=added
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(backend.to_str())
    if template:
        (folder / "tokenizer" / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template})
        )
    tokenizer, _ = load_tokenizer(str(folder / "tokenizer"))
    config = RunConfig.model_validate(
        {
            "run_id": "chat",
            "model": {
                "preset": "tiny",
                "n_embd": 64,
                "n_positions": 80,
                "vocab_size": tokenizer.vocab_size,
            },
            "data": {
                "format": "chat",
                "source": str(source),
                "tokenizer": str(folder / "tokenizer"),
                "val_fraction": 0.1,
            },
            "train": {
                "max_tokens": NUM_STEPS * 16 * 64,
                "global_batch_size": 16,
                "micro_batch_size": 8,
                "seq_len": 64,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "document_mask": True,
                "eval_every_steps": NUM_STEPS,
                "hash_every_steps": 20,
            },
            "checkpoint": {"save_every_steps": NUM_STEPS},
            "scaling": {"max_workers": 1},
            "storage": {"uri": str(folder / "storage")},
        }
    )
    store, _ = split_uri(tokenize(config)["manifest"])
    plan = RunPlan(config, store.uri, tokenizer.to_json(), code_version="test")
    plan.run.write_bytes("config.yaml", to_yaml(config).encode())
    train(plan, rank=0, world_size=1)
    return plan


@pytest.mark.more
@trained_with("own", "plain")
def test_it_answers_and_stops_over_http(plan: RunPlan) -> None:
    async def answer(
        http: httpx.AsyncClient, messages: list[dict[str, str]], **asked: Any
    ) -> dict[str, Any]:
        body = {"model": "tiny", "messages": messages, "temperature": 0} | asked
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        assert "x-model-note" not in response.headers
        found: dict[str, Any] = response.json()
        return found

    async def check() -> None:
        folder = newest_checkpoint(plan)
        tokenizer = tokenizer_in(folder)
        assert tokenizer is not None
        async with replica_client(folder) as (http, _):
            assert (await http.get("/v1/models")).json()["data"][0]["chat_tuned"] is True
            for question, expected in FACTS.items():
                found = await answer(http, asks(question))
                assert found["choices"][0]["message"]["content"] == expected
                assert found["choices"][0]["finish_reason"] == "stop"
                # Its end is a token, which is counted and is not text.
                assert found["usage"]["completion_tokens"] == len(tokenizer.encode(expected)) + 1
            several = await answer(http, asks("sky?"), n=3)
            assert [choice["message"]["content"] for choice in several["choices"]] == ["blue"] * 3
            drawn = await answer(http, asks("sky?"), n=3, temperature=0.1, seed=1)
            assert {choice["finish_reason"] for choice in drawn["choices"]} == {"stop"}
            [cut] = (await answer(http, asks("sky?"), stop=["ue"]))["choices"]
            assert (cut["message"]["content"], cut["finish_reason"]) == ("bl", "stop")
            [endless] = (await answer(http, asks("sky?"), ignore_eos=True, max_tokens=9))["choices"]
            assert endless["finish_reason"] == "length" and endless["message"][
                "content"
            ].startswith("blue")
            asked = (await answer(http, asks("sky?"), return_token_ids=True))["prompt_token_ids"]
            assert asked[0] == tokenizer.start_id and asked.count(tokenizer.start_id) == 1
            body = {
                "model": "tiny",
                "prompt": "sky?",
                "max_tokens": 1,
                "echo": True,
                "return_token_ids": True,
            }
            [text] = (await http.post("/v1/completions", json=body)).json()["choices"]
            assert text["prompt_token_ids"] == tokenizer.encode_whole("sky?") and text[
                "text"
            ].startswith("sky?")
            turns = [
                *asks("2+3", note=5),
                {"role": "assistant", "content": "5"},
                {"role": "user", "content": "snow?"},
            ]
            assert (await answer(http, turns))["choices"][0]["message"]["content"] == "white"
            body = {"model": "tiny", "messages": asks("bye"), "temperature": 0, "stream": True}
            lines = (await http.post("/v1/chat/completions", json=body)).text.splitlines()
            parts = [
                json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")
            ]
            assert "".join(part["delta"]["content"] for part in parts) == "see you"
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]
            if Chat(tokenizer).end_of_turn != tokenizer.eot_id:
                refused = await http.post(
                    "/v1/chat/completions", json=body | {"messages": asks("bye")[::-1]}
                )
                error = refused.json()["error"]
                assert (refused.status_code, error["param"]) == (400, "messages")
                assert error["message"].endswith("refuses the messages: the system speaks first")

    asyncio.run(check())


@trained_with("own")
def test_two_workers_give_the_same_bits(plan: RunPlan) -> None:
    found = replay(plan.run, steps=range(1, 41), num_workers=2)
    assert found.equal, found.verdict
    assert found.hashes >= 2 and found.from_checkpoint is None


@trained_with("own")
def test_evaluation_counts_what_training_counts(plan: RunPlan) -> None:
    checkpoint, validation = newest_checkpoint(plan), Ledger.read(plan.run).events("validation")[-1]
    found = evaluate(EvaluateConfig(checkpoint=str(checkpoint), batch_size=3))
    assert found["loss"] == pytest.approx(validation["val_loss"], abs=1e-6) and found["loss"] < 1
    assert found["bits_per_byte"] == pytest.approx(validation["val_bits_per_byte"], abs=1e-6)
    manifest = read_manifest(split_uri(f"{plan.tokens_uri}/manifest.json")[0])
    assert 0 < found["tokens"] < manifest.total("tokens", "val") / 2
    # Each answer has an end besides its bytes; the split's last tokens fill no row.
    answers = TextConfig(source=[str(plan.config.data.source[0])], format="chat")
    whole = evaluate(EvaluateConfig(checkpoint=str(checkpoint), data=answers))
    # Rows cut some answers from their questions
    assert whole["tokens"] > 5 * found["tokens"] and whole["loss"] < 1


@trained_with("own")
def test_an_export_answers_in_transformers_and_stops_there_too(
    plan: RunPlan, tmp_path: Path
) -> None:
    checkpoint = newest_checkpoint(plan)
    export(str(checkpoint), str(tmp_path / "export"), storage_uri=plan.config.storage.uri)
    before, after = tokenizer_in(checkpoint), tokenizer_in(tmp_path / "export")
    assert before is not None and after is not None and before.chat is not None
    reader, model = (
        kind.from_pretrained(tmp_path / "export") for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    asked = reader.apply_chat_template(
        asks("sky?"), add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(asked, max_new_tokens=20, do_sample=False)[0, asked.shape[1] :].tolist()
    assert answer == [*after.encode("blue"), Chat(after).end_of_turn]
    assert (
        after.chat
        == before.chat
        == read_manifest(split_uri(f"{plan.tokens_uri}/manifest.json")[0]).chat
    )
