"""Families across sections: the connected components of any graph, in few turns."""

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.uris import open_storage
from jobs.cleaning.disk_buckets import BucketFile
from jobs.cleaning.exchange import Exchange, sections_of
from jobs.cleaning.families import LINK, document, join_families, later_members, link
from tests.jobs.cleaning.in_process import MEMORY, InProcess

SIZE = 50  # documents of each section
Pairs = list[tuple[int, int]]


def later_than_first(
    folder: str, pairs: Pairs, *, num_sections: int, seed: int = 0
) -> tuple[list[int], int]:
    """Returns the documents that are not the first of their family, and the number of turns. Any
    section may find a pair."""
    sizes = [SIZE] * num_sections
    links = Exchange(open_storage(folder), "links", num_sections, num_sections)
    found: list[Pairs] = [[] for _ in sizes]
    rng, run = random.Random(seed), InProcess(seed)
    for pair in pairs:
        rng.choice(found).append(pair)

    def pieces(own: Pairs) -> Iterator[Iterator[bytes]]:
        with BucketFile(LINK, num_buckets=num_sections) as buckets:
            places = np.array(own, np.uint64).reshape(-1, 2)
            buckets.add(link(*document(places // SIZE, places % SIZE).T))
            yield from buckets.pieces()

    for number, own in enumerate(found):
        links.answer(number, pieces(own))
    sections = sections_of(sizes, least=1)
    stars = join_families(links, sections, sizes, run=run)
    rows = [SIZE * section.number + later_members(section, stars=stars) for section in sections]
    return np.unique(np.concatenate(rows)).tolist(), run.num_tasks // num_sections


def expected(pairs: Pairs, num_documents: int) -> list[int]:
    first = list(range(num_documents))
    for pair in pairs:
        families = {first[place] for place in pair}
        first = [min(families) if family in families else family for family in first]
    return [place for place, family in enumerate(first) if family != place]


@given(
    num_sections=st.integers(1, 5),
    pairs=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), max_size=250),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_all_but_the_first_of_each_component_are_found(
    num_sections: int, pairs: Pairs, seed: int
) -> None:
    pairs = [(left % (SIZE * num_sections), right % (SIZE * num_sections)) for left, right in pairs]
    with TemporaryDirectory(dir=MEMORY) as folder:
        found, _ = later_than_first(folder, pairs, num_sections=num_sections, seed=seed)
    assert found == expected(pairs, SIZE * num_sections)


@pytest.mark.parametrize(
    ("shape", "most"),
    [("path in order", 20), ("path in any order", 20), ("crowd", 3), ("tree", 20), ("none", 1)],
)
def test_turns_are_few_whatever_the_shape(shape: str, most: int, tmp_path: Path) -> None:
    """A rule that looks at neighbors alone would take a turn for each of the 399 links of a
    path."""
    places = list(range(400))
    if shape != "path in order":
        random.Random(1).shuffle(places)
    crowd = [(17, place) for place in places if place != 17]
    tree = [(places[number], places[(number - 1) // 2]) for number in range(1, len(places))]
    pairs = {"crowd": crowd, "tree": tree, "none": []}.get(shape, list(pairwise(places)))
    found, num_turns = later_than_first(str(tmp_path), pairs, num_sections=8)
    assert found == (list(range(1, 400)) if pairs else [])
    assert num_turns <= most
