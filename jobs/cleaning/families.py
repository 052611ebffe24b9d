"""Joins the families of near-duplicates that span sections, whose similar pairs are links between
documents.

Each turn replaces a document's links by links to the least document that it knows, until every
family is a star around its first one (Kiveris et al., Connected Components in MapReduce and Beyond,
2014: large-star and small-star by turns, with no more links than in the beginning, in O(log^2 D)
turns for D documents, whatever the shape of a family).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np

from jobs.cleaning.disk_buckets import BucketFile, Records
from jobs.cleaning.duplicates import ROW, ROWS
from jobs.cleaning.exchange import Exchange, Piece, Runner, Section, run_step
from jobs.corpus.text_hashes import Hashes

LINK = np.dtype([*ROWS.descr, ("other", "<u8")])  # a document of a section, and one anywhere


def document(section: int | Records, row: Records) -> Hashes:
    """Returns numbers for documents (D,), which are in canonical order."""
    return np.asarray(section, np.uint64) << np.uint64(32) | row.astype(np.uint64)


def link(left: Hashes, right: Hashes) -> Records:
    """Returns the links between pairs of documents, each from both ends."""
    apart = left != right
    left, right = left[apart], right[apart]
    here, there = np.concatenate([left, right]), np.concatenate([right, left])
    return np.rec.fromarrays([here >> 32, here.astype(ROW), there], dtype=LINK)


def join_families(
    links: Exchange, sections: Sequence[Section], sizes: Sequence[int], *, run: Runner
) -> Exchange:
    """Returns the links of the stars; `links` and these are answers of each section to each, and
    `sizes` the documents of each chunk."""
    for turn in count(1):
        stars = replace(links, name=f"{links.name}-{turn}")
        work = partial(_turn, sizes=sizes, links=links, stars=stars, is_large=turn % 2 == 1)
        num_crossed = run_step(f"joining near-duplicates, turn {turn}", sections, work, run=run)
        if num_crossed == 0:
            break
        links = stars
    return links


def later_members(section: Section, *, stars: Exchange) -> Records:
    """Returns the rows of a section, in order, that are not the first of their family; one may be
    repeated."""
    rows = [np.empty(0, ROW)]
    for links in stars.answers(section.number, LINK):
        is_later = links["other"] < document(section.number, links["row"])
        rows.append(links["row"][is_later])
    return np.sort(np.concatenate(rows))


def _turn(
    section: Section, *, sizes: Sequence[int], links: Exchange, stars: Exchange, is_large: bool
) -> bytes:
    """Links the later neighbors of each document, or the earlier ones and itself, to the first of
    all its neighbors.

    Returns the number of links, in decimal digits, that keep a family from being a star."""
    num_documents = sum(sizes[chunk] for chunk in section.chunks)
    documents = document(section.number, np.arange(num_documents))
    first_neighbors = documents.copy()
    for batch in links.answers(section.number, LINK):
        np.minimum.at(first_neighbors, batch["row"], batch["other"])
    num_crossed = 0
    for batch in links.answers(section.number, LINK):
        center = documents[batch["row"]]
        first = first_neighbors[batch["row"]]
        is_crossed = (first < center) & (first != batch["other"])
        num_crossed += int(np.count_nonzero(is_crossed))

    def pieces() -> Iterator[Piece]:
        with BucketFile(LINK, num_buckets=stars.num_sections) as buckets:
            for batch in links.answers(section.number, LINK):
                center = documents[batch["row"]]
                first = first_neighbors[batch["row"]]
                other = batch["other"]
                chosen = (other > center) == is_large
                moved = other if is_large else np.where(other == first, center, other)
                buckets.add(link(moved[chosen], first[chosen]))
            yield from buckets.pieces()

    stars.answer(section.number, pieces())
    return b"%d" % num_crossed
