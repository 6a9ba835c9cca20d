"""Ctrl-C and SIGTERM as a question that can be asked between steps; knows nothing of training."""

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Whether someone asked the run to stop: SIGINT or SIGTERM while it is entered.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            os._exit(128 + number)
        self.signal_number = number
