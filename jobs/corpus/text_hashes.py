"""Normalizes and hashes text for the cleaning of a corpus: whole documents, and their runs of
words.

The same text has the same hashes in every process and on every machine.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
_Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

HASH_BYTES = 16

_BLANK = ord(" ")
_ASCII = "".join(map(chr, range(128))).lower()
_FOLDED = "".join(" " if char.isspace() else char for char in _ASCII).encode() + bytes(
    range(128, 256)
)
_WIDE_BLANKS = (
    "\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)

# zero-width characters, direction marks, BOM
_INVISIBLE = "".join(map(chr, range(0x200B, 0x2010))) + "\u2060\ufeff"
_BLANK_TEXT = re.compile(  # the first byte decides for nearly every text: 0.3 us
    rb"(?:[\t-\r\x1c-\x20]|"
    + b"|".join(char.encode() for char in _WIDE_BLANKS + _INVISIBLE)
    + rb")*+"
)

_LONGEST_WORD_BYTES = 64  # bounds the rounds of hashing: a megabyte of base64 is one "word"
_UNSPACED_SCRIPTS = (
    (0xE0B8, 0xE0C0),  # Thai, Lao, Tibetan
    (0xE180, 0xE183),  # Burmese
    (0xE19E, 0xE1A0),  # Khmer
    (0xE2BA, 0xEA00),  # Han, kana, their punctuation
    (0xEFBC, 0xEFBF),  # full-width and half-width forms
    (0xF0A0, 0xF0B4),  # rare Han
)
"""Scripts without blanks between words: the first two bytes in UTF-8, from and up to which, in
order."""
_UNSPACED = np.array(_UNSPACED_SCRIPTS, dtype=np.uint16).reshape(-1)
# Masks of a little-endian word
_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)
_STEP = 0x9E3779B97F4A7C15


def normalized(text: str) -> bytes:
    """Returns the UTF-8 of the text in NFC, case folded, each run of white space one blank, none at
    the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).casefold()
        for blank in _WIDE_BLANKS:
            # A search takes 0.1 ms per MB; all of them take a sixth of a split at white space
            if blank in text:
                text = text.replace(blank, " ")
    folded = np.frombuffer(text.encode().translate(_FOLDED), dtype=np.uint8)
    kept = folded != _BLANK
    kept[1:] |= kept[:-1].copy()
    return folded[kept].tobytes().strip(b" ")


def is_blank(text: bytes) -> bool:
    """Reports whether UTF-8 text shows nothing: only Unicode's White_Space, zero-width characters
    and byte order marks.

    `normalized` is empty for no other text.
    """
    return _BLANK_TEXT.fullmatch(text) is not None


def document_hash(normalized: bytes) -> bytes:
    """Returns the first 16 bytes of the SHA-256."""
    return hashlib.sha256(normalized).digest()[:HASH_BYTES]


def word_ngrams(normalized: bytes, n: int) -> Hashes:
    """Returns the hash of each run of n words, in order, as `ngrams_by_text` does."""
    return ngrams_by_text([normalized], n)[0]


def ngrams_by_text(normalized: Sequence[bytes], n: int) -> tuple[Hashes, Places]:
    """Returns a hash for each run of n words, and the place of its text: one for a text with fewer
    words, none for no text. Many texts at once take a quarter of the time.

    Words end at blanks. In scripts without blanks between words (Chinese, Japanese, Thai, Lao,
    Tibetan, Burmese, Khmer) each character is a word, so that an insertion changes only the runs
    across it. A word of more than 64 bytes is cut into words of 64.
    """
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    borders = np.cumsum([len(text) + 1 for text in normalized if text])
    words, starts = _word_hashes(b" ".join(filter(None, normalized)))
    texts = np.flatnonzero([*map(len, normalized)])[np.searchsorted(borders, starts, side="right")]
    num_words = np.bincount(texts, minlength=len(normalized))
    for size in np.unique(np.minimum(num_words[num_words > 0], n)).tolist():
        first, last = texts[: len(texts) - size + 1], texts[size - 1 :]
        is_run = first == last if size == n else (first == last) & (num_words[first] == size)
        runs = np.full(len(first), size, dtype=np.uint64)
        for place in range(size):
            runs *= _STEP
            runs += words[place : place + len(first)]
        hashes.append(mix64(runs[is_run]))
        places.append(first[is_run])
    return np.concatenate(hashes), np.concatenate(places)


def mix64(x: Hashes) -> Hashes:
    """Applies the finalizer of splitmix64 (Steele, Lea, Flood, 2014): each output bit depends on
    each input bit."""
    x = x ^ (x >> np.uint64(30))
    x *= 0xBF58476D1CE4E5B9
    x ^= x >> 27
    x *= 0x94D049BB133111EB
    x ^= x >> 31
    return x


def _word_hashes(normalized: bytes) -> tuple[Hashes, Places]:
    """Returns the hash of each word and its first byte: eight bytes of every word at a time, and
    most have no more."""
    if not normalized:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    padded = normalized + bytes(8)
    text = np.frombuffer(padded, dtype=np.uint8, count=len(normalized))
    starts, sizes = _words(text)
    # From each byte on
    eights: Hashes = np.ndarray(len(normalized) + 1, dtype="<u8", buffer=padded, strides=(1,))
    hashes = mix64(sizes.astype(np.uint64))
    hashes = mix64(hashes ^ (eights[starts] & _FIRST_BYTES[np.minimum(sizes, 8)]))
    longer, place = np.flatnonzero(sizes > 8), 8
    while longer.size:
        piece = eights[starts[longer] + place] & _FIRST_BYTES[np.minimum(sizes[longer] - place, 8)]
        hashes[longer] = mix64(hashes[longer] ^ piece)
        place += 8
        longer = longer[sizes[longer] > place]
    return hashes, starts


def _words(text: _Bytes) -> tuple[Places, Places]:
    """Returns the first byte and the size of each word."""
    is_start = text != _BLANK
    is_start[1:] &= text[:-1] == _BLANK
    leads = np.flatnonzero(text >= 0xE0)
    if leads.size:
        codes = text[leads].astype(np.uint16) << 8 | text[leads + 1]
        alone = leads[np.searchsorted(_UNSPACED, codes, side="right") % 2 == 1]
        after = alone + 3 + (text[alone] >= 0xF0)
        is_start[alone] = True
        is_start[after[after < len(text)]] = True
        is_start &= text != _BLANK
    starts = np.flatnonzero(is_start)
    sizes = _sizes(text, starts)
    long = np.flatnonzero(sizes > _LONGEST_WORD_BYTES)
    if long.size:
        for start, size in zip(starts[long].tolist(), sizes[long].tolist(), strict=True):
            is_start[start : start + size : _LONGEST_WORD_BYTES] = True
        starts = np.flatnonzero(is_start)
        sizes = _sizes(text, starts)
    return starts, sizes


def _sizes(text: _Bytes, starts: Places) -> Places:
    ends = np.append(starts[1:], len(text))
    return ends - (text[ends - 1] == _BLANK) - starts
