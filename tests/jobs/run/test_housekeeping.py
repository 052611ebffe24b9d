"""A run is deleted by name, and what no run needs is found; nothing goes that something else rests
on."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.cli import main
from cluster.settings.run import RunConfig, to_yaml
from cluster.stages.run_mirrored import lease_key
from cluster.storage.lease import Lease
from cluster.storage.registry import publish
from cluster.storage.uris import open_storage
from model.text.tokenizer import train_bpe
from tests.checkpoints import write_tiny
from tests.jobs.runs import make_store, make_text

pytestmark = pytest.mark.more


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs, of which `third` began from `first`, the latest is of `second`, and `empty` never
    took a step."""
    root = tmp_path / "store"
    text = make_text(300)
    identities = []
    for name, vocab_size in (("used", 300), ("unused", 280)):
        tokenizer = train_bpe([text], vocab_size=vocab_size)
        identities.append(make_store(str(root), tokenizer, {"train": text}).identity)
        (root / "tokens/made").rename(root / f"tokens/{name}")
    start = str(root / "runs/first/checkpoints/step-000000001-0001")
    for name, init_from in (("first", None), ("second", None), ("third", start)):
        write_tiny(root / f"runs/{name}/checkpoints/step-000000001-0001", run_id=name)
        values = {"run_id": name, "model": {"preset": "tiny"}, "train": {"init_from": init_from}}
        (root / f"runs/{name}/config.yaml").write_text(to_yaml(RunConfig.model_validate(values)))
        lines = ({"event": "start", "data_identity": identities[0]}, {"step": 1, "loss": 1.0})
        (root / f"runs/{name}/ledger.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in lines)
        )
    publish(open_storage(str(root)), str(root / "runs/second/checkpoints/step-000000001-0001"))
    torn = root / "runs/third/checkpoints/step-000000002-0001"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"part")
    (root / "runs/empty").mkdir()
    (root / "runs/empty/config.yaml").write_text(
        to_yaml(RunConfig.model_validate({"run_id": "empty"}))
    )
    return root


def asked(capsys: pytest.CaptureFixture[str], root: Path, *words: str, code: int = 0) -> Any:
    """Returns the result, or the error."""
    assert main([*words, "--storage.uri", str(root), "--json"]) == code
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]) if code == 0 else said.err


def test_what_nothing_needs_is_named_and_then_deleted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = asked(capsys, root, "gc")
    found = {str(Path(row["uri"]).relative_to(root)): row["why"] for row in named["leftovers"]}
    assert found == {
        "runs/empty": "it has no step",
        "runs/third/checkpoints/step-000000002-0001": "it was never complete",
        "tokens/unused": "no run was trained on it",
    }
    assert named["deleted"] is False and all((root / name).exists() for name in found)
    assert asked(capsys, root, "gc", "--yes")["deleted"] is True
    assert not any((root / name).exists() for name in found)
    assert (root / "tokens/used").exists()
    assert asked(capsys, root, "gc")["leftovers"] == []


def test_a_base_goes_once_neither_an_adapter_nor_an_endpoint_needs_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("frozen", "served", "unused"):
        write_tiny(root / f"bases/{name}", run_id="base")
    base = {"uri": str(root / "bases/frozen"), "parameter_hash": "ab", "source": "somewhere"}
    (root / "runs/first/base.json").write_text(json.dumps(base))
    (root / "endpoints").mkdir()
    pinned = {"pinned": [str(root / "bases/served")]}
    (root / "endpoints/completions.json").write_text(json.dumps(pinned))
    named = {row["uri"]: row["why"] for row in asked(capsys, root, "gc")["leftovers"]}
    bases = {uri: why for uri, why in named.items() if "/bases/" in uri}
    assert bases == {str(root / "bases/unused"): "no adapter stands on it"}


def test_a_run_that_waits_or_runs_is_left_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {
        "run_id": "empty",
        "stage": "pretrain",
        "backend": "kuberay",
        "where": "raymill",
        "job": "j",
        "number": 1,
    }
    (root / "runs/empty/jobs").mkdir()
    (root / "runs/empty/jobs/submitted.json").write_text(json.dumps(record | {"submitted": 1.0}))
    assert "runs/empty" not in str(asked(capsys, root, "gc")["leftovers"])
    with Lease(open_storage(str(root / "runs/third")), lease_key("pretrain")):
        assert "runs/third is running (pretrain)" in asked(capsys, root, "gc", code=1)
        assert "is running (pretrain): `raymill stop` ends it first" in asked(
            capsys, root, "delete", "third", code=1
        )


def test_a_run_is_deleted_unless_something_rests_on_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is what run third began from" in asked(capsys, root, "delete", "first", "--yes", code=1)
    assert "is latest" in asked(capsys, root, "delete", "second", "--yes", code=1)
    pinned = {"pinned": [str(root / "runs/third/checkpoints/step-000000001-0001")]}
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        name = f"127.0.0.1-{server.server_port}"
        for folder in ("endpoints", "endpoints/last-good"):
            (root / folder).mkdir()
            (root / folder / f"{name}.json").write_text(json.dumps(pinned))
        said = asked(capsys, root, "delete", "third", "--yes", code=1)
        assert "is served, or what the endpoint" in said
        assert f"`raymill delete --endpoint {name} --storage.uri {root}`" in said
        Thread(target=server.handle_request, daemon=True).start()
        said = asked(capsys, root, "delete", "--endpoint", name, "--yes", code=1)
        assert f"something answers at http://127.0.0.1:{server.server_port}" in said
    told = asked(capsys, root, "delete", "--endpoint", name)
    assert (told["kept_for_it"], told["checked"], told["forgotten"]) == (
        pinned["pinned"],
        True,
        False,
    )
    assert len(told["files"]) == 2 and all(Path(file).exists() for file in told["files"])
    assert asked(capsys, root, "delete", "--endpoint", name, "--yes")["forgotten"] is True
    assert not any(Path(file).exists() for file in told["files"])
    assert f"no endpoint '{name}'" in asked(capsys, root, "delete", "--endpoint", name, code=1)
    assert asked(capsys, root, "delete", "third")["deleted"] is False
    assert (root / "runs/third/ledger.jsonl").exists()
    assert asked(capsys, root, "delete", "third", "--yes")["deleted"] is True
    assert not (root / "runs/third").exists()
    assert asked(capsys, root, "delete", "first", "--yes")["deleted"] is True
    assert "no run first in" in asked(capsys, root, "delete", "first", code=1)


CHECKPOINT = "runs/first/checkpoints/step-000000001-0001"
WAYS = {
    "path": f"ROOT/{CHECKPOINT}",
    "slash": f"ROOT/{CHECKPOINT}/",
    "uri": f"file://ROOT/{CHECKPOINT}",
    "run": "ROOT/runs/first",
    "dots": f"ROOT/runs/../{CHECKPOINT}",
    "link-to-storage": f"LINKS/store/{CHECKPOINT}",
    "link-to-checkpoint": "LINKS/checkpoint",
    "link-out-of-the-run": "LINKS/store/runs/first/elsewhere/weights",
    "link-through-the-run": "LINKS/through/weights",
}
"""A location in the run `first`, as settings may name it."""


@pytest.fixture
def links(root: Path, tmp_path: Path) -> Path:
    """A folder of links into the storage; a folder of the run `first` is a link out of it."""
    links = tmp_path / "links"
    (links / "disk").mkdir(parents=True)
    (root / "runs/first/elsewhere").symlink_to("../../../links/disk")
    for name, target in (
        ("store", root),
        ("checkpoint", root / CHECKPOINT),
        ("through", root / "runs/first/elsewhere"),
        ("tokens", root / "tokens/unused"),
    ):
        (links / name).symlink_to(target)
    return links


def configure(root: Path, links: Path, run: str, **settings: dict[str, Any]) -> None:
    """Replaces the run's recorded settings."""
    config = to_yaml(RunConfig.model_validate({"run_id": run, **settings}))
    config = config.replace("ROOT", str(root)).replace("LINKS", str(links))
    (root / f"runs/{run}/config.yaml").write_text(config)


@pytest.mark.parametrize("way", WAYS)
def test_delete__keeps_what_another_run_began_from_however_it_is_written(
    root: Path, links: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(root, links, "third", train={"init_from": WAYS[way]})
    assert "is what run third began from" in asked(capsys, root, "delete", "first", "--yes", code=1)
    assert "is what run third began from" in asked(
        capsys, links / "store", "delete", "first", "--yes", code=1
    )
    assert (root / "runs/first/ledger.jsonl").exists()
    configure(root, links, "third", train={"init_from": f"{root}/runs/first-of-all"})
    assert asked(capsys, root, "delete", "first", "--yes")["deleted"] is True


@pytest.mark.parametrize(
    "data",
    [
        {"source": ["tokens://LINKS/store/runs/first"]},
        {"validation": {"texts": "LINKS/checkpoint"}},
    ],
    ids=["source", "validation"],
)
def test_delete__keeps_a_run_whose_folder_holds_what_another_one_reads(
    root: Path, links: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    configure(root, links, "third", data=data)
    assert "is what run third reads" in asked(capsys, root, "delete", "first", "--yes", code=1)


@pytest.mark.parametrize(
    "data",
    [
        {"tokenizer": "ROOT/tokens/unused/tokenizer.json"},
        {"tokenizer": "ROOT/tokens/unused/"},
        {"tokenizer": "file://ROOT/tokens/unused/tokenizer.json"},
        {"tokenizer": "LINKS/tokens/tokenizer.json"},
        {"tokenizer": "LINKS/store/runs/../tokens/unused"},
        {"source": ["tokens://ROOT/tokens/unused"]},
        {"source": ["tokens://LINKS/tokens"]},
        {"validation": {"texts": "tokens://LINKS/store/tokens/unused"}},
    ],
    ids=str,
)
def test_gc__keeps_a_token_store_that_a_run_names_however_it_is_written(
    root: Path, links: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tokens/unused" in str(asked(capsys, root, "gc")["leftovers"])
    configure(root, links, "third", data=data)
    for storage in (root, links / "store"):
        left = asked(capsys, storage, "gc")["leftovers"]
        assert left and "tokens/unused" not in str(left)


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        ("LINKS/disk", "LINKS/texts"),
        ("LINKS/texts", "LINKS/disk"),
        (f"hf://datasets/o/texts@{'0a' * 20}", "hf://datasets/o/texts@main"),
    ],
)
def test_gc__keeps_the_store_of_validation_texts_however_they_are_written(
    root: Path, links: Path, listed: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (links / "texts").symlink_to("disk")
    sources = json.dumps({"sources": [listed.replace("LINKS", str(links))]})
    (root / "tokens/unused/sources.json").write_text(sources)
    configure(root, links, "third", data={"source": [named]})
    assert "tokens/unused" in str(asked(capsys, root, "gc")["leftovers"])
    configure(root, links, "third", data={"validation": {"texts": named}})
    assert "tokens/unused" not in str(asked(capsys, root, "gc")["leftovers"])


def test_gc__keeps_a_run_without_a_step_that_another_one_began_from(
    root: Path, links: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "runs/empty" in str(asked(capsys, root, "gc")["leftovers"])
    configure(root, links, "third", train={"init_from": "LINKS/store/runs/empty"})
    assert "runs/empty" not in str(asked(capsys, root, "gc")["leftovers"])
