"""One step's rows as tensors: the flat, ragged batch that decode rows and prompt chunks share."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.block_manager import BlockManager
from engine.scheduler import ScheduledBatch


class Span(NamedTuple):
    """Rows of one sequence in a step, as the host knows them."""

    table_row: int  # in the block tables
    start: int  # position of the first
    end: int  # position after the last
    num_prompt_tokens: int  # of the sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """The rows of one step, N of them; those of a sequence lie together, in order of position."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    row_sequences: Tensor  # (N,) int64: which row of block_tables is the row's own
    block_tables: Tensor  # (S, blocks) int32, padded with block 0
    slot_blocks: Tensor  # (N,) int64: the block that the row's keys and values go to
    slot_offsets: Tensor  # (N,) int64: and the place in it
    # For kernels that work by sequence; none where each has one row, and that past its prompt.
    spans: tuple[Span, ...] = ()


class BatchBuilder:
    """Turns scheduled batches into tensors, keeping block tables from step to step.

    A decode step changes at most a block or two of all the tables, so they live in one array in
    which every running sequence has a row, and only what is new is copied.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_sequences: int,
        n_ctx: int,
        device: torch.device,
    ) -> None:
        self._block_manager = block_manager
        self._device = device
        max_blocks = -(-n_ctx // block_manager.block_size)
        self._tables = np.zeros((max_num_sequences, max_blocks), np.int32)
        self._rows: dict[int, int] = {}  # row in the tables by sequence
        self._free_rows = list(range(max_num_sequences - 1, -1, -1))
        self._lengths = [0] * max_num_sequences  # blocks copied, by row

    def build(self, batch: ScheduledBatch) -> ModelInput:
        """Make the tensors of one step. For every batch, in order: either this or `place`."""
        rows = self.place(batch)
        tokens: list[int] = []
        starts: list[int] = []
        is_decode = True
        for sequence, count in zip(batch.sequences, batch.num_scheduled_tokens, strict=True):
            start = sequence.num_computed_tokens
            starts.append(start)
            is_decode = is_decode and count == 1 and start >= sequence.num_prompt_tokens
            if count == 1:
                tokens.append(sequence.token_ids[start])
            else:
                tokens += sequence.token_ids[start : start + count]
        counts = np.array(batch.num_scheduled_tokens)
        firsts = np.cumsum(counts) - counts
        positions = np.repeat(np.array(starts) - firsts, counts) + np.arange(len(tokens))
        row_sequences = np.repeat(np.array(rows), counts)
        block_size = self._block_manager.block_size
        places = positions // block_size
        return ModelInput(
            tokens=self._tensor(np.array(tokens)),
            positions=self._tensor(positions),
            row_sequences=self._tensor(row_sequences),
            block_tables=self._tensor(self._tables),
            slot_blocks=self._tensor(self._tables[row_sequences, places].astype(np.int64)),
            slot_offsets=self._tensor(positions - places * block_size),
            spans=() if is_decode else _spans(batch, rows),
        )

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

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _spans(batch: ScheduledBatch, table_rows: list[int]) -> tuple[Span, ...]:
    """Describe the rows of each sequence of a batch."""
    spans: list[Span] = []
    for row, sequence, count in zip(
        table_rows, batch.sequences, batch.num_scheduled_tokens, strict=True
    ):
        start = sequence.num_computed_tokens
        spans.append(Span(row, start, start + count, sequence.num_prompt_tokens))
    return tuple(spans)
