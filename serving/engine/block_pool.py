"""The blocks of the KV cache: which sequences hold them, and which contain the start of a prompt.
No tensors."""

import hashlib
from array import array
from collections.abc import Sequence
from itertools import takewhile

BLOCK_TOKENS = 16

_ROOT = b""  # the prefix before the first block, of those without a scope


def root_of(scope: str) -> bytes:
    """Returns the prefix before the first block of a scope's prompts, which no other scope's
    prompts have."""
    return (
        hashlib.blake2b(scope.encode(), digest_size=16, person=b"scope").digest()
        if scope
        else _ROOT
    )


class BlockPool:
    """A block is free, or held by one or more sequences. A full block can be found again by all
    tokens up to its end, even after it was freed, until another sequence gets it.

    A block that holds nothing to be found is reused first, the latest one: its memory is in use
    already. Only then come blocks that nobody has had yet, and at last the one that could be found
    and has been free for longest."""

    def __init__(self, num_blocks: int, *, keep_prefixes: bool) -> None:
        self.num_blocks = num_blocks
        self._keep_prefixes = keep_prefixes
        self._num_holders = [0] * num_blocks
        # In the order in which they became free, the untouched first
        self._free = dict.fromkeys(range(num_blocks))
        self._spare: list[int] = []  # free too, and without anything that could be found
        self._block_of: dict[bytes, int] = {}  # by prefix
        self._prefix_of: dict[int, bytes] = {}  # by block

    @property
    def usage(self) -> float:
        """The share of the blocks that are held, 0 to 1."""
        return 1 - self._num_free / self.num_blocks

    def missing(self, prompt_ids: Sequence[int], *, root: bytes = _ROOT) -> list[bytes]:
        """Returns the prefixes to the end of each full block of the prompt that is not in the pool
        yet."""
        prefixes = _prefixes(prompt_ids, root) if self._keep_prefixes else []
        return prefixes[len(self._find(prompt_ids, root)) :]

    def allocate(
        self, num_tokens: int, *, prompt_ids: Sequence[int], root: bytes = _ROOT
    ) -> tuple[list[int], int] | None:
        """Returns blocks for `num_tokens` and how many of the prompt's tokens they contain already:
        at most all but the last, whose logits are needed. Returns None if there is no room."""
        shared = self._find(prompt_ids, root)
        num_new = num_blocks_for(num_tokens) - len(shared)
        num_shared_free = sum(block in self._free for block in shared)
        if num_new > self._num_free - num_shared_free:
            return None
        for block in shared:
            self._free.pop(block, None)
        blocks = shared + [self._take() for _ in range(num_new)]
        for block in blocks:
            self._num_holders[block] += 1
        return blocks, len(shared) * BLOCK_TOKENS

    def release(self, blocks: Sequence[int]) -> None:
        """Frees the blocks that no other sequence holds. The last become free first: a shorter
        prefix fits more prompts."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] > 0:
                continue
            if block in self._prefix_of:
                self._free[block] = None
            else:
                self._spare.append(block)

    def seal(self, block: int, token_ids: Sequence[int], *, before: bytes = _ROOT) -> bytes:
        """Marks a block as full with `token_ids` after the prefix `before`. Returns the prefix to
        its end."""
        prefix = _prefix(before, token_ids)
        if self._keep_prefixes and prefix not in self._block_of:
            self._block_of[prefix] = block
            self._prefix_of[block] = prefix
        return prefix

    def forget(self, blocks: Sequence[int]) -> None:
        """Makes the blocks impossible to find."""
        for block in blocks:
            prefix = self._prefix_of.pop(block, None)
            if prefix is not None:
                del self._block_of[prefix]

    def _find(self, prompt_ids: Sequence[int], root: bytes) -> list[int]:
        known = takewhile(self._block_of.__contains__, _prefixes(prompt_ids, root))
        return [self._block_of[prefix] for prefix in known]

    @property
    def _num_free(self) -> int:
        return len(self._free) + len(self._spare)

    def _take(self) -> int:
        if self._spare:
            return self._spare.pop()
        block = next(iter(self._free))
        del self._free[block]
        self.forget([block])
        return block


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


def _prefixes(prompt_ids: Sequence[int], root: bytes) -> list[bytes]:
    """Returns the prefix to the end of each full block, except one that ends with the prompt."""
    prefixes = [root]
    for start in range(0, len(prompt_ids) - BLOCK_TOKENS, BLOCK_TOKENS):
        prefixes.append(_prefix(prefixes[-1], prompt_ids[start : start + BLOCK_TOKENS]))
    return prefixes[1:]


def _prefix(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Returns a cryptographic hash: a second prompt with the same one would be answered with the
    first prompt's keys."""
    return hashlib.blake2b(before + array("I", token_ids).tobytes(), digest_size=16).digest()
