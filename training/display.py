"""How a run shows itself while it goes: a progress bar, or log lines where there is no terminal."""

import logging
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Hears what a trainer does."""

    def begin(self, step: int, max_steps: int) -> None:
        """Training starts after `step` steps."""
        ...

    def advance(self, step: int) -> None:
        """Step number `step` is done."""
        ...

    def show(self, record: dict[str, Any]) -> None:
        """A line for the metrics file; see docs/training.md."""
        ...

    def show_sample(self, step: int, text: str) -> None:
        """A text the model wrote."""
        ...

    def note(self, message: str) -> None:
        """Anything else worth a line."""
        ...

    def end(self) -> None:
        """Training has stopped, for whatever reason."""
        ...


class LogDisplay:
    """Lines of the log."""

    def begin(self, step: int, max_steps: int) -> None:
        """See Display."""
        logger.info("training started step=%d max_steps=%d", step, max_steps)

    def advance(self, step: int) -> None:
        """See Display."""

    def show(self, record: dict[str, Any]) -> None:
        """See Display."""
        event = "evaluated" if "val_loss" in record else "trained"
        logger.info("%s %s", event, " ".join(f"{k}={_format(v)}" for k, v in record.items()))

    def show_sample(self, step: int, text: str) -> None:
        """See Display."""
        logger.info("sampled step=%d text=%r", step, text)

    def note(self, message: str) -> None:
        """See Display."""
        logger.info("%s", message)

    def end(self) -> None:
        """See Display."""


class TerminalDisplay:
    """A progress bar with losses and speed, and lines above it."""

    def __init__(self, console: Console) -> None:
        self._facts = {"loss": "-", "val_loss": "-", "tokens_per_second": "-"}
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", facts="")

    def begin(self, step: int, max_steps: int) -> None:
        """See Display."""
        self._progress.update(self._task, completed=step, total=max_steps)
        self._progress.start()

    def advance(self, step: int) -> None:
        """See Display."""
        self._progress.update(self._task, completed=step)

    def show(self, record: dict[str, Any]) -> None:
        """See Display."""
        for name in self._facts.keys() & record.keys():
            self._facts[name] = _format(record[name])
        facts = "loss {loss}  val {val_loss}  {tokens_per_second} tokens/s".format(**self._facts)
        self._progress.update(self._task, facts=facts)
        if "val_loss" in record:
            found = "val loss is not finite"
            if record["val_loss"] is not None:
                found = "val loss {val_loss:.4f}, {bits_per_byte:.4f} bits a byte".format(**record)
            self._print(f"step {record['step']}: {found}")

    def show_sample(self, step: int, text: str) -> None:
        """See Display."""
        self._print(f"step {step}: {text}", style="dim")

    def note(self, message: str) -> None:
        """See Display."""
        self._print(message)

    def end(self) -> None:
        """See Display."""
        self._progress.stop()

    def _print(self, line: str, style: str = "") -> None:
        self._progress.console.print(Text(line, style=style))


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
