"""Blocks of the KV cache: held, freed, found again, and never given to two who differ."""

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.block_pool import BLOCK_TOKENS, BlockPool, num_blocks_for

PROMPT = list(range(50))


def sealed(pool: BlockPool, prompt: list[int]) -> list[int]:
    """Blocks that hold the prompt."""
    allocation = pool.allocate(len(prompt), prompt_ids=prompt)
    assert allocation is not None
    prefix = b""
    for index in range(len(prompt) // BLOCK_TOKENS):
        tokens = prompt[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        prefix = pool.seal(allocation[0][index], tokens, before=prefix)
    return allocation[0]


def test_a_prefix_is_shared_while_held_and_found_after_it_was_freed() -> None:
    pool = BlockPool(10, keep_prefixes=True)
    blocks = sealed(pool, PROMPT)  # 4 blocks, 3 of them full
    assert pool.usage == 0.4
    shared = pool.allocate(60, prompt_ids=[*PROMPT, 7])
    assert shared is not None and (shared[0][:3], shared[1]) == (blocks[:3], 48)
    assert pool.usage == 0.5
    pool.release(blocks)
    assert pool.usage == 0.4  # what is shared stays until its last holder lets go
    pool.release(shared[0])
    assert pool.usage == 0
    again = pool.allocate(50, prompt_ids=PROMPT)
    assert again is not None and (again[0][:3], again[1]) == (blocks[:3], 48)


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    pool = BlockPool(10, keep_prefixes=True)
    sealed(pool, PROMPT[:32])
    found = pool.allocate(40, prompt_ids=PROMPT[:32])
    assert found is not None and found[1] == 16


def test_other_tokens_before_a_block_make_it_another_block() -> None:
    pool = BlockPool(10, keep_prefixes=True)
    sealed(pool, PROMPT[:32])
    other = pool.allocate(40, prompt_ids=[99, *PROMPT[1:33]])
    assert other is not None and other[1] == 0


def test_the_block_that_has_been_free_for_longest_goes_first() -> None:
    pool = BlockPool(4, keep_prefixes=True)
    first = sealed(pool, PROMPT[:32])
    pool.release(first)
    taken = pool.allocate(48, prompt_ids=[])
    assert taken is not None and set(taken[0]) == {0, 1, 2, 3} - {first[0]}
    pool.release(taken[0])
    found = pool.allocate(32, prompt_ids=PROMPT[:32])
    assert found is not None and (found[0][0], found[1]) == (first[0], 16)


def test_without_room_nothing_is_taken() -> None:
    pool = BlockPool(3, keep_prefixes=True)
    blocks = sealed(pool, PROMPT[:32])
    pool.release(blocks)
    assert pool.allocate(70, prompt_ids=PROMPT) is None
    assert pool.usage == 0
    assert pool.allocate(48, prompt_ids=PROMPT) is not None


def test_nothing_is_kept_when_told_so() -> None:
    pool = BlockPool(10, keep_prefixes=False)
    sealed(pool, PROMPT)
    found = pool.allocate(50, prompt_ids=PROMPT)
    assert found is not None and found[1] == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 70)), max_size=80))
def test_a_held_block_holds_what_its_holders_think(actions: list[tuple[bool, int, int]]) -> None:
    pool = BlockPool(9, keep_prefixes=True)
    content: dict[int, list[int]] = {}
    held: list[tuple[list[int], list[int]]] = []
    for releases, number, length in actions:
        if releases and held:
            pool.release(held.pop(number % len(held))[0])
            continue
        prompt = [i if i < 20 else number for i in range(length)]  # some share a block, some two
        if (allocation := pool.allocate(length, prompt_ids=prompt)) is None:
            assert num_blocks_for(length) > 9 * (1 - pool.usage) - 1e-9
            continue
        blocks, num_found = allocation
        assert len(blocks) == len(set(blocks)) == num_blocks_for(length)
        prefix = b""
        for index, block in enumerate(blocks):
            tokens = prompt[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            if index * BLOCK_TOKENS < num_found:
                assert content[block] == prompt[: (index + 1) * BLOCK_TOKENS]
            content[block] = prompt[: (index + 1) * BLOCK_TOKENS]
            if len(tokens) == BLOCK_TOKENS:
                prefix = pool.seal(block, tokens, before=prefix)
        held.append((blocks, prompt))
        for blocks, prompt in held:
            for index, block in enumerate(blocks):
                assert content[block] == prompt[: (index + 1) * BLOCK_TOKENS]
    for blocks, _ in held:
        pool.release(blocks)
    assert pool.usage == 0


def test_one_request_at_a_time_touches_few_blocks() -> None:
    """What nobody could find is reused first, so that a cache in memory grows with what is held and
    what is kept."""
    pool = BlockPool(100, keep_prefixes=False)
    touched: set[int] = set()
    for number in range(20):
        allocation = pool.allocate(60, prompt_ids=[number] * 50)
        assert allocation is not None
        touched.update(allocation[0])
        pool.release(allocation[0])
    assert len(touched) == 4


def test_what_is_kept_goes_only_when_nothing_else_is_left() -> None:
    pool = BlockPool(4, keep_prefixes=True)
    kept = sealed(pool, PROMPT[:20])  # one full block, and one that nobody could find
    pool.release(kept)
    for _ in range(10):
        allocation = pool.allocate(48, prompt_ids=[])
        assert allocation is not None and kept[0] not in allocation[0] and kept[1] in allocation[0]
        pool.release(allocation[0])
    allocation = pool.allocate(64, prompt_ids=[])
    assert allocation is not None and kept[0] in allocation[0]
