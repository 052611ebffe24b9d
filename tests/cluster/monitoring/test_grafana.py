"""Raymill's requests to Grafana, against a recording stub and, if GRAFANA_URL is set, a real
Grafana."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.monitoring import grafana
from cluster.monitoring.files import documents
from cluster.monitoring.grafana import Annotation, Annotator, Grafana, GrafanaError, differences
from cluster.settings.parser import ConfigError
from tests.cluster.grafana_stub import GrafanaStub, grafana_stub
from tests.command_line import raymill_here

KILL = Annotation(
    time_s=1700000000.5, kind="kill", subject="run:demo", text="rank 1 & its node died"
)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[GrafanaStub]:
    monkeypatch.setattr(grafana, "RETRIES_AFTER_S", (0.01, 0.01, 0.01))
    with grafana_stub() as stub:
        monkeypatch.setenv("GRAFANA_URL", stub.url)
        monkeypatch.setenv("GRAFANA_TOKEN", stub.token)
        yield stub


def test_push_diff_push(stub: GrafanaStub, capsys: pytest.CaptureFixture[str]) -> None:
    push = ("dashboards", "push", "--prometheus-url", "http://prometheus:9090")
    code, result, _ = raymill_here(*push, capsys=capsys)
    assert (code, set(result.values())) == (0, {"created"})
    assert result.keys() == {"folder", "data source", *documents()}
    assert stub.kept["/dashboards/uid/raymill-training"]["dashboard"]["panels"]
    assert not any("/id/" in path or path.endswith("/datasources/1") for _, path in stub.requests)

    stub.requests.clear()
    code, result, _ = raymill_here(*push, capsys=capsys)
    assert (code, set(result.values())) == (0, {"unchanged"})
    assert {method for method, _ in stub.requests} == {"GET"}
    code, result, _ = raymill_here("dashboards", "diff", capsys=capsys)
    assert code == 0 and result["equal"] is True

    stub.kept["/dashboards/uid/raymill-cost"]["dashboard"]["panels"][1]["title"] = "changed by hand"
    del stub.kept["/dashboards/uid/raymill-slo"]
    code, result, _ = raymill_here("dashboards", "diff", capsys=capsys)
    assert (code, result["equal"]) == (1, False)
    assert (result["raymill-cost"], result["raymill-slo"]) == (["panels[1].title"], ["missing"])
    _, result, _ = raymill_here(
        *push[:2], "--prometheus-url", "http://elsewhere:9090", capsys=capsys
    )
    expected = {"data source": "updated", "raymill-cost": "updated", "raymill-slo": "created"}
    assert {name: how for name, how in result.items() if how != "unchanged"} == expected


@pytest.mark.parametrize(
    "failure",
    [
        (503, '{"message": "starting"}'),
        (502, "<html>a message</html>"),
        (429, '{"message": "slow down"}'),
    ],
)
def test_what_may_help_is_tried_again(failure: tuple[int, str], stub: GrafanaStub) -> None:
    stub.failures = [failure] * 3
    assert Grafana.from_environment().push_folder() == "created"
    stub.failures = [failure] * 4
    with pytest.raises(GrafanaError, match="does not answer GET /folders/raymill"):
        Grafana.from_environment().push_folder()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ((403, '{"message": "no permission"}'), "no permission"),
        ((200, "<html>Sign in</html>"), "else than JSON"),
    ],
)
def test_what_cannot_help_is_told_at_once(
    failure: tuple[int, str], words: str, stub: GrafanaStub
) -> None:
    stub.failures = [failure]
    with pytest.raises(GrafanaError, match=words):
        Grafana.from_environment().push_folder()
    assert len(stub.requests) == 1


def test_an_answer_without_a_body_is_one(stub: GrafanaStub) -> None:
    stub.failures = [(204, "")]
    assert Grafana.from_environment().push_folder() == "unchanged"


def test_an_annotation_is_there_once_also_where_the_answer_is_lost(stub: GrafanaStub) -> None:
    stub.lost_answers = 1
    assert [Grafana.from_environment().annotate(KILL) for _ in range(2)] == [
        "unchanged",
        "unchanged",
    ]
    expected = {
        "time": 1700000000500,
        "tags": ["raymill", "kill", "run:demo"],
        "text": "rank 1 & its node died",
    }
    assert stub.annotations == [expected]


def test_a_grafana_that_is_away_holds_up_nobody(
    stub: GrafanaStub, capsys: pytest.CaptureFixture[str]
) -> None:
    annotator = Annotator.from_environment()
    assert annotator is not None
    stub.failures = [(503, "")] * 8
    for _ in range(3):
        annotator.add(KILL)
    annotator.close()
    assert len(stub.annotations) == 1
    assert capsys.readouterr().err.count("not annotated") == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "set GRAFANA_URL"),
        ({"GRAFANA_URL": "http://x"}, "GRAFANA_TOKEN"),
        ({"GRAFANA_URL": "x", "GRAFANA_TOKEN": "t"}, "expected a URL"),
        ({"GRAFANA_URL": "http://x", "GRAFANA_TOKEN_FILE": "/nowhere"}, "No such file"),
    ],
)
def test_a_misuse_is_told_and_leaves_with_2(
    variables: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("GRAFANA_URL", "GRAFANA_TOKEN", "GRAFANA_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, error = raymill_here("dashboards", "push", capsys=capsys)
    assert code == 2 and words in error
    with pytest.raises(ConfigError):
        Grafana.from_environment()
    assert Annotator.from_environment() is None  # and training continues without


def test_the_token_may_lie_in_a_file(
    stub: GrafanaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFANA_TOKEN")
    monkeypatch.setenv("GRAFANA_TOKEN_FILE", str(tmp_path / "token"))
    for token, expected in ((stub.token, "created"), ("wrong", None)):
        (tmp_path / "token").write_text(f"{token}\n")
        if expected:
            assert Grafana.from_environment().push_folder() == expected
        else:
            with pytest.raises(GrafanaError, match="refused GET /folders/raymill: Unauthorized"):
                Grafana.from_environment().push_folder()


def test_differences_are_those_that_matter() -> None:
    wanted = {"a": [1, {"b": 2}], "c": None}
    assert differences(wanted, {"a": [1, {"b": 2, "id": 3}], "version": 4}) == []
    assert differences(wanted, {"a": [1, {"b": 3}]}) == ["a[1].b"]
    assert differences(wanted, {"a": [1]}) == ["a"]


@pytest.mark.skipif(
    "GRAFANA_URL" not in os.environ,
    reason="no GRAFANA_URL: a real Grafana is asked only where named",
)
def test_a_real_grafana_keeps_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert raymill_here("dashboards", "push", capsys=capsys)[0] == 0
    assert raymill_here("dashboards", "diff", capsys=capsys)[0] == 0
    _, result, _ = raymill_here("dashboards", "push", capsys=capsys)
    assert set(result.values()) == {"unchanged"}
    note = Annotation(time.time(), "checkpoint", "run:test", "made by raymill's test")
    assert [Grafana.from_environment().annotate(note) for _ in range(2)] == ["created", "unchanged"]
