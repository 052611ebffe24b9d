"""A corpus of what people, exporters and disks do to files, with what must be kept of it and why
the rest is dropped."""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

MAX_DOCUMENT_BYTES = 200_000
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01"
ELF = b"\x7fELF\x02\x01\x01\x00\x00\x00"


def line(text: Any, **others: Any) -> bytes:
    return json.dumps({"text": text} | others).encode() + b"\n"


@dataclass
class HostileCorpus:
    """Files under `folder`; `kept` and `drops` have what is expected of them."""

    folder: Path
    kept: list[str] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    _fresh: int = 0

    def fresh(self, words: str = "a text of its own") -> str:
        """Returns a text that occurs nowhere else in the corpus, and is to be kept."""
        self._fresh += 1
        self.kept.append(f"{words} {self._fresh}")
        return self.kept[-1]

    def add(self, name: str | bytes, content: bytes, *, drops: Iterable[str] = ()) -> None:
        path = Path(os.fsdecode(os.fsencode(self.folder) + b"/" + os.fsencode(name)))
        path.write_bytes(content)
        self.drops.update(drops)


def make_hostile_corpus(folder: Path) -> HostileCorpus:
    folder.mkdir(parents=True)
    corpus = HostileCorpus(folder)
    _add_texts(corpus)
    _add_lines(corpus)
    _add_archives(corpus)
    _add_tables(corpus)
    _add_csv(corpus)
    _add_names(corpus)
    return corpus


def _add_texts(corpus: HostileCorpus) -> None:
    add, fresh = corpus.add, corpus.fresh
    add("empty.txt", b"", drops=["empty"])
    add("blank.txt", b"\r\n \t\n", drops=["empty"])
    add("png.txt", PNG, drops=["binary"])
    add("elf.txt", ELF * 50, drops=["binary"])
    add("a-utf-16.txt", "in UTF-16".encode("utf-16"), drops=["binary"])
    add("a-utf-16-without-a-NUL.txt", "\ufeff你好世界".encode("utf-16-be"), drops=["binary"])
    add("bom.txt", b"\xef\xbb\xbf" + fresh("after a byte order mark").encode())
    add("crlf.txt", fresh("one line\r\nand another\r\n").encode())
    add("latin-1.txt", b"caf\xe9 noir")
    corpus.kept.append("caf\ufffd noir")
    add("special.txt", fresh("the text <|endoftext|><|endoftext|> is text").encode())
    add("escapes.txt", fresh("\x1b[31mred\x1b[0m \u202e\u200d \x07").encode())


def _add_lines(corpus: HostileCorpus) -> None:
    deep = b'{"text": "deep", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    wide = line(corpus.fresh(), **{f"field{n}": n for n in range(100_000)})
    bad = {
        b'{"text": "no end\n': "invalid_json",
        deep: "invalid_json",
        line(None): "missing_text",
        line(7): "missing_text",
        line(["a", "list"]): "missing_text",
        b'{"body": "another field"}\n': "missing_text",
        line("long " * 50_000): "too_long",
        line("\x00"): "binary",
        line("  "): "empty",
    }
    good = [line(corpus.fresh()) for _ in bad]
    # The same text in another case, with other blanks, and with its accents apart.
    same = [
        line(corpus.fresh("Café CRÈME")),
        line(f"  café\u00a0crème\r\n{corpus._fresh} "),
        line(""),
    ]
    same[2] = line(corpus.kept[-1].replace("é", "e\u0301").replace("È", "E\u0300"))
    mixed = b"".join(part for pair in zip(bad, good, strict=True) for part in pair)
    corpus.add(
        "lines.jsonl",
        mixed + wide + b"".join(same),
        drops=[*bad.values(), "duplicate", "duplicate"],
    )
    corpus.add(
        "crlf.jsonl",
        b"\xef\xbb\xbf"
        + line(corpus.fresh()).replace(b"\n", b"\r\n\r\n")
        + line(corpus.fresh())[:-1],
    )
    corpus.add("empty.jsonl", b"")
    corpus.add("utf-16.jsonl", '{"text": "x"}'.encode("utf-16"), drops=["binary"])


def _add_archives(corpus: HostileCorpus) -> None:
    for ending, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        corpus.add(f"members.jsonl{ending}", b"".join(pack(line(corpus.fresh())) for _ in range(3)))
        corpus.add(f"a.txt{ending}", pack(corpus.fresh().encode()))
        corpus.add(f"empty.txt{ending}", b"", drops=["empty"])


def _add_tables(corpus: HostileCorpus) -> None:
    texts = pa.string()
    pq.write_table(pa.table({"text": pa.array([], texts)}), corpus.folder / "no-rows.parquet")
    with pq.ParquetWriter(
        corpus.folder / "empty-groups.parquet", pa.schema({"text": texts})
    ) as writer:
        for rows in ([], [corpus.fresh()], [], [corpus.fresh(), corpus.fresh()], []):
            writer.write_table(pa.table({"text": pa.array(rows, texts)}), row_group_size=10)
    for name, dictionary in (("plain", False), ("dictionary", True)):
        rows = [corpus.fresh("a row " * 20) for _ in range(300)]
        table = pa.table(
            {
                "meta": [{"tags": ["x", str(n)], "depth": {"n": n}} for n in range(300)],
                "text.en": ["not this column"] * 300,
                "text": pa.array(rows, pa.large_string()),
            }
        )
        path = corpus.folder / f"{name}.parquet"
        pq.write_table(
            table, path, row_group_size=40, use_dictionary=dictionary, compression="none"
        )
    rows = [corpus.fresh().encode(), None, b"", PNG, b"x" * (MAX_DOCUMENT_BYTES + 1)]
    pq.write_table(pa.table({"text": pa.array(rows, pa.binary())}), corpus.folder / "bytes.parquet")
    corpus.drops.update(["missing_text", "empty", "binary", "too_long"])


def _add_csv(corpus: HostileCorpus) -> None:
    add, fresh = corpus.add, corpus.fresh
    rows = [
        "number,text,more",
        f'1,"{fresh("with, comma")}"',
        "2",  # too short
        "3,a comma that, nobody, quoted",
        f'4,"{fresh("two" + chr(10) + "lines")}"',
        f"5,{fresh(chr(53) + chr(34) + ' of rain')}",  # a quote within a field is a character
        f"6,{fresh()}",
        f"7,{fresh('another 3' + chr(34))}",
        "8," + "x" * (MAX_DOCUMENT_BYTES + 1),
        f"9,{fresh()}",
    ]
    add("rows.csv", "\n".join(rows).encode(), drops=["missing_text", "invalid_csv", "too_long"])
    add("old-mac.csv", f"text,n\r{fresh()},1\r{fresh()},2\r".encode())
    add("empty.csv", b"")
    add(
        "stray-quote.csv",
        f'text\n{fresh()}\n"never closed\n{fresh()}\n'.encode(),
        drops=["invalid_csv"],
    )


def _add_names(corpus: HostileCorpus) -> None:
    names: list[str | bytes] = [
        "a..b",
        "名前 😀",
        "x" * 190,
        "a#b",
        "100%25 a",
        "two\nlines",
        "[x]*?",
        " lead",
        b"caf\xe9",
    ]
    for name in names:
        corpus.add(name + (b".txt" if isinstance(name, bytes) else ".txt"), corpus.fresh().encode())
    corpus.add("forged\nraymill-result: {}.md", b"left out")
    os.mkfifo(corpus.folder / "pipe.txt")
    (corpus.folder / "loop.txt").symlink_to("loop.txt")
    (corpus.folder / "nowhere.txt").symlink_to("gone.txt")
    (corpus.folder / "folder").mkdir()
    (corpus.folder / "folder" / "up").symlink_to(corpus.folder)
