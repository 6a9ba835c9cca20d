"""The documentation against the code: what can be set is written down, and what is named exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvik.command_line import app

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, Any]]:
    """Every command of the app by full name; typer brings a click of its own, untyped here."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "commands"):
            for child_name, child in command.commands.items():
                yield from walk(f"{name} {child_name}".strip(), child)
        else:
            yield name, command

    yield from walk("", typer.main.get_command(app))


OPTIONS = [
    pytest.param(name, option, id=f"{name} {max(option.opts, key=len)}")
    for name, command in commands()
    for option in command.params
    if option.param_type_name == "option" and option.name != "help"
]


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_help_shows_every_option_and_variable_whole_in_80_columns(name: str, command: Any) -> None:
    shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "80"}).stdout

    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            assert re.search(rf"{max(option.opts, key=len)}\b", shown)
            assert re.search(rf"\b{option.envvar}\b", shown)


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_the_list_of_commands_cuts_no_sentence_short(group: list[str]) -> None:
    shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).stdout

    assert "..." not in shown.partition("Commands:")[2]


def section(name: str) -> str:
    """The part of docs/configuration.md about one command."""
    found = re.search(rf"^## `kvik {re.escape(name)}`$(.*?)(?=^## |\Z)", CONFIGURATION, re.M | re.S)
    assert found is not None, f"docs/configuration.md has no section on kvik {name}"
    return found[1]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_is_documented_with_its_variable(name: str, option: Any) -> None:
    assert f"`{max(option.opts, key=len)}`" in section(name)
    variable = option.envvar
    assert isinstance(variable, str), "every option has an environment variable"
    assert variable.startswith("KVIK_")
    assert f"`{variable}`" in section(name)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_the_documentation_of_an_option_is_its_help_and_its_default(name: str, option: Any) -> None:
    (row,) = (row for row in section(name).splitlines() if f"`{max(option.opts, key=len)}`" in row)
    default = option.show_default if isinstance(option.show_default, str) else option.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif option.required:
        default = "required"

    assert row.split("|")[3].strip() == str("" if default is None else default)
    assert row.split("|")[4].strip() == option.help


def test_no_option_is_documented_that_does_not_exist() -> None:
    known = {
        max(option.opts, key=len)
        for _, command in commands()
        for option in command.params
        if option.param_type_name == "option"
    }
    documented = set(re.findall(r"^\| `(--[a-z0-9-]+)`", CONFIGURATION, re.M))

    assert documented <= known


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
