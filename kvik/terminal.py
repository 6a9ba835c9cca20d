"""What every command says when it fails, and text made safe for a terminal."""

from typing import NoReturn

import typer
from rich.console import Console

console = Console(stderr=True, highlight=False)


def fail(message: object) -> NoReturn:
    """Say what went wrong and leave with status 1."""
    console.print(f"[bold red]error:[/] {without_markup(message)}", soft_wrap=True)
    raise typer.Exit(1)


def without_markup(message: object) -> str:
    """The text as rich shows it and a terminal may have it."""
    return printable(message).replace("[", r"\[")  # rich would take brackets for markup


def printable(message: object) -> str:
    """The text with what no terminal should obey, or no encoding has, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(message))
