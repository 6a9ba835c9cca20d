"""What every command says when it fails, and text made safe for a terminal."""

import re
from typing import Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand

console = Console(stderr=True, highlight=False)


class Failure(Exception):  # noqa: N818
    """A command cannot do what it was asked; one sentence says why."""


def fail(message: object) -> NoReturn:
    """Say what went wrong and leave with status 1; for commands."""
    raise Failure(str(message))


class Command(TyperCommand):
    """A command that says what went wrong in the words of who typed it."""

    def invoke(self, ctx: Any) -> Any:
        """Run it; a failure is a sentence on standard error and status 1."""
        try:
            return super().invoke(ctx)
        except Failure as failure:
            message = without_markup(self._with_flags(str(failure)))
            console.print(f"[bold red]error:[/] {message}", soft_wrap=True)
            raise typer.Exit(1) from None

    def _with_flags(self, message: str) -> str:
        """Name options as they are typed: the rooms name fields of their configs."""
        for option in self.params:
            flag = next((word for word in option.opts if word.startswith("--")), None)
            if option.name is None or flag is None:
                continue
            # One word may be meant as such, or be a file's name, where it is not the subject.
            whole = r"(?<![\w./-]){}(?![\w/-]|\.\w)" if "_" in option.name else r"^{}(?= must )"
            message = re.sub(whole.format(option.name), flag, message)
        return message


def without_markup(message: object) -> str:
    """The text as rich shows it and a terminal may have it."""
    return printable(message).replace("[", r"\[")  # rich would take brackets for markup


def printable(message: object) -> str:
    """The text with what no terminal should obey, or no encoding has, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(message))
