"""Which block of the KV cache belongs to whom, decided in integers; knows no tensors and no steps.

A block is in one of three places: held by sequences, in whose tables it stands (used); held by
nobody, but its content still known by hash (cached); or neither (free). Block 0, the null block,
is in none of them: padding rows of a batch point at it, and nobody reads what they write there.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from engine.sequence import Sequence


class BlockManager:
    """Block tables, reference counts, and a prefix cache that costs nothing while unused.

    Block tables as in PagedAttention (Kwon et al., 2023, arXiv:2309.06180). A full block is known
    by a cryptographic hash over everything its K and V depend on: weights, salt, and all token
    ids up to its end, chained block by block. Only full blocks are ever shared, and full blocks
    are never written again: so no writable block is shared and nothing is copied on write.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_cache: bool,
        share_completion_blocks: bool,
        weights_id: bytes,
    ) -> None:
        self.num_blocks = num_blocks  # the null block included
        self.block_size = block_size  # tokens
        self.num_ever_used = 1  # blocks from the null block to the last one that was ever held
        self._enable_prefix_cache = enable_prefix_cache
        self._share_completion_blocks = share_completion_blocks
        self._key = blake2b(weights_id).digest()
        self._tables: dict[int, list[int]] = {}
        self._num_holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._publisher_of = [""] * num_blocks  # request id; means something beside a hash only
        self._block_with: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack, low ids on top
        # Least recently used first. An OrderedDict gives removal from the middle, from the front
        # and insertion at the end in constant time; a plain dict's front slows down with every
        # deletion before it, and a deque has no middle.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._unclean: set[int] = set()
        self._blocks_to_clear: list[int] = []

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds and whose content is unknown; the null block is not one."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds, kept for their content until the room is needed."""
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks in at least one table. Free, cached and used are `num_blocks - 1` together."""
        return self.num_blocks - 1 - len(self._free) - len(self._cached)

    def block_table(self, seq_id: int) -> list[int]:
        """The blocks of a sequence in order: the manager's own list, to be read only."""
        return self._tables[seq_id]

    def holds(self, seq_id: int) -> bool:
        """Whether a sequence has a table."""
        return seq_id in self._tables

    def allocate(
        self, seq_id: int, num_tokens: int, *, prefix: list[int] | None = None, reserve: int = 0
    ) -> bool:
        """Grow a sequence's block table until it can hold `num_tokens` tokens in total.

        A new table begins with the blocks of `prefix`, as `match_prefix` found them. `reserve`
        blocks must remain available afterwards. All or nothing: on False nothing changed, and
        the caller should preempt or wait.
        """
        table = self._tables.get(seq_id)
        if table is not None and len(table) * self.block_size >= num_tokens:
            return True  # the usual case of decoding, and the cheapest
        assert table is None or not prefix, "a prefix comes first"
        prefix = prefix or []
        num_new = -(-num_tokens // self.block_size) - len(prefix if table is None else table)
        num_idle = sum(self._num_holders[block] == 0 for block in prefix)
        if num_new + num_idle + reserve > len(self._free) + len(self._cached):
            return False
        if table is None:
            table = self._tables[seq_id] = []
        for block in prefix:  # before any new block is taken, or it could evict one of these
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1
            table.append(block)
        for _ in range(num_new):
            table.append(self._take())
        return True

    def free(self, seq_id: int) -> None:
        """Give up a sequence's table. Blocks with a known content stay cached while room lasts."""
        # Backwards: the tail is then evicted before the head, without which it is unreachable.
        for block in reversed(self._tables.pop(seq_id)):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Find the longest cached prefix of a sequence that leaves a token to compute.

        Changes nothing: `allocate` takes the blocks.
        """
        blocks: list[int] = []
        num_blocks = self._num_shareable_blocks(sequence, sequence.num_tokens - 1)
        for block_hash in self._extend_hashes(sequence, num_blocks)[:num_blocks]:
            if block_hash not in self._block_with:
                break
            blocks.append(self._block_with[block_hash])
        return blocks

    def num_tokens_from_others(self, sequence: Sequence, prefix: list[int]) -> int:
        """Of the tokens in `prefix`, how many another request than the sequence's computed."""
        publishers = (self._publisher_of[block] for block in prefix)
        return self.block_size * sum(name != sequence.request_id for name in publishers)

    def publish(self, sequence: Sequence, num_scheduled_tokens: int) -> list[int]:
        """Let others share the blocks that the tokens scheduled for this step fill up.

        Before they are computed: each layer of a step writes all K and V before any row reads,
        so sequences of the same step may share already. Returns the blocks published, to be
        withdrawn if the step fails. Content that is published already stays where it is, and
        the sequence keeps its own copy to itself: tables in flight are not rewritten.
        """
        first = sequence.num_computed_tokens // self.block_size
        end = self._num_shareable_blocks(
            sequence, sequence.num_computed_tokens + num_scheduled_tokens
        )
        if first >= end:
            return []
        published = []
        table, hashes = self._tables[sequence.seq_id], self._extend_hashes(sequence, end)
        for block, block_hash in zip(table[first:end], hashes[first:end], strict=True):
            if block_hash not in self._block_with:
                self._block_with[block_hash] = block
                self._hash_of[block] = block_hash
                self._publisher_of[block] = sequence.request_id
                published.append(block)
        return published

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Never share these held blocks again: their content is not what their hashes say.

        They are cleared before they are used again, since they may hold NaN, and attention
        multiplies what it masks by zero.
        """
        for block in blocks:
            assert self._num_holders[block], "withdrawn by a holder"
            self._forget(block)
            self._unclean.add(block)

    def take_blocks_to_clear(self) -> list[int]:
        """Those withdrawn blocks allocated anew since the last call, for the machine to zero."""
        blocks, self._blocks_to_clear = self._blocks_to_clear, []
        return blocks

    def _take(self) -> int:
        """Take the block least missed: a free one, else the least recently used cached one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        if block in self._unclean:
            self._unclean.remove(block)
            self._blocks_to_clear.append(block)
        self._num_holders[block] = 1
        self.num_ever_used = max(self.num_ever_used, block + 1)
        return block

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_with[block_hash]
            self._hash_of[block] = None

    def _num_shareable_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """How many of the blocks that the first `num_tokens` tokens fill may be shared."""
        if not self._enable_prefix_cache:
            return 0
        if not self._share_completion_blocks:
            num_tokens = min(num_tokens, sequence.num_prompt_tokens)
        return num_tokens // self.block_size

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Hash a sequence's blocks, each once in its life, until `num_blocks` are known."""
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            token_ids = array("I", sequence.token_ids[start : start + self.block_size])
            # Salts may have any length; a digest in their place keeps the chain unambiguous.
            previous = hashes[-1] if hashes else blake2b(sequence.salt, digest_size=32).digest()
            content = previous + token_ids.tobytes()
            hashes.append(blake2b(content, key=self._key, digest_size=32).digest())
        return hashes
