"""Allocation, sharing and eviction of blocks, one rule at a time.

The state machine beside this file has them all at once. These tests and the scheduler's alone
cover every line and branch of both:

    python -m coverage run --include='engine/scheduler.py,engine/block_manager.py' \
        -m pytest tests/engine/test_block_manager.py tests/engine/test_scheduler*.py
    python -m coverage report --fail-under=100
"""

import random
from collections.abc import Iterable

import pytest

from engine.block_manager import BlockManager
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

BLOCK_SIZE = 4


def make_manager(
    num_blocks: int = 9,
    *,
    enable_prefix_cache: bool = True,
    share_completion_blocks: bool = True,
    weights_id: bytes = b"weights",
) -> BlockManager:
    return BlockManager(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        enable_prefix_cache=enable_prefix_cache,
        share_completion_blocks=share_completion_blocks,
        weights_id=weights_id,
    )


def make_sequence(
    seq_id: int,
    prompt_ids: Iterable[int],
    *,
    completion_ids: Iterable[int] = (),
    request_id: str | None = None,
    salt: bytes = b"",
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        request_id=request_id or f"r{seq_id}",
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        params=SamplingParams(max_tokens=64),
        n_ctx=128,
        salt=salt,
    )


def compute(manager: BlockManager, sequence: Sequence) -> list[int]:
    """Give a sequence room and publish all its tokens, as one step does; returns its table."""
    prefix = manager.match_prefix(sequence)
    assert manager.allocate(sequence.seq_id, sequence.num_tokens, prefix=prefix)
    sequence.num_computed_tokens = len(prefix) * BLOCK_SIZE
    manager.publish(sequence, sequence.num_tokens - sequence.num_computed_tokens)
    return list(manager.block_table(sequence.seq_id))


def counts(manager: BlockManager) -> tuple[int, int, int]:
    """Free, cached, used."""
    return manager.num_free_blocks, manager.num_cached_blocks, manager.num_used_blocks


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_table_holds_its_tokens_and_no_block_more(num_tokens: int, num_blocks: int) -> None:
    manager = make_manager()

    assert manager.allocate(7, num_tokens)

    assert len(manager.block_table(7)) == num_blocks
    assert counts(manager) == (8 - num_blocks, 0, num_blocks)


def test_the_null_block_is_never_allocated() -> None:
    manager = make_manager(num_blocks=9)

    assert manager.allocate(7, 8 * BLOCK_SIZE)

    assert sorted(manager.block_table(7)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_table_grows_at_its_end() -> None:
    manager = make_manager()
    assert manager.allocate(7, 5)
    before = list(manager.block_table(7))

    assert manager.allocate(7, 13)

    assert manager.block_table(7)[:2] == before
    assert len(set(manager.block_table(7))) == 4


def test_a_table_does_not_shrink() -> None:
    manager = make_manager()
    assert manager.allocate(7, 9)

    assert manager.allocate(7, 1)

    assert len(manager.block_table(7)) == 3


def test_allocation_that_fails_changes_nothing() -> None:
    manager = make_manager(num_blocks=5)
    assert manager.allocate(1, 9)
    before = list(manager.block_table(1))

    assert not manager.allocate(1, 17)
    assert not manager.allocate(2, 5)

    assert manager.block_table(1) == before
    assert counts(manager) == (1, 0, 3)
    with pytest.raises(KeyError):
        manager.block_table(2)


def test_a_failed_admission_leaves_its_prefix_in_the_cache() -> None:
    manager = make_manager(num_blocks=5)
    compute(manager, make_sequence(1, range(8)))
    manager.free(1)
    assert manager.allocate(2, 8)
    later = make_sequence(3, range(9))
    prefix = manager.match_prefix(later)

    # Two blocks are cached, none is free: the third block could only be one of the prefix.
    assert not manager.allocate(3, 9, prefix=prefix)

    assert manager.match_prefix(later) == prefix
    assert counts(manager) == (0, 2, 2)


def test_a_reserve_stays_available() -> None:
    manager = make_manager(num_blocks=5)

    assert not manager.allocate(1, 9, reserve=2)
    assert manager.allocate(1, 9, reserve=1)

    assert manager.num_free_blocks == 1


def test_blocks_without_known_content_are_free_again_when_given_up() -> None:
    manager = make_manager()
    assert manager.allocate(7, 9)

    manager.free(7)

    assert counts(manager) == (8, 0, 0)


def test_a_sequence_cannot_be_freed_twice() -> None:
    manager = make_manager()
    assert manager.allocate(7, 9)
    manager.free(7)

    with pytest.raises(KeyError):
        manager.free(7)

    assert counts(manager) == (8, 0, 0)


def test_full_blocks_stay_cached_when_given_up_and_the_rest_is_free() -> None:
    manager = make_manager()
    compute(manager, make_sequence(1, range(10)))

    manager.free(1)

    assert counts(manager) == (6, 2, 0)


@pytest.mark.parametrize(
    ("num_tokens", "num_matched"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)]
)
def test_a_match_is_as_long_as_it_can_be_and_leaves_a_token(
    num_tokens: int, num_matched: int
) -> None:
    manager = make_manager()
    table = compute(manager, make_sequence(1, range(12)))

    assert manager.match_prefix(make_sequence(2, range(num_tokens))) == table[:num_matched]


def test_a_match_ends_where_the_tokens_differ() -> None:
    manager = make_manager()
    table = compute(manager, make_sequence(1, range(12)))

    # The last block's ids are equal, but not what they follow.
    other = make_sequence(2, [0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11, 12])

    assert manager.match_prefix(other) == table[:1]


def test_shared_blocks_are_held_until_the_last_holder_gives_them_up() -> None:
    manager = make_manager()
    first = compute(manager, make_sequence(1, range(9)))
    second = compute(manager, make_sequence(2, range(9)))
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert counts(manager) == (4, 0, 4)

    manager.free(1)
    assert counts(manager) == (5, 0, 3)

    manager.free(2)
    assert counts(manager) == (6, 2, 0)


def test_matched_blocks_that_are_in_use_cost_no_room() -> None:
    manager = make_manager(num_blocks=4)
    compute(manager, make_sequence(1, range(8)))
    holder = make_sequence(2, range(9))

    assert manager.allocate(2, 9, prefix=manager.match_prefix(holder))

    assert counts(manager) == (0, 0, 3)


def test_other_salts_and_other_weights_share_nothing() -> None:
    manager, other_weights = make_manager(), make_manager(weights_id=b"other weights")
    compute(manager, make_sequence(1, range(9), salt=b"a"))
    salted, unsalted = make_sequence(2, range(9), salt=b"b"), make_sequence(3, range(9))
    compute(other_weights, make_sequence(1, range(9), salt=b"a"))

    assert manager.match_prefix(salted) == []
    assert manager.match_prefix(unsalted) == []
    assert len(manager.match_prefix(make_sequence(4, range(9), salt=b"a"))) == 2
    hashes = []
    for some_manager in (manager, other_weights):
        sequence = make_sequence(5, range(9), salt=b"a")
        some_manager.match_prefix(sequence)
        hashes.append(sequence.block_hashes)
    assert not set(hashes[0]) & set(hashes[1])


def test_a_hash_is_cryptographic_and_depends_on_every_bit_of_a_token_id() -> None:
    manager = make_manager()
    seen = set()
    for bit in range(32):
        sequence = make_sequence(1, [1 << bit, 0, 0, 0, 0])
        manager.match_prefix(sequence)
        seen.update(sequence.block_hashes)

    assert len(seen) == 32
    assert {len(block_hash) for block_hash in seen} == {32}


def test_with_the_prefix_cache_off_nothing_is_shared_or_cached() -> None:
    manager = make_manager(enable_prefix_cache=False)
    compute(manager, make_sequence(1, range(9)))

    assert manager.match_prefix(make_sequence(2, range(9))) == []

    manager.free(1)
    assert counts(manager) == (8, 0, 0)


def test_completion_blocks_are_shared_only_where_allowed() -> None:
    for share, num_matched in ((True, 3), (False, 1)):
        manager = make_manager(share_completion_blocks=share)
        sequence = make_sequence(1, range(6), completion_ids=range(6, 13))
        compute(manager, sequence)

        # A later prompt equal to prompt and completion, and the sequence itself, resumed.
        for other in (make_sequence(2, range(13)), sequence):
            assert len(manager.match_prefix(other)) == num_matched


def test_a_completion_does_not_take_prompt_blocks_where_they_differ() -> None:
    """On CUDA the K and V of a decoded token are not those of the same token in a prompt."""
    manager = make_manager(share_completion_blocks=False)
    compute(manager, make_sequence(1, range(13)))

    resumed = make_sequence(2, range(6), completion_ids=range(6, 13))

    assert len(manager.match_prefix(resumed)) == 1


def test_a_whole_prompt_matches_when_a_completion_token_is_left_to_compute() -> None:
    manager = make_manager(share_completion_blocks=False)
    compute(manager, make_sequence(1, range(8)))

    resumed = make_sequence(2, range(8), completion_ids=[8])

    assert len(manager.match_prefix(resumed)) == 2


def test_only_what_this_step_fills_is_published() -> None:
    manager = make_manager()
    sequence = make_sequence(1, range(12))
    assert manager.allocate(1, 12)
    table = manager.block_table(1)

    assert manager.publish(sequence, 7) == table[:1]
    sequence.num_computed_tokens = 7
    assert manager.match_prefix(make_sequence(2, range(13))) == table[:1]
    assert manager.publish(sequence, 1) == table[1:2]
    sequence.num_computed_tokens = 8
    assert manager.publish(sequence, 3) == []
    sequence.num_computed_tokens = 11
    assert manager.publish(sequence, 1) == table[2:3]


def test_the_second_to_publish_the_same_content_keeps_its_copy_to_itself() -> None:
    manager = make_manager()
    first, second = make_sequence(1, range(8)), make_sequence(2, range(8))
    for sequence in (first, second):
        assert manager.allocate(sequence.seq_id, 8)

    assert manager.publish(first, 8) == manager.block_table(1)
    assert manager.publish(second, 8) == []

    assert not set(manager.block_table(1)) & set(manager.block_table(2))
    manager.free(2)
    assert counts(manager) == (6, 0, 2)


def test_a_private_copy_does_not_end_the_chain() -> None:
    """The second is ahead: what it fills beyond the first's blocks is published."""
    manager = make_manager()
    first, second = make_sequence(1, range(8)), make_sequence(2, range(12))
    for sequence in (first, second):
        assert manager.allocate(sequence.seq_id, sequence.num_tokens)
        manager.publish(sequence, sequence.num_tokens)

    matched = manager.match_prefix(make_sequence(3, range(13)))

    assert matched == manager.block_table(1) + manager.block_table(2)[2:]


def test_withdrawn_blocks_are_never_matched_and_are_cleared_before_they_are_used_again() -> None:
    manager = make_manager(num_blocks=4)
    table = compute(manager, make_sequence(1, range(8)))

    manager.withdraw(table)

    assert manager.match_prefix(make_sequence(2, range(8))) == []
    manager.free(1)
    assert counts(manager) == (3, 0, 0)
    assert manager.take_blocks_to_clear() == []  # nobody uses them yet
    assert manager.allocate(3, 12)
    assert sorted(manager.take_blocks_to_clear()) == sorted(table)
    manager.free(3)
    assert manager.allocate(4, 12)
    assert manager.take_blocks_to_clear() == []  # once is enough


def test_a_withdrawn_block_can_be_computed_and_published_again_in_place() -> None:
    manager = make_manager()
    sequence = make_sequence(1, range(8))
    assert manager.allocate(1, 8)
    manager.withdraw(manager.publish(sequence, 8))

    assert manager.publish(sequence, 8) == manager.block_table(1)


def test_the_least_recently_used_is_evicted_first_and_tails_before_heads() -> None:
    manager = make_manager(num_blocks=8)
    tables = {}
    for seq_id, first_id in ((1, 10), (2, 20), (3, 30)):
        tables[seq_id] = compute(manager, make_sequence(seq_id, range(first_id, first_id + 8)))
    for seq_id in (2, 1, 3):
        manager.free(seq_id)
    # Used again, and so younger than the others.
    assert compute(manager, make_sequence(4, range(20, 28)))[:1] == tables[2][:1]
    manager.free(4)
    manager.take_blocks_to_clear()
    assert counts(manager)[1] == 6

    evicted = []
    known = {block for table in tables.values() for block in table}
    for num_tokens in range(BLOCK_SIZE, 8 * BLOCK_SIZE, BLOCK_SIZE):
        assert manager.allocate(9, num_tokens)
        block = manager.block_table(9)[-1]
        if block in known:
            evicted.append(block)

    # Of 2 only the head was used again: a match leaves a token, so 4 computed the tail anew.
    again = [tables[2][0]]
    assert evicted == tables[2][:0:-1] + tables[1][::-1] + tables[3][::-1] + again


def test_free_blocks_are_used_before_cached_ones() -> None:
    manager = make_manager(num_blocks=6)
    compute(manager, make_sequence(1, range(12)))
    manager.free(1)

    assert manager.allocate(2, 2 * BLOCK_SIZE)

    assert counts(manager) == (0, 3, 2)
    assert len(manager.match_prefix(make_sequence(3, range(13)))) == 3


def test_tokens_count_as_another_requests_when_another_request_computed_them() -> None:
    manager = make_manager()
    compute(manager, make_sequence(1, range(4), request_id="other"))
    compute(manager, make_sequence(2, range(9), request_id="mine"))
    sibling = make_sequence(3, range(13), request_id="mine")
    prefix = manager.match_prefix(sibling)

    assert len(prefix) == 2
    assert manager.num_tokens_from_others(sibling, prefix) == BLOCK_SIZE


def test_eviction_follows_a_slow_and_obvious_model() -> None:
    """The same calls on a list kept in order of use: the same prefixes stay known."""
    random_source = random.Random(1)
    manager = make_manager(num_blocks=13)
    order_of_use: list[tuple[int, ...]] = []  # unheld prefixes, least recently used first
    for seq_id in range(600):
        first_id, num_tokens = random_source.randrange(6), random_source.choice([4, 8, 12, 16])
        prompt_ids = [first_id, *range(100, 100 + num_tokens)]
        sequence = make_sequence(seq_id, prompt_ids)
        prefixes = [tuple(prompt_ids[:end]) for end in range(4, num_tokens + 1, 4)]
        num_known = next(
            (n for n, prefix in enumerate(prefixes) if prefix not in order_of_use), len(prefixes)
        )

        assert len(manager.match_prefix(sequence)) == num_known
        compute(manager, sequence)

        order_of_use = [p for p in order_of_use if p not in prefixes[:num_known]]
        num_blocks = len(prefixes) + 1
        num_evicted = max(0, num_blocks + len(order_of_use) - 12)
        del order_of_use[:num_evicted]
        # A prefix beyond a gap was still known: the newly computed copy stays private and is
        # free afterwards, the old one keeps its place in the order.
        fresh = [p for p in prefixes if p not in order_of_use]
        order_of_use += reversed(fresh)
        manager.free(seq_id)
        assert manager.num_cached_blocks == len(order_of_use)
