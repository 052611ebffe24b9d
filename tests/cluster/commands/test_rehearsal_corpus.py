"""The text of a rehearsal: a small corpus as it is, of a large one as many bytes from each source, from all over it."""

import json
from pathlib import Path

import pytest

from cluster.commands import rehearsal
from cluster.commands.rehearsal import rehearsal_corpus
from tests.jobs.corpora import data_config


def test_a_large_corpus_is_sampled_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MAX_CORPUS_BYTES", 100_000)
    for name, word in (("a", "слово"), ("b", "word")):
        lines = [
            json.dumps({"text": f"{word} {number} {f'{word} ' * 50}"}, ensure_ascii=False) for number in range(2000)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    found = rehearsal_corpus(data_config(sources, tmp_path / "storage"), tmp_path / "corpus.jsonl")
    (made,) = map(Path, found["source"])
    assert found["rehearsed_bytes"] == made.stat().st_size
    texts = [json.loads(line)["text"] for line in made.read_text(encoding="utf-8").splitlines()]
    for word in ("слово", "word"):
        own = [text for text in texts if text.startswith(word)]
        assert sum(len(text.encode()) for text in own) == pytest.approx(50_000, rel=0.02)
        numbers = [int(text.split()[1]) for text in own]
        assert min(numbers) < 200
        assert max(numbers) > 1800


def test_a_small_corpus_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    config = data_config(f"{tmp_path}/a.txt", tmp_path / "storage")
    found = rehearsal_corpus(config, tmp_path / "corpus.jsonl")
    assert found == {"source": config.data.source, "source_bytes": 9, "rehearsed_bytes": 9}
