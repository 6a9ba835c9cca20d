"""The tree of commands; each is defined with its family and imports its room when it runs."""

import importlib.metadata
import os
from typing import Annotated

import typer

from kvik.bench import bench_decode, bench_serve
from kvik.checkpoints import convert, inspect, score
from kvik.generate import generate
from kvik.serve import serve
from kvik.terminal import Command, warn_of_unknown_variables
from kvik.train import prepare, train

app = typer.Typer(
    name="kvik",
    help="Train a GPT and serve it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut long names short in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvik {importlib.metadata.version('kvik')}")
        raise typer.Exit


@app.callback()
def kvik(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train a GPT and serve it."""
    warn_of_unknown_variables(ctx.command, os.environ)


app.command(cls=Command)(inspect)
app.command(cls=Command)(generate)
app.command(cls=Command)(score)
app.command(cls=Command)(convert)
app.command(cls=Command)(prepare)
# --key value sets any training key, and those are not options that typer knows.
app.command(
    cls=Command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)(train)
app.command(cls=Command)(serve)

bench = typer.Typer(
    help="Measure a server, or the engine alone.", no_args_is_help=True, rich_markup_mode=None
)
bench.command("serve", cls=Command)(bench_serve)
bench.command("decode", cls=Command)(bench_decode)
app.add_typer(bench, name="bench")
