"""Strangers' chat templates and tokenizers in their bounded process: the same tokens as in this
one, and an end to each text that takes too much."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.files.bounded_text import BOUNDS, Bounds, TextError
from model.files.stored_tokenizer import load_tokenizer
from model.text.chat import PLAIN_TEMPLATE, Chat
from model.text.chat_probe import ChatProbe
from model.text.tokenizer import PLAIN_ENCODING
from serving.text.chat_misfit import chat_misfit, chat_notice
from serving.text.reader import BoundedReader, TrustedReader, open_reader
from tests.serving.tiny_models import as_transformers_folder

GOOD = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WHERE_ASKED = "{% if 'LOOP' in messages[0].content %}" + LOOP + "{% endif %}" + GOOD
CHAT = [{"role": "user", "content": "the quick <|endoftext|> fox"}]


def with_template(checkpoint: Path, folder: Path, template: str | None, **config: str) -> Path:
    as_transformers_folder(checkpoint, folder)
    values: dict[str, Any] = {"eos_token": "<|endoftext|>", **config}
    if template is not None:
        values["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def probed(folder: Path, bounds: Bounds = BOUNDS) -> ChatProbe:
    async def read() -> ChatProbe:
        texts = await open_reader(folder, bounds=bounds)
        texts.close()
        return texts.probe

    return asyncio.run(read())


def test_a_bounded_reader_gives_the_tokens_of_this_process(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = with_template(checkpoint, tmp_path / "good", GOOD)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None

    async def scenario() -> None:
        texts = await open_reader(folder)
        assert isinstance(texts, BoundedReader)
        assert await texts.chat_ids(CHAT) == Chat(tokenizer).prompt_ids(CHAT)
        asked = ["the quick naïve fox", ""]
        assert await texts.encoded(asked, PLAIN_ENCODING) == [
            tokenizer.encode_whole(asked[0]),
            [tokenizer.eot_id],
        ]
        assert await texts.encoded([[1, 2]], PLAIN_ENCODING) == [[1, 2]]
        assert texts.probe.end_of_turn == tokenizer.eot_id
        texts.close()
        with pytest.raises(TextError):
            await texts.chat_ids(CHAT)

    asyncio.run(scenario())


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE])
def test_raymills_own_programs_run_in_this_process(
    checkpoint: Path, tmp_path: Path, template: str | None
) -> None:
    folder = with_template(checkpoint, tmp_path / "own", template)
    texts = asyncio.run(open_reader(folder))
    assert isinstance(texts, TrustedReader)
    assert texts.probe.is_chat_tuned is (template is not None)


def test_a_chat_that_takes_too_long_ends_alone(checkpoint: Path, tmp_path: Path) -> None:
    """On the old code it went on for hours, in a thread that completions needed."""
    folder = with_template(checkpoint, tmp_path / "loops", WHERE_ASKED)

    async def scenario() -> None:
        texts = await open_reader(folder, bounds=Bounds(request_cpu_s=0.5))
        expected = await texts.chat_ids(CHAT)
        with pytest.raises(TextError, match=r"0\.5 s of processor time"):
            await texts.chat_ids([{"role": "user", "content": "LOOP"}])
        assert await texts.chat_ids(CHAT) == expected, "the next chat gets a new process"
        texts.close()

    asyncio.run(scenario())


@pytest.mark.more
@pytest.mark.parametrize(
    "bomb", ["{% set x = 'a' %}{% for i in range(99999) %}{{ x.ljust(99999) }}{% endfor %}"]
)
def test_a_template_gets_no_more_memory_than_its_bound(
    checkpoint: Path, tmp_path: Path, bomb: str
) -> None:
    folder = with_template(checkpoint, tmp_path / "bomb", bomb)
    probe = probed(folder, Bounds(memory_bytes=1 << 30, request_cpu_s=60))
    assert not probe.hashes and probe.refusals


def test_a_folder_whose_template_never_ends_is_refused_at_load(
    checkpoint: Path, tmp_path: Path
) -> None:
    """In the time of a request: a minute is for reading the tokenizer alone."""
    folder = with_template(checkpoint, tmp_path / "slow", LOOP)
    with pytest.raises(TextError, match=r"1\.5 s of processor time"):
        asyncio.run(open_reader(folder, bounds=Bounds(request_cpu_s=1.5)))


def test_a_pattern_of_its_own_is_a_strangers_program(checkpoint: Path, tmp_path: Path) -> None:
    folder = as_transformers_folder(checkpoint, tmp_path / "pattern")
    content = json.loads((folder / "tokenizer.json").read_bytes())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$|."},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None

    async def scenario() -> None:
        texts = await open_reader(folder)
        assert isinstance(texts, BoundedReader)
        assert await texts.encoded(["fox"], PLAIN_ENCODING) == [tokenizer.encode("fox")]
        texts.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (GOOD, ""),
        ("{% for m in messages %}{{ m.content ", "cannot write a user's message"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + GOOD,
            "a system's message",
        ),
        (GOOD.replace("eos_token", "''"), "another token"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_fails_where_the_live_one_does_not_is_a_misfit(
    checkpoint: Path, tmp_path: Path, template: str | None, problem: str
) -> None:
    probes = []
    for name, text in [("live", GOOD), ("candidate", template)]:
        probes.append(probed(with_template(checkpoint, tmp_path / name, text)))
    found = chat_misfit(*probes)
    assert problem in found and bool(found) is bool(problem)


def test_another_wording_is_a_notice(checkpoint: Path, tmp_path: Path) -> None:
    probes = []
    for name, text in [("live", GOOD), ("candidate", "Hello. " + GOOD)]:
        probes.append(probed(with_template(checkpoint, tmp_path / name, text)))
    assert not chat_misfit(*probes)
    assert "otherwise than the live version's" in chat_notice(*probes)
    assert not chat_notice(probes[0], probes[0])


def test_a_torn_folder_leaves_no_process(checkpoint: Path, tmp_path: Path) -> None:
    folder = with_template(checkpoint, tmp_path / "torn", GOOD)
    shutil.copy(folder / "config.json", folder / "tokenizer.json")
    with pytest.raises(TextError, match="cannot be read"):
        asyncio.run(open_reader(folder))
