"""A store of conversations: its exact bytes, what is dropped and said, and what a reader gets of
it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from cluster.storage.uris import open_storage, split_uri
from jobs.corpus.listing import CorpusError
from jobs.tokens.build_store import tokenize
from jobs.tokens.token_store import MANIFEST, Manifest, read_manifest, token_dtype
from jobs.tokens.token_stream import TokenStream
from jobs.tokens.train_tokenizer import load_tokenizer
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.chat import PLAIN_TEMPLATE, Chat
from model.text.tokenizer import Tokenizer, train_bpe
from raymill.errors import UserError
from tests.jobs.corpora import data_config

ALTERNATING = (
    "{% for message in messages %}{% if loop.index0 % 2 != (message.role == 'assistant') | int %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}<|endoftext|>{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)


def conversation(number: int, num_turns: int = 1) -> dict[str, Any]:
    turns = [
        [
            {"role": "user", "content": f"{number}+{turn}"},
            {"role": "assistant", "content": str(number + turn)},
        ]
        for turn in range(num_turns)
    ]
    return {"messages": [message for turn in turns for message in turn], "id": number}


BAD = {
    "no_messages": [
        {"text": "hi"},
        {"messages": "hi"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        [1],
    ],
    "unknown_role": [
        {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    ],
    "no_answer": [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a corpus of conversations, and a tokenizer without and one with a template."""
    folder = tmp_path_factory.mktemp("chat")
    lines = [json.dumps(conversation(number, 1 + number % 3)) for number in range(60)]
    bad = [json.dumps(line) for found in BAD.values() for line in found]
    (folder / "corpus.jsonl").write_text(
        "\n".join(
            [
                *lines,
                *bad,
                lines[0],
                r'{"messages": [{"role": "user", "content": '
                r'"\ud800"}, {"role": "assistant", "content": "é\ud800"}]}',
            ]
        )
        + "\n"
    )
    tokenizer = train_bpe(["user assistant 1+2 3 <>" * 9], vocab_size=300).to_json()
    for name in ("plain", "own"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_bytes(tokenizer)
    (folder / "own" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": ALTERNATING})
    )
    return folder


def made(
    folder: Path, storage: Path, *, tokenizer: str = "plain", **settings: Any
) -> dict[str, Any]:
    data = {"format": "chat", "tokenizer": str(folder / tokenizer), "shard_bytes": 600} | settings
    return tokenize(data_config(str(folder / "corpus.jsonl"), storage, **data))


@pytest.fixture(scope="module")
def result(
    folder: Path, ray_workers: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return made(folder, tmp_path_factory.mktemp("storage"))


def conversations(manifest: Manifest, content: bytes) -> list[list[tuple[int, bool]]]:
    """Returns the (id, is counted) of each conversation in a shard, by the rule of the format
    alone."""
    stored = np.frombuffer(content, "<i2").tolist()
    pairs = [(value, True) if value >= 0 else (~value, False) for value in stored]
    starts = [place for place, pair in enumerate(pairs) if pair == (manifest.start_id, False)]
    assert starts[0] == 0
    return [pairs[start:end] for start, end in zip(starts, [*starts[1:], len(pairs)], strict=True)]


def test_the_bytes_are_what_the_template_writes_with_signs(
    result: dict[str, Any], folder: Path
) -> None:
    store, _ = split_uri(result["manifest"])
    manifest, (tokenizer, _) = read_manifest(store), load_tokenizer(str(folder / "plain"))
    assert manifest.chat is not None and manifest.chat.chat_template == PLAIN_TEMPLATE
    assert json.loads(store.read_bytes(MANIFEST))["format_version"] == 3
    found = [
        c
        for shard in manifest.shards
        for c in conversations(manifest, store.read_bytes(shard.file))
    ]
    expected = {}
    for number in range(60):
        ids, counted = Chat(tokenizer, manifest.chat).conversation(
            conversation(number, 1 + number % 3)["messages"]
        )
        expected[tokenizer.decode(ids)] = [*zip(ids, counted, strict=True)]
    by_text = {tokenizer.decode([token_id for token_id, _ in pairs]): pairs for pairs in found}
    # Lone surrogates are three bytes each
    broken = "<|endoftext|>User:\n\ufffd\nAssistant:\né\ufffd<|endoftext|>\n"
    assert {text: pairs for text, pairs in by_text.items() if "é" not in text} == expected
    assert [text for text in by_text if "é" in text] == [broken.replace("\ufffd", "\ufffd" * 3)]
    assert len(found) == result["documents"] == 61
    answers = (
        sum(len(str(n + turn)) for n in range(60) for turn in range(1 + n % 3))
        + len("é".encode())
        + 9
    )
    assert result["bytes"] == answers  # by which bits per byte are those of answers


FORMS_OF_LINES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "conversations": lambda line: {
        "conversations": [
            {"from": NAMES[turn["role"]], "value": turn["content"]} for turn in line["messages"]
        ]
    },
    "prompt and completion": lambda line: {
        "prompt": line["messages"][:-1],
        "completion": line["messages"][-1:],
    },
}
NAMES = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("form", FORMS_OF_LINES)
def test_another_form_of_the_same_conversations_makes_the_same_shards(
    form: str, folder: Path, tmp_path: Path
) -> None:
    stores = []
    for written in (dict, FORMS_OF_LINES[form]):
        lines = [json.dumps(written(conversation(number, 1 + number % 3))) for number in range(20)]
        (tmp_path / "turns.jsonl").write_text("\n".join(lines))
        settings: dict[str, Any] = {
            "format": "chat",
            "tokenizer": str(folder / "plain"),
            "shard_bytes": 1 << 20,
        }
        stores.append(
            tokenize(data_config(str(tmp_path / "turns.jsonl"), tmp_path / "storage", **settings))
        )
    usual, other = stores
    assert (other["documents"], other["shards"]) == (20, usual["shards"])


@pytest.mark.more
def test_any_number_of_workers_and_chunks_makes_the_same_conversations(
    result: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    again = made(folder, tmp_path / "again")
    assert (again["manifest_hash"], again["shards"]) == (result["manifest_hash"], result["shards"])
    whole = made(folder, tmp_path / "whole", shard_bytes=1 << 20)
    assert (whole["documents"], whole["train_tokens"]) == (
        result["documents"],
        result["train_tokens"],
    )
    assert len(whole["shards"]) == 2 < len(result["shards"])


def test_a_reader_gets_ids_and_the_targets_that_count(result: dict[str, Any]) -> None:
    store, _ = split_uri(result["manifest"])
    manifest = read_manifest(store)
    stored = np.concatenate(
        [
            np.frombuffer(store.read_bytes(s.file), "<i2")
            for s in manifest.shards
            if s.split == "train"
        ]
    ).astype(int)
    stream = TokenStream(store, split="train", seq_len=16)
    inputs, targets = stream.rows(range(stream.count_rows()))
    length = inputs.numel()
    assert inputs.flatten().tolist() == [max(value, ~value) for value in stored[:length].tolist()]
    expected = [value if value >= 0 else IGNORE_INDEX for value in stored[1 : length + 1].tolist()]
    assert targets.flatten().tolist() == expected
    assert 0.1 < expected.count(IGNORE_INDEX) / length < 0.95


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1 << 15, "<i2"), ((1 << 15) + 1, "<i4"), (1 << 17, "<i4")]
)
def test_a_sign_has_a_bit_of_its_own(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size, signed=True) == np.dtype(dtype)


def test_what_cannot_be_used_is_counted_under_its_reason(result: dict[str, Any]) -> None:
    dropped = {reason: count for reason, count in result["dropped"].items() if count}
    assert dropped == {reason: len(lines) for reason, lines in BAD.items()} | {"duplicate": 1}
    manifest = read_manifest(split_uri(result["manifest"])[0])
    assert "tool" in manifest.drop_samples["unknown_role"][0].preview


def test_a_template_refuses_in_its_own_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [conversation(number) for number in range(20)]
    lines[7]["messages"] = lines[7]["messages"][::-1]
    (tmp_path / "turns.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings: dict[str, Any] = {"format": "chat", "tokenizer": str(folder / "own")}
    result = tokenize(data_config(str(tmp_path / "turns.jsonl"), tmp_path / "storage", **settings))
    assert (result["documents"], result["dropped"]["template_refused"]) == (19, 1)
    assert (
        "1 conversation is left out; the first: the chat template refuses the messages: user and assistant take turns"
        in (capsys.readouterr().err)
    )
    (tmp_path / "turns.jsonl").write_text(json.dumps(lines[7]))
    with pytest.raises(CorpusError, match="1 template_refused"):
        tokenize(data_config(str(tmp_path / "turns.jsonl"), tmp_path / "storage", **settings))


def test_long_conversations_are_said_once_with_their_number(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(
        str(folder / "corpus.jsonl"), tmp_path, format="chat", tokenizer=str(folder / "plain")
    )
    config = config.model_copy(update={"train": config.train.model_copy(update={"seq_len": 40})})
    tokenize(config)
    found = capsys.readouterr().err
    manifest = read_manifest(split_uri(tokenize(config)["manifest"])[0])
    store = (
        open_storage(str(tmp_path))
        .child("tokens")
        .child(Path(tokenize(config)["manifest"]).parent.name)
    )
    lengths = [
        len(c) for s in manifest.shards for c in conversations(manifest, store.read_bytes(s.file))
    ]
    number = sum(length > 40 for length in lengths)
    assert 0 < number < 61
    assert found.count(f"{number} of 61 conversations have more than train.seq_len=40 tokens") == 1
    assert "conversations have more" not in capsys.readouterr().err


def test_other_files_and_other_stores_are_refused(
    folder: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("User: hi")
    with pytest.raises(
        UserError, match=r"data\.format=chat reads \.jsonl files, and .*a\.txt is none"
    ):
        tokenize(data_config(str(tmp_path / "a.txt"), tmp_path / "storage", format="chat"))
    store = f"tokens://{Path(result['manifest']).parent}"
    with pytest.raises(
        CorpusError, match=r"made with another tokenizer .*, BOS, data\.format or chat template"
    ):
        tokenize(data_config(store, tmp_path / "storage"))
    copied = tokenize(data_config(store, tmp_path / "storage", format="chat"))
    assert copied["tokens"] == result["tokens"]


def test_a_tokenizer_with_bos_begins_every_document_with_it(folder: Path, tmp_path: Path) -> None:
    """The bytes of stores of other tokenizers are what they were, which other tests hold."""
    backend = tokenizers.Tokenizer.from_str((folder / "plain" / "tokenizer.json").read_text())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{number}+{number}"}) for number in range(30))
    )
    tokenizer = Tokenizer.from_json((tmp_path / "tokenizer.json").read_bytes())
    result = tokenize(
        data_config(str(tmp_path / "a.jsonl"), tmp_path / "storage", tokenizer=str(tmp_path))
    )
    store, _ = split_uri(result["manifest"])
    manifest = read_manifest(store)
    ids = np.concatenate(
        [np.frombuffer(store.read_bytes(s.file), "<u2") for s in manifest.shards]
    ).tolist()
    assert (manifest.bos_id, manifest.start_id, ids.count(bos)) == (bos, bos, 30)
    documents = {tuple(tokenizer.encode_whole(f"{number}+{number}")) for number in range(30)}
    ends = [place + 1 for place, token in enumerate(ids) if token == tokenizer.eot_id]
    assert {
        tuple(ids[start : end - 1]) for start, end in zip([0, *ends], ends, strict=False)
    } == documents
    chat = tokenize(
        data_config(
            str(folder / "corpus.jsonl"),
            tmp_path / "storage",
            tokenizer=str(tmp_path),
            format="chat",
        )
    )
    manifest = read_manifest(split_uri(chat["manifest"])[0])
    content = split_uri(chat["manifest"])[0].read_bytes(manifest.shards[0].file)
    assert all([token for token, _ in c].count(bos) == 1 for c in conversations(manifest, content))


def test_a_manifest_of_text_has_the_fields_that_it_had(tmp_path: Path) -> None:
    """So its hash, and with it a run's identity, is what earlier versions made."""
    (tmp_path / "a.txt").write_text("hello " * 400)
    (tmp_path / "b.txt").write_text("there " * 400)
    result = tokenize(data_config(str(tmp_path / "*.txt"), tmp_path / "storage"))
    values = json.loads(split_uri(result["manifest"])[0].read_bytes(MANIFEST))
    assert not values.keys() & {"chat", "bos_id"} and values["format_version"] == 2
    assert "template_refused" not in values["dropped"]
    assert (
        result["manifest_hash"] == hashlib.sha256(Path(result["manifest"]).read_bytes()).hexdigest()
    )
