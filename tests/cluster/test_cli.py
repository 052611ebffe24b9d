"""The `raymill` command as scripts see it: exit codes, one line on errors, one JSON object at the
end of the output.

Only what needs no cluster; most of it in this process, since a Python that imports Ray takes
seconds to start.
"""

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import COMMANDS, FIRST_COMMANDS, main
from cluster.commands.command import Argument, Command, OneOf, SettingAs, SettingsOf
from cluster.settings.leaves import leaves
from cluster.settings.run import RunConfig
from model.files.checkpoint_folder import MANIFEST
from tests.checkpoints import DAMAGES, damage, write_tiny
from tests.command_line import RAYMILL, environment, raymill
from tests.time_limits import limit_s


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in an empty folder, so that `.raymill` is there and not in the repository."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def last_json(output: str) -> dict[str, Any]:
    value = json.loads(output.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def words_of(part: Argument[Any] | SettingAs | OneOf | SettingsOf) -> list[str]:
    """Returns what a command's manual says of a part of its record."""
    match part:
        case SettingAs():
            return [part.name]
        case OneOf():
            return [word for argument in part.arguments for word in words_of(argument)]
        case SettingsOf():
            paths = [leaf.path for leaf in leaves(part.tree())]
            return [f"--{path.replace('_', '-')}" for path in paths if path != part.positional]
    if part.names.startswith("-"):
        return part.names.split()
    return [part.metavar or part.names]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help__lists_each_argument_and_setting_of_the_record(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.name.split(), "--help", "all"])
    assert ended.value.code == 0
    manual = capsys.readouterr().out
    words = ["--json", *(word for part in command.arguments for word in words_of(part))]
    assert [word for word in words if f" {word}" not in manual] == []


def manual(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main([*words] if "--help" in words else [*words, "--help"])
    return capsys.readouterr().out


def test_the_first_help_has_the_whole_way_and_names_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = manual(capsys)
    listed = re.findall(r"^  (\w+) ", shown, re.MULTILINE)
    assert listed == [*FIRST_COMMANDS]
    assert shown.count("\n") < 50
    names = {command.name.split()[0] for command in COMMANDS}
    assert f"and {len(names) - len(FIRST_COMMANDS)} others: `raymill --help all` lists" in shown


def test_all_help_has_each_command_once_below_its_section(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = (
        manual(capsys, "--help", "all")
        .split("errors go to standard error.\n")[1]
        .split("\noptions:")[0]
    )
    sections = [line.partition(":")[0] for line in shown.splitlines() if line and line[0] != " "]
    assert sections[0] == "to begin with"
    assert [name.split()[0] for name in sections[1:]] == ["data", "train", "look", "serve", "jobs,"]
    listed = [
        line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert sorted(listed) == sorted({command.name.split()[0] for command in COMMANDS})
    assert (
        listed.index("demo") < listed.index("pretrain") < listed.index("serve") < listed.index("gc")
    )


def test_a_manual_has_the_settings_in_groups_and_the_most_used_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = manual(capsys, "pretrain")
    assert short.count("\n") < 100
    assert "--storage.uri" in short and "--train.weight-decay" not in short
    assert "more: `raymill pretrain --help all` lists them" in short
    shown = manual(capsys, "pretrain", "--help", "all")
    usage, _, rest = shown.partition("\n\n")
    assert "[--SETTING VALUE ...]" in usage and "--data.source" not in usage and "--chaos" in usage
    groups = [
        line.removesuffix(":")
        for line in rest.splitlines()
        if line and line[0] != " " and line[-1] == ":"
    ]
    wanted = [
        "settings that are changed first",
        "data",
        "model",
        "train",
        "scaling",
        "cluster",
        "storage",
        "checkpoint",
    ]
    assert groups == ["positional arguments", "options", *wanted]
    flags = [line.split()[0] for line in rest.splitlines() if line.startswith("  --")]
    assert flags[flags.index("--data.source") + 1] == "--model.preset"
    assert len(flags) == len(set(flags)) > 90
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} >= {
        leaf.path for leaf in leaves(RunConfig)
    }
    at = {group: rest.index(f"\n{group}:\n") for group in wanted}
    assert at["train"] < rest.index("\n  --train.weight-decay ") < at["scaling"]


def test_inspect_shows_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "--shapes", "--model.preset", "gpt2-124m", "--train.precision", "fp32"]
    assert main(words) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "block: query, key, value B T 3C 8 x 1,024 x 2,304 75.497 MB 12" in shown
    assert "124,439,808 parameters" in shown
    assert main([*words, "--json"]) == 0
    assert last_json(capsys.readouterr().out)["parameters"] == 124_439_808
    trained = ["inspect", "--shapes", "--data.source", "x", "--data.vocab-size", "500", "--json"]
    assert main(trained) == 0
    # The tokenizer's ids, not the preset's
    assert last_json(capsys.readouterr().out)["weights"][0]["shape"][0] == 500


def test_all_help_names_every_command() -> None:
    done = raymill("--help", "all")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f" {command.name.split()[0]} " in done.stdout for command in COMMANDS)
    assert "Exit codes: 0 done, 1 failed, 2 misused" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["checkpoint"], ["COMMAND", "raymill checkpoint --help"]),
        (["pretrian"], ["pretrian", "did you mean pretrain?"]),
        (["pretrain"], ["--data.source"]),
        (["pretrain", "none.yaml"], ["none.yaml", "No such file"]),
        (
            ["pretrain", "--data.source", "x", "--train.learnin-rate", "1"],
            ["did you mean --train.learning-rate?"],
        ),
        (
            ["pretrain", "--data.source", "x", "--train.learning-rate", "fast"],
            ["train.learning_rate", "'fast'"],
        ),
        (["pretrain", "--data.source", "x", "--model.n-head", "5"], ["n_head=5", "n_embd=768"]),
        (
            ["pretrain", "--data.source", "x", "--chaos", "kill@3"],
            ["'kill@3'", "kill-worker", "kill-node"],
        ),
        (
            [
                "pretrain",
                "--data.source",
                "x",
                "--chaos",
                "kill-node@3",
                "--cluster.address",
                "http://127.0.0.1:1",
            ],
            ["--chaos", "--cluster.address"],
        ),
        (
            ["pretrain", "--data.source", "x", "--chaos", "kill-node@3"],
            ["--chaos kill-node leaves no node", "--cluster.num-nodes 3"],
        ),
        (["submit", "pretrian", "run.yaml"], ["'pretrian'", "pretrain"]),
        (["submit", "pretrain"], ["--data.source"]),
        (["pretrain", "--data.source", "nowhere"], ["data.source: nothing is at", "nowhere"]),
        (
            ["data", "preview", "--data.source", "nowhere"],
            ["data.source: nothing is at", "nowhere"],
        ),
        (
            ["submit", "pretrain", "x", "--address", "http://a", "--kuberay", "dev"],
            ["--kuberay", "--address"],
        ),
        (["logs", "../x"], ["'../x' is no run id"]),
        (["serve", "latest", "--port", "70000"], ["port", "65535", "70000"]),
        (["complete", "x", "--max-tokens", "many"], ["--max-tokens", "'many'"]),
        (["report", "x", "--price", "nan"], ["--price", "at least 0", "'nan'"]),
        (["report", "x", "--price", "-1"], ["--price", "at least 0", "'-1'"]),
        (["promote"], ["--follow", "--finish"]),
        (["promote", "x", "--finish"], ["--finish", "not allowed with", "checkpoint"]),
    ],
    ids=" ".join,
)
def test_misuse_is_one_line_and_exit_code_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert all(word in streams.err for word in words), streams.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["checkpoint", "show", "nowhere"], ["unknown checkpoint", "/nowhere: no folder"]),
        (["checkpoint", "show", "latest"], ["nothing is published in"]),
        (["evaluate"], ["nothing is published in"]),
        (["publish", "nowhere"], ["unknown checkpoint", "/nowhere: no folder"]),
        (["complete", "hi"], ["no endpoint has answered from", "raymill serve latest", "--url"]),
        (
            ["complete", "hi", "--url", "http://127.0.0.1:9"],
            ["no endpoint answers at http://127.0.0.1:9"],
        ),
        (
            ["complete", "hi", "--url", "http://127.0.0.1:9", "--api-key-file", "none"],
            ["no API key is in none"],
        ),
        (["promote", "x"], ["no endpoint has answered from", "raymill serve latest", "--url"]),
        (["rollback", "--url", "http://127.0.0.1:9"], ["admin key", "--admin-key-file"]),
        (
            ["rollback", "--url", "http://127.0.0.1:9", "--admin-key-file", "none"],
            ["no API key is in none"],
        ),
        (
            ["tokenize", "--data.source", "x", "--cluster.address", "http://127.0.0.1:9"],
            ["no Ray Jobs API answers at http://127.0.0.1:9"],
        ),
        (
            ["submit", "pretrain", "--data.source", "x", "--address", "http://127.0.0.1:9"],
            ["no Ray Jobs API answers at"],
        ),
        (
            ["submit", "pretrain", "--data.source", "x", "--address", "ray://h:1"],
            ["'ray://h:1' is no address of a Jobs API"],
        ),
        (
            ["tokenize", "--data.source", "x", "--cluster.address", "localhost:8265"],
            ["'localhost:8265' is no address of a Jobs API", "with http://"],
        ),
        (["list", "--storage.uri", "s3://"], ["'s3://' names no bucket", "s3://BUCKET/PREFIX"]),
        (["list", "--storage.uri", "s3:/bucket"], ["expected s3://…, with two slashes"]),
        (["list", "--storage.uri", "C:\\models"], ["a path of Windows", "/mnt/c/… under WSL"]),
        (
            ["submit", "pretrain", "--data.source", "x", "--address", "http://me:sesame@h:1"],
            ["the address of h holds a"],
        ),
        (["status", "demo"], ["run demo has no job in", "`raymill list`"]),
        (["logs", "demo"], ["run demo has no job in"]),
        (["stop", "demo"], ["run demo has no job"]),
        (["cluster", "render", "dev", "-n", "Bad_NS!"], ["--namespace", "63", "'Bad_NS!'"]),
        (["cluster", "render", "dev", "-n", "a" * 64], ["--namespace", "63", "'aaa"]),
        (["publish", "ftp://host/x"], ["'ftp://host/x'", "s3://bucket/prefix"]),
    ],
    ids=" ".join,
)
def test_failure_is_one_line_and_exit_code_1(
    argv: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    streams = capfd.readouterr()
    assert streams.out == ""
    errors = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), streams.err


def test_another_service_is_no_endpoint(s3_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "hi", "--url", s3_server]) == 1
    assert f"error: {s3_server}/v1/models answered 40" in capsys.readouterr().err


def test_a_missing_bucket_is_named(s3_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", "latest", "--storage.uri", "s3://no-such-bucket/x"]) == 1
    assert "no bucket 'no-such-bucket'" in capsys.readouterr().err


def test_a_process_ends_with_the_codes_and_without_a_traceback() -> None:
    misused, failed = (
        raymill("pretrain", "none.yaml", "--json"),
        raymill("checkpoint", "show", "nowhere", "--json"),
    )
    assert (misused.returncode, failed.returncode) == (2, 1)
    for done in (misused, failed):
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_a_submission_of_a_source_that_is_not_there_is_misuse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["submit", "pretrain", "--data.source", "nowhere"]) == 2
    assert "data.source: nothing is at" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", ["list", "--help"])
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("| true", 128 + signal.SIGPIPE, ""),
        (">&-", 0, ""),
        ("2>&- >&-", 0, ""),
        ("> /dev/full", 1, "error: cannot write the output: No space left on device;"),
    ],
    ids=["a reader that is gone", "closed", "both closed", "a full disk"],
)
def test_an_output_that_takes_nothing_is_no_traceback(
    words: str, redirected: str, code: int, said: str, tmp_path: Path
) -> None:
    jobs = tmp_path / ".raymill/runs/second/jobs/20260101-000000-abcd"
    jobs.mkdir(parents=True)
    (jobs / "started.json").write_text(
        '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
    )
    (jobs / "ended.json").write_text(
        '{"exit_code": 0, "stopped": false, "result": null, "time": 2.0}'
    )
    reader = "sleep 0.1; " if "|" in redirected else ""  # the pipe's other end is closed by then
    command = f"({reader}exec {shlex.join(RAYMILL)} {words}) {redirected}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=environment() | {"PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=limit_s(60),
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == bool(said), done.stderr


def test_an_ascii_output_shows_other_characters_as_escapes(tmp_path: Path) -> None:
    jobs = tmp_path / ".raymill/runs/zwölf/jobs/20260101-000000-abcd"
    jobs.mkdir(parents=True)
    (jobs / "started.json").write_text(
        '{"job": "j", "stage": "pretrain", "host": "desk", "time": 1.0}'
    )
    (jobs / "ended.json").write_text(
        '{"exit_code": 0, "stopped": false, "result": null, "time": 2.0}'
    )
    done = raymill("list", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("zw\\xf6lf  ")


def test_a_checkpoint_is_shown(tmp_path: Path) -> None:
    metadata = write_tiny(tmp_path / "step-1")
    done = raymill("checkpoint", "show", "step-1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shown = last_json(done.stdout)
    assert (shown["valid"], shown["problems"]) == (True, [])
    assert shown["parameter_hash"] == metadata.parameter_hash
    assert shown["checkpoint"] == str(tmp_path / "step-1")
    assert shown["files"] == {
        path.name: path.stat().st_size for path in (tmp_path / "step-1").iterdir()
    }


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "raymill.json", "tokenizer.json"]
)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_shown_with_its_problem(
    tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "step-1")
    damage(tmp_path / "step-1", name, how)
    assert main(["checkpoint", "show", "step-1", "--json"]) == 0
    shown = last_json(capsys.readouterr().out)
    assert shown["valid"] is False
    assert len(shown["problems"]) == 1
    assert name in shown["problems"][0]
    assert shown["parameter_hash"] is None  # what raymill.json says is not to be trusted


def test_a_torn_checkpoint_is_not_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(tmp_path / "step-1")
    (tmp_path / "step-1" / MANIFEST).unlink()
    assert main(["checkpoint", "show", "step-1", "--json"]) == 0
    shown = last_json(capsys.readouterr().out)
    assert (shown["valid"], MANIFEST in shown["problems"][0]) == (False, True)


def test_publish_then_list_then_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = [write_tiny(tmp_path / f"step-{step}", step=step).parameter_hash for step in (1, 2)]
    for step in (1, 2):
        assert main(["publish", f"step-{step}", "--json"]) == 0
        assert last_json(capsys.readouterr().out)["parameter_hash"] == hashes[step - 1]
    assert main(["checkpoint", "list", "--json"]) == 0
    published = last_json(capsys.readouterr().out)["published"]
    assert [entry["parameter_hash"] for entry in published] == hashes
    assert main(["checkpoint", "show", "latest"]) == 0
    assert str(hashes[1]) in capsys.readouterr().out


def test_what_is_not_as_it_should_be_has_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run compared with itself, and with one whose fifth loss is another."""
    runs = tmp_path / ".raymill/runs"
    for name, loss in (("a", 1.0), ("b", 1.25)):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.yaml").write_text("model: {preset: tiny}\n")
        lines = [{"step": step, "loss": loss if step == 5 else 1.0} for step in range(1, 8)]
        (runs / name / "ledger.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    assert main(["diff", "a", "a", "--json"]) == 0
    assert last_json(capfd.readouterr().out)["verdict"] == "equal for 7 steps"
    assert main(["diff", "a", "b", "--json"]) == 1
    captured = capfd.readouterr()
    result = last_json(captured.out)
    assert (result["equal"], result["step"], result["fields"]) == (False, 5, {"loss": [1.0, 1.25]})
    assert captured.err == f"diff: {runs}/a and {runs}/b\n"
    assert main(["diff", "a", "b"]) == 1
    assert ["loss", "1", "1.25"] in [line.split() for line in capfd.readouterr().out.splitlines()]
    assert main(["diff", "a", "c"]) == 1
    captured = capfd.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("error: unknown run 'c'")
    assert main(["replay", "a", "--steps", "5..3"]) == 2
