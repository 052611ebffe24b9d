"""The quality rules: for each a text that just passes and one that just fails."""

from typing import get_args

import pytest

from cluster.settings.data import QualityRule
from jobs.cleaning.quality_rules import failed_rule

RULES = list(get_args(QualityRule))
PROSE = (
    "the cat and a dog went to see of what that house had been made before winter came again\n" * 4
)


def text_of(words: int, *, letters: int) -> str:
    """Returns words of three letters and longer ones, with `letters` letters in all."""
    rest, long = letters - 3 * words, 20
    return " ".join(
        ["a" * (3 + long)] * (rest // long)
        + ["a" * (3 + rest % long)]
        + ["aaa"] * (words - rest // long - 1)
    )


LINES = [f"line {number} of text" for number in range(10)]
EDGES: list[tuple[QualityRule, str, str]] = [
    ("word_count", "w " * 50, "w " * 49),
    ("word_count", "w\n" * 100_000, "w\n" * 100_001),
    ("word_length", text_of(100, letters=300), text_of(99, letters=297) + " aa"),
    ("word_length", text_of(100, letters=1000), text_of(100, letters=1001)),
    ("symbol_ratio", "word " * 9 + "#tag", "word " * 8 + "#tag"),
    ("symbol_ratio", "word " * 9 + "so...", "word " * 8 + "so..."),
    ("symbol_ratio", "word " * 9 + "so…", "word " * 8 + "so…"),
    ("symbol_ratio", "word " * 8 + "#tag so…", "word " * 7 + "#tag so…"),
    ("line_marks", "\n\n".join(["  • item"] * 9 + ["prose"]), "\n\n".join(["  • item"] * 10)),
    (
        "line_marks",
        "\n".join(["- item"] * 18 + ["prose"] * 2),
        "\n".join(["- item"] * 19 + ["prose"]),
    ),
    ("line_marks", "\n".join(LINES[:7] + ["more... "] * 3), "\n".join(LINES[:6] + ["more..."] * 4)),
    ("line_marks", "\r\n".join(LINES[:7] + ["more…"] * 3), "\r\n".join(LINES[:6] + ["more…"] * 4)),
    ("alphabetic_words", "word b2, (c) Ω! 5", "word b2, (c) 1, 5"),
    ("alphabetic_words", "a b c d 1 e f g h 2", "a b c d 1 e f g 3 2"),
    ("stop_words", "Two of them: The end", "two of them: of end"),
    ("stop_words", "HAVE\nwith,", "Having withal: tobe"),
]


@pytest.mark.parametrize(("rule", "passing", "failing"), EDGES)
def test_a_rule_at_its_edge(rule: QualityRule, passing: str, failing: str) -> None:
    assert failed_rule(passing, [rule]) is None
    assert failed_rule(failing, [rule]) == rule


def test_every_rule_has_an_edge_and_passes_prose() -> None:
    assert {rule for rule, _, _ in EDGES} == set(RULES)
    assert failed_rule(PROSE, RULES) is None


def test_the_first_of_the_rules_given_is_named() -> None:
    text = "## ## 1 2 3"
    assert failed_rule(text, ["alphabetic_words", "word_count"]) == "alphabetic_words"
    assert failed_rule(text, ["word_count", "alphabetic_words"]) == "word_count"
    assert failed_rule(text, []) is None


def test_text_without_words_fails_what_asks_for_words() -> None:
    assert [rule for rule in RULES if failed_rule(" \n", [rule])] == ["word_count", "stop_words"]
