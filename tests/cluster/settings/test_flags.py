"""Flags over YAML: every setting has one, what they say wins, and misuse gets one line with a
suggestion."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from cluster.cli import command_parser
from cluster.settings.flags import (
    add_config_arguments,
    new_run_id,
    resolve_config,
    settings_from_flags,
)
from cluster.settings.leaves import leaves
from cluster.settings.parser import ConfigError, Parser
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from cluster.settings.serve import CPU_NUM_SEQS, CPU_PREFILL_TOKENS, ServeConfig
from cluster.settings.setting import Settings
from cluster.settings.stages import EvaluateConfig
from model.config import GPTConfig, Shape
from model.hardware.gpus import GPUS

YAML = """
data: {source: corpus/*.txt}
model: {preset: tiny, n_layer: 3}
train: {seq_len: 32, learning_rate: 2.0e-3, sample_prompts: [one, two]}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


def parsed(*argv: str, root: Any = RunConfig) -> Any:
    parser = Parser(prog="tool")
    parser.add_argument("config", nargs="?", type=Path)
    add_config_arguments(parser, root)
    given = parser.parse_args(argv)
    return resolve_config(vars(given), root, file=given.config).config


def refusal(*argv: str, root: Any = RunConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        parsed(*argv, root=root)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_file_alone(file: str) -> None:
    config = parsed(file)
    assert config.model == GPTConfig(n_layer=3, n_head=2, n_embd=32, n_positions=64)
    assert config.train.learning_rate == 2e-3
    assert config.train.sample_prompts == ["one", "two"]


def test_flags_win_over_the_file(file: str) -> None:
    config = parsed(
        file,
        *("--train.learning-rate", "1e-3"),
        *("--train.seq_len", "16"),  # underscores are as good
        *("--train.exact=false",),
        *("--model.n-head", "4", "--model.dropout", "0.25", "--model.tie-word-embeddings", "no"),
        *("--train.sample-prompts", "a", "b c", "3"),
        *("--data.normalize", "nfc", "lowercase"),
    )
    assert config.train.learning_rate == 1e-3
    assert config.train.seq_len == 16
    assert config.train.exact is False
    assert (config.model.n_head, config.model.n_layer) == (4, 3)
    assert (config.model.dropout, config.model.tie_word_embeddings) == (0.25, False)
    assert config.train.sample_prompts == ["a", "b c", "3"]
    assert config.data.normalize == ["nfc", "lowercase"]


def test_a_preset_by_flag_keeps_the_fields_that_were_named(file: str) -> None:
    config = parsed(file, "--model.preset", "demo", "--model.n-positions", "100")
    assert config.model == GPTConfig(n_layer=3, n_head=4, n_embd=128, n_positions=100)


def test_a_preset_by_flag_over_numbers_of_the_file_says_which_win(tmp_path: Path) -> None:
    """A shape without a preset would leave nothing of the flag, in silence."""
    path = tmp_path / "run.yaml"
    words = ["--data.source", "a.txt", "--model.preset", "demo"]
    path.write_text("model: {n_layer: 9, n_head: 4, n_embd: 128}")
    said = refusal(str(path), *words)
    assert (
        f"--model.preset demo has other values than {path}, where model.n_layer: 9, and those would win"
        in said
    )
    assert parsed(str(path), *words, "--model.n-layer", "9").model.n_layer == 9, (
        "as a flag it is meant"
    )
    path.write_text("model: {n_head: 4, n_embd: 128, dropout: 0.5}")
    assert parsed(str(path), *words).model.dropout == 0.5, "no number of the preset's"


def test_a_run_is_left_unpublished_by_a_word() -> None:
    words = ["pretrain", "--data.source", "a.txt"]
    for more, is_published in (
        ([], True),
        (["--no-publish"], False),
        (["--checkpoint.publish", "false"], False),
    ):
        given = vars(command_parser(words).parse_args([*words, *more]))
        assert resolve_config(given, RunConfig).config.checkpoint.publish is is_published


def test_validation_sets_are_named_by_a_flag(file: str) -> None:
    config = parsed(file, "--data.validation", "news=n.txt", "law=tokens://s3://b/a=b")
    assert config.data.validation == {
        "news": str(Path.cwd() / "n.txt"),
        "law": "tokens://s3://b/a=b",
    }
    assert "--data.validation n.txt: expected NAME=SOURCE" in refusal(
        file, "--data.validation", "n.txt"
    )
    assert "data.validation.a/b" in refusal(file, "--data.validation", "a/b=n.txt")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("20M", 20_000_000),
        ("1e6", 1_000_000),
        ("2.5k", 2500),
        ("1_000", 1000),
        ("3B", 3_000_000_000),
        ("7", 7),
    ],
)
def test_a_count_may_have_a_unit(file: str, text: str, number: int) -> None:
    assert parsed(file, "--train.eval-max-tokens", text).train.eval_max_tokens == number
    path = Path(file).with_name("counted.yaml")
    path.write_text(f"data: {{max_document_bytes: {text}}}")
    wanted = 3 if text == "3B" else number
    assert parsed(str(path), "--data.source", "a.txt").data.max_document_bytes == wanted


@pytest.mark.parametrize(
    ("text", "number"),
    [("64MiB", 64 << 20), ("64MB", 64_000_000), ("2 gib", 2 << 30), ("1K", 1000)],
)
def test_bytes_may_have_a_unit(file: str, text: str, number: int) -> None:
    assert parsed(file, "--data.max-document-bytes", text).data.max_document_bytes == number


@pytest.mark.parametrize("word", ["null", "none"])
def test_null_unsets(file: str, word: str) -> None:
    assert parsed(file).train.seq_len == 32
    assert parsed(file, "--train.seq-len", word, "--model.n-inner", word).train.seq_len is None


def literal_values(root: type, prefix: str = "") -> dict[str, tuple[Any, ...]]:
    """Returns the values of each setting that has a few names for values, by its dotted name."""
    values = {}
    for name, declared in get_type_hints(root).items():
        kind = GPTConfig if declared == Shape else declared
        if (isinstance(kind, type) and issubclass(kind, Settings)) or kind is GPTConfig:
            values |= literal_values(kind, f"{prefix}{name}.")
        else:
            parts = [kind, *get_args(kind)]
            names = [
                value for part in parts if get_origin(part) is Literal for value in get_args(part)
            ]
            values |= {f"{prefix}{name}": tuple(names)} if names else {}
    return values


@pytest.mark.parametrize("root", [RunConfig, ServeConfig, EvaluateConfig, PlanConfig])
def test_each_value_of_each_setting_can_be_given(root: type[Settings]) -> None:
    parser = Parser(prog="tool")
    add_config_arguments(parser, root)
    for path, values in literal_values(root).items():
        for value in values:
            given: Any = settings_from_flags(
                vars(parser.parse_args([f"--{path}", f"{value}"])), root
            )
            for part in path.split("."):
                given = given[part]
            assert given in (value, [value]), path
    expected = {"scaling.shard", "train.precision", "train.schedule", "model.architecture"}
    assert root is not RunConfig or expected <= literal_values(root).keys()
    assert root is not RunConfig or "none" in literal_values(root)["scaling.shard"]


def test_none_is_a_value_where_it_is_ones_name(file: str) -> None:
    assert parsed(file, "--scaling.shard", "none").scaling.shard == "none"
    assert "scaling.shard: expected 'none', 'optimizer'" in refusal(file, "--scaling.shard", "null")


def test_a_corpus_is_enough_without_a_file() -> None:
    config = parsed("--data.source", "a.txt", "s3://bucket/b/")
    assert config.data.source == [str(Path.cwd() / "a.txt"), "s3://bucket/b"]
    assert config.train == RunConfig().train
    assert "--data.source" in refusal()


def test_a_file_without_a_corpus_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("data: {source: []}")
    assert refusal(str(path)).startswith(
        f"data.source is empty: name the corpus by a path or URI, globs allowed, in {path}"
    )
    assert parsed(str(path), "--data.source", "a.txt").data.source == [str(Path.cwd() / "a.txt")]


def test_paths_are_made_absolute(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parsed(file, "--data.tokenizer", "tok.json", "--storage.uri", "file:///data/x")
    assert config.data.source == [f"{tmp_path}/corpus/*.txt"]
    assert config.data.tokenizer == f"{tmp_path}/tok.json"
    assert config.storage.uri == "/data/x"
    assert parsed(file).storage.uri == f"{tmp_path}/.raymill"
    starts = {
        name: parsed(file, "--train.init-from", name).train.init_from
        for name in ("hf/model", "latest")
    }
    assert starts == {"hf/model": f"{tmp_path}/hf/model", "latest": "latest"}
    serve = parsed(
        "--checkpoint",
        "step-1",
        "--api-key-file",
        "key",
        "--admin-key-file",
        "admin",
        root=ServeConfig,
    )
    assert (serve.checkpoint, serve.api_key_file) == (f"{tmp_path}/step-1", f"{tmp_path}/key")
    assert serve.admin_key_file == f"{tmp_path}/admin"
    logs = [
        parsed("--http.request-log", log, root=ServeConfig).http.request_log
        for log in ("log", "-", "/proc/1/fd/1")
    ]
    assert logs == [f"{tmp_path}/log", "-", "/proc/1/fd/1"]
    assert parsed(root=ServeConfig).checkpoint == "latest"
    assert parsed("--checkpoint", "s3://b/c", root=EvaluateConfig).checkpoint == "s3://b/c"


def test_a_run_gets_a_name_of_its_own(file: str) -> None:
    names = {parsed(file).run_id for _ in range(3)} | {new_run_id() for _ in range(3)}
    assert len(names) == 6
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)
    assert parsed(file, "--run-id", "mine").run_id == "mine"


def setting_paths(root: type[Settings], prefix: str = "") -> list[str]:
    """Dotted names of all settings, from an instance rather than from the code that makes the
    flags."""
    paths = []
    for name, value in root():
        if isinstance(value, Settings):
            paths += setting_paths(type(value), f"{prefix}{name}.")
        elif isinstance(value, GPTConfig):
            paths += [f"{prefix}{name}.{field}" for field in vars(value)]
        else:
            paths.append(f"{prefix}{name}")
    return paths


@pytest.mark.parametrize("root", [RunConfig, ServeConfig, EvaluateConfig, PlanConfig])
def test_every_setting_is_a_flag_with_a_line_of_help(root: type[Settings]) -> None:
    parser = Parser(prog="tool")
    add_config_arguments(parser, root)
    described = {action.dest: str(action.help) for action in parser._actions}
    assert set(setting_paths(root)) <= set(described)
    assert all(len(text) > 10 for text in described.values())
    # `%` in a help text would raise
    assert "--train.learning-rate" in parser.format_help() or root is not RunConfig


def test_the_help_is_true() -> None:
    abouts = {leaf.path: leaf.help for leaf in [*leaves(ServeConfig), *leaves(PlanConfig)]}
    assert f"one of {', '.join(GPUS)} (default a100)" in abouts["gpu"]
    assert f"; {CPU_NUM_SEQS} when unset" in abouts["engine.max_num_seqs"]
    assert f"; {CPU_PREFILL_TOKENS} when unset" in abouts["engine.prefill_tokens_per_step"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--train.learnin-rate", "3"],
            ["--train.learnin-rate", "did you mean --train.learning-rate?"],
        ),
        (
            ["--train.learnin_rate=3"],
            ["--train.learnin_rate", "did you mean --train.learning_rate?"],
        ),
        (
            ["--train.learning-rat", "3"],
            ["--train.learning-rat", "did you mean --train.learning-rate?"],
        ),
        (["--train.learning-rate"], ["--train.learning-rate", "expected one argument"]),
        (["--train.learning-rate", "fast"], ["train.learning_rate", "number", "'fast'"]),
        (["--train.exact", "maybe"], ["train.exact", "'maybe'"]),
        (["--model.n-layer", "x"], ["model.n_layer", "a whole number", "'x'"]),
        (["--lr", "3"], ["--lr", "did you mean train.learning_rate?"]),
        (["--train.lr", "3"], ["--train.lr", "did you mean train.learning_rate?"]),
        (["--train.steps", "3"], ["did you mean train.max_tokens, a number of tokens"]),
        (["--train.batch-size", "3"], ["did you mean train.global_batch_size"]),
        (
            ["--train.max-tokens", "20X"],
            ["a whole number, such as 20000000, 20M or 1e6, not '20X'"],
        ),
        (["--data.shard-bytes", "64Mi"], ["64MiB", "not '64Mi'"]),
        (["--train.seed", "-1"], ["train.seed: expected at least 0, not '-1'"]),
        (["--train.schedule", "linear"], ["expected 'cosine' or 'wsd', not 'linear'"]),
        (["--run-id", "my run"], ["run_id: expected letters, digits and", "not 'my run'"]),
        (["--model.n-head", "3"], ["n_head=3", "n_embd=32"]),
        (["--data.normalize", "nfc", "nfd"], ["data.normalize", "'nfd'", "'lowercase'"]),
        (["surplus"], ["surplus", "tool --help"]),
    ],
    ids=str,
)
def test_misuse_is_named(file: str, argv: list[str], words: list[str]) -> None:
    message = refusal(file, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "argv", "words"),
    [
        (b"train: [", [], ["is not YAML"]),
        (
            b"train: [\n",
            [],
            [
                "line 2, column 1, the end of the file: expected `name: value`",
                "a bracket is closed",
            ],
        ),
        (
            b"a: b: c\n",
            [],
            [
                "is not YAML: line 1, column 5, at 'a: b: c': expected `name: value`",
                "stands in quotes",
            ],
        ),
        (
            b"data:\n\tsource: a\n",
            [],
            ["bad.yaml is not YAML: line 2, column 1: a tab; indent by spaces"],
        ),
        (
            b"data:\n  source: a\n format: b\n",
            [],
            ["line 3, column 2, at 'format: b': expected `name: value`"],
        ),
        (b"\xff\xfe\x00", [], ["is not YAML"]),
        (b"train: {seed: 2026-13-45}\n", [], ["is not YAML", "month must be in 1..12"]),
        (b"", [], ["holds no settings"]),
        (b"- train\n", [], ["holds no settings"]),
        (b"train:\n", ["--train.seed", "1"], ["train", "None"]),
        (
            b"data: libtxt\n",
            [],
            ["data: expected `name: value` lines below it, such as `source: …`, not 'libtxt'"],
        ),
        (b"train: {lr: 1}\n", [], ["unknown setting train.lr; did you mean train.learning_rate?"]),
        (b"train: 5\n", ["--train.seed", "1"], ["train", "5"]),
        (
            b"train:\n  seed: 1\n  seq_len: 32\n  seed: 2\n",
            [],
            ["bad.yaml, line 4: seed", "on line 2"],
        ),
        (b"train: {seed: 1}\ndata: {}\ntrain: {}\n", [], ["bad.yaml, line 3: train", "on line 1"]),
        (b"train: {seed: 1, seed: 1}\n", [], ["seed is set already, on line 1"]),
        (b"model: {preset: [1]}\n", [], ["model: preset [1] is unknown", "gpt2-124m"]),
        (b"model: {n_layer: 99999999}\n", [], ["n_layer is 99999999, expected at most 10000"]),
        (
            b"scalling: {max_workers: 3}\n",
            [],
            ["unknown setting scalling", "did you mean scaling?"],
        ),
    ],
    ids=str,
)
def test_a_bad_file_is_named(
    tmp_path: Path, content: bytes, argv: list[str], words: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(str(path), *argv)
    assert all(word in message for word in words), message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.yaml: No such file" in refusal(f"{tmp_path}/none.yaml")
    assert f"{tmp_path}: Is a directory" in refusal(str(tmp_path))
