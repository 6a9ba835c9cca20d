"""One step's rows: the flat, ragged batch that decode rows and prompt chunks share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.block_manager import BlockManager
from engine.scheduler import ScheduledBatch

Array = NDArray[Any]


class Span(NamedTuple):
    """Rows of one sequence in a step, as the host knows them."""

    table_row: int  # in the block tables
    start: int  # position of the first
    end: int  # position after the last
    num_prompt_tokens: int  # of the sequence


class Rows(NamedTuple):
    """The rows of one step on the host, N of them.

    Those of a sequence lie together, in order of position.
    """

    tokens: Array  # (N,) int64
    positions: Array  # (N,) int64
    row_sequences: Array  # (N,) int64: which row of block_tables is the row's own
    block_tables: Array  # (S, blocks) int32, padded with block 0
    # For kernels that work by sequence; none where each has one row, and that past its prompt.
    spans: tuple[Span, ...] = ()

    def to(self, device: torch.device, block_size: int) -> "ModelInput":
        """Make tensors of them."""
        places = self.positions // block_size
        slot_blocks = self.block_tables[self.row_sequences, places].astype(np.int64)
        arrays = (
            self.tokens, self.positions, self.row_sequences, self.block_tables, slot_blocks,
            self.positions - places * block_size,
        )  # fmt: skip
        tokens, positions, row_sequences, block_tables, slot_blocks, slot_offsets = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        return ModelInput(
            tokens=tokens,
            positions=positions,
            row_sequences=row_sequences,
            block_tables=block_tables,
            slot_blocks=slot_blocks,
            slot_offsets=slot_offsets,
            spans=self.spans,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """The same as tensors, and where the keys and values of each row go."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    row_sequences: Tensor  # (N,) int64: which row of block_tables is the row's own
    block_tables: Tensor  # (S, blocks) int32, padded with block 0
    slot_blocks: Tensor  # (N,) int64: the block that the row's keys and values go to
    slot_offsets: Tensor  # (N,) int64: and the place in it
    # For kernels that work by sequence; none where each has one row, and that past its prompt.
    spans: tuple[Span, ...] = ()


class NetworkOutput(NamedTuple):
    """What a network makes of N rows, for R of which logits are wanted; float32 on a CPU."""

    hidden: Tensor  # (N, C)
    logits: Tensor  # (R, vocab_size) float32
    # Where that was asked for and costs little: of each row of logits the first of its best
    # tokens, (R,) int64, and whether their logits are finite, (R,) bool.
    best: Array | None = None
    is_finite: Array | None = None


class BatchBuilder:
    """Turns scheduled batches into arrays, keeping block tables from step to step.

    A decode step changes at most a block or two of all the tables, so they live in one array in
    which every running sequence has a row, and only what is new is copied.
    """

    def __init__(self, block_manager: BlockManager, *, max_num_sequences: int, n_ctx: int) -> None:
        self._block_manager = block_manager
        max_blocks = -(-n_ctx // block_manager.block_size)
        self._tables = np.zeros((max_num_sequences, max_blocks), np.int32)
        self._rows: dict[int, int] = {}  # row in the tables by sequence
        self._free_rows = list(range(max_num_sequences - 1, -1, -1))
        self._lengths = [0] * max_num_sequences  # blocks copied, by row

    def build(self, batch: ScheduledBatch) -> Rows:
        """Make the rows of one step. For every batch, in order: either this or `place`."""
        table_rows = self.place(batch)
        sequences, counts = batch.sequences, batch.num_scheduled_tokens
        starts = [sequence.num_computed_tokens for sequence in sequences]
        if sum(counts) == len(counts):  # as while nothing but decoding goes on: few calls then
            tokens = [s.token_ids[start] for s, start in zip(sequences, starts, strict=True)]
            is_decode = all(
                start >= s.num_prompt_tokens for s, start in zip(sequences, starts, strict=True)
            )
            spans = () if is_decode else _spans(batch, table_rows)
            arrays = np.array((tokens, starts, table_rows))
            return Rows(arrays[0], arrays[1], arrays[2], self._tables, spans)
        tokens = []
        for sequence, start, count in zip(sequences, starts, counts, strict=True):
            tokens += sequence.token_ids[start : start + count]
        lengths = np.array(counts)
        firsts = np.cumsum(lengths) - lengths
        positions = np.repeat(np.array(starts) - firsts, lengths) + np.arange(len(tokens))
        row_sequences = np.repeat(np.array(table_rows), lengths)
        spans = _spans(batch, table_rows)
        return Rows(np.array(tokens), positions, row_sequences, self._tables, spans)

    def place(self, batch: ScheduledBatch) -> list[int]:
        """Bring the tables up to date; returns the row of each of the batch's sequences."""
        for seq_id in batch.released_seq_ids:
            # Absent if the sequence came and went in a step that failed before it was built.
            row = self._rows.pop(seq_id, None)
            if row is not None:
                self._free_rows.append(row)
        return [self._update_table(sequence.seq_id) for sequence in batch.sequences]

    def table(self, row: int) -> np.ndarray:
        """One row of the tables, (blocks,) int32: to be read only."""
        table: np.ndarray = self._tables[row]
        return table

    def num_blocks(self, row: int) -> int:
        """How many blocks of a row of the tables mean something."""
        return self._lengths[row]

    def _update_table(self, seq_id: int) -> int:
        """Bring a sequence's row of the tables up to date, and return which it is."""
        table = self._block_manager.block_table(seq_id)
        row = self._rows.get(seq_id)
        if row is None:
            row = self._rows[seq_id] = self._free_rows.pop()
            self._lengths[row] = 0
            self._tables[row] = 0  # nothing may point into what is now another's
        length = self._lengths[row]
        if length != len(table):
            self._tables[row, length : len(table)] = table[length:]
            self._lengths[row] = len(table)
        return row


def _spans(batch: ScheduledBatch, table_rows: list[int]) -> tuple[Span, ...]:
    """Describe the rows of each sequence of a batch."""
    spans: list[Span] = []
    for row, sequence, count in zip(
        table_rows, batch.sequences, batch.num_scheduled_tokens, strict=True
    ):
        start = sequence.num_computed_tokens
        spans.append(Span(row, start, start + count, sequence.num_prompt_tokens))
    return tuple(spans)
