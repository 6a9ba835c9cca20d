"""What every command says when it fails, and text made safe for a terminal."""

import difflib
import re
from collections.abc import Iterable, Iterator
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


TRAINING_VARIABLES = "KVIK_TRAIN_"  # and a training key, which `kvik train` checks
_OF_A_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_\d+_(TCP|UDP|SCTP).*)?$")


def is_of_kubernetes(name: str) -> bool:
    """Whether a variable is one that a pod gets for each service, perhaps `kvik-api`."""
    return _OF_A_SERVICE.search(name) is not None


def warn_of_unknown_variables(root: Any, environment: Iterable[str]) -> None:
    """Name the variables that look like an option's of any command below `root` and are none."""
    known = set(_variables(root))
    for name in sorted(environment):
        if not name.startswith("KVIK_") or name in known:
            continue
        if name.startswith(TRAINING_VARIABLES) or is_of_kubernetes(name):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        remedy = f"did you mean {near[0]}?" if near else "docs/configuration.md has them all."
        warning = f"{name} is no option's variable, and is ignored: {remedy}"
        console.print(f"[bold yellow]warning:[/] {without_markup(warning)}", soft_wrap=True)


def _variables(command: Any) -> Iterator[str]:
    """The variables of a command's options, and of those below it."""
    for option in command.params:
        yield from [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()
    for inner in getattr(command, "commands", {}).values():
        yield from _variables(inner)


def without_markup(message: object) -> str:
    """The text as rich shows it and a terminal may have it."""
    return printable(message).replace("[", r"\[")  # rich would take brackets for markup


def printable(message: object) -> str:
    """The text with what no terminal should obey, or no encoding has, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(message))
