"""What the engine is doing right now, in memory that survives it: read it to know of whom it died.

A file mapped by both processes. The worker notes each step's start, sequences and end; the other
side reads the age of the step and, after a death, the sequences of the step that never ended.
"""

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Sequence

_HEADER = struct.Struct("<qddq")  # steps ended, step started at, step ended at, sequences in step
_IDS_START = _HEADER.size


class FlightRecorder:
    """One engine's record. Times are `time.monotonic()`, which processes of a machine share."""

    def __init__(self, descriptor: int) -> None:
        """Map the record behind a file descriptor, as `create` made it in either process."""
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, *, max_num_sequences: int) -> "FlightRecorder":
        """Make a new record in a file without a name."""
        with tempfile.TemporaryFile() as file:
            file.truncate(_IDS_START + 8 * max_num_sequences)
            descriptor = os.dup(file.fileno())
        try:
            return cls(descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def start_step(self, seq_ids: Sequence[int]) -> None:
        """Note that a step of these sequences begins."""
        struct.pack_into(f"<{len(seq_ids)}q", self._map, _IDS_START, *seq_ids)
        struct.pack_into("<d", self._map, 8, time.monotonic())
        struct.pack_into("<q", self._map, 24, len(seq_ids))  # last: it makes the ids count

    def end_step(self) -> None:
        """Note that the step is over and its results are on their way."""
        (num_steps,) = struct.unpack_from("<q", self._map, 0)
        struct.pack_into("<q", self._map, 24, 0)
        struct.pack_into("<d", self._map, 16, time.monotonic())
        struct.pack_into("<q", self._map, 0, num_steps + 1)

    @property
    def num_steps(self) -> int:
        """Steps that ended."""
        return int(_HEADER.unpack_from(self._map)[0])

    @property
    def last_sign_of_life(self) -> float:
        """When the last step began or ended; 0 before the first."""
        _, started, ended, _ = _HEADER.unpack_from(self._map)
        return float(max(started, ended))

    def seq_ids_in_step(self) -> list[int]:
        """The sequences of the step that has begun and not ended; empty between steps."""
        count = _HEADER.unpack_from(self._map)[3]
        return list(struct.unpack_from(f"<{count}q", self._map, _IDS_START))

    def close(self) -> None:
        """Let go of the map and the file."""
        self._map.close()
        os.close(self.descriptor)
