"""The commands that make a model: `prepare` and `train`."""

import logging
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from kvik.terminal import TRAINING_VARIABLES, console, fail, is_of_kubernetes


def prepare(
    files: Annotated[list[Path], typer.Argument(help="Text files, UTF-8, a document each.")],
    out: Annotated[
        Path, typer.Option(envvar="KVIK_OUT", help="A new directory for tokens and tokenizer.")
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_TOKENIZER",
            help="gpt2 (with --tokenizer-dir), bpe:N to learn one of N ids, or char.",
            show_default="the one in --tokenizer-dir",
        ),
    ] = None,
    tokenizer_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="KVIK_TOKENIZER_DIR",
            help="A directory with a tokenizer's files: GPT-2's, or of the checkpoint to finetune.",
        ),
    ] = None,
    val_fraction: Annotated[
        float,
        typer.Option(envvar="KVIK_VAL_FRACTION", help="Part of the text held out, from its end."),
    ] = 0.1,
    val_file: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="KVIK_VAL_FILE", help="Hold out this file instead; may be given several times."
        ),
    ] = None,
) -> None:
    """Turn text into token shards and a tokenizer, for kvik train."""
    from training.errors import TrainingError
    from training.prepare import PrepareConfig
    from training.prepare import prepare as prepare_data

    hidden = not console.is_terminal  # where it would leave an empty line
    with Progress(console=console, transient=True, disable=hidden) as progress:
        bars: dict[str, Any] = {}

        def advance(stage: str, fraction: float) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0)
            progress.update(bars[stage], completed=fraction)

        try:
            config = PrepareConfig(
                files=tuple(files),
                val_files=tuple(val_file or ()),
                val_fraction=val_fraction,
                tokenizer=tokenizer,
                tokenizer_dir=tokenizer_dir,
            )
            used, splits = prepare_data(config, out, advance=advance)
        except (TrainingError, ValueError) as error:
            fail(error)
    typer.echo(f"tokenizer  {used.kind}, {used.vocab_size:,} ids")
    for split, facts in splits.items():
        ratio = facts.num_bytes / facts.num_tokens
        typer.echo(f"{split:9}  {facts.num_tokens:,} tokens, {ratio:.2f} bytes a token")
    typer.echo(f"wrote      {out}")


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(envvar="KVIK_OUT", help="The run directory.")],
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="KVIK_DATA",
            help="A directory that kvik prepare made.",
            show_default="with --resume, the run's",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(envvar="KVIK_PRESET", help="storyteller, nanogpt-cpu, nanogpt-char or gpt2."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(envvar="KVIK_CONFIG", help="A TOML file of training keys.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(envvar="KVIK_INIT", help="A checkpoint to finetune.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", envvar="KVIK_RESUME", help="Go on with the run in --out.")
    ] = False,
) -> None:
    """Train a model, or go on with a run.

    --key value sets any training key of docs/training.md.
    Later ones win: defaults, --preset, --config, KVIK_TRAIN_<KEY> in the environment, --key value.
    """
    from training.config import check_key, parse_arguments, parse_value, preset_values, read_toml
    from training.display import LogDisplay, TerminalDisplay
    from training.errors import TrainingError
    from training.start import resume_run, start_run
    from training.stop_request import StopRequest

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    display = TerminalDisplay(console) if console.is_terminal else LogDisplay()
    with StopRequest() as stop:
        try:
            settings = {
                **preset_values(preset),
                **({} if config is None else read_toml(config)),
                **{
                    key: parse_value(key, text)
                    for name, text in os.environ.items()
                    if name.startswith(TRAINING_VARIABLES) and not is_of_kubernetes(name)
                    for key in [
                        check_key(name.removeprefix(TRAINING_VARIABLES).lower(), shown=name)
                    ]
                },
                **parse_arguments(context.args),
            }
            if resume and init is not None:
                fail("--init starts a run and --resume goes on with one; leave one of them out.")
            if resume:
                trainer = resume_run(out, settings, data=data, display=display, stop=stop)
            elif data is None:
                fail("--data must name a directory that kvik prepare made.")
            else:
                trainer = start_run(out, settings, data=data, init=init, display=display, stop=stop)
            trainer.train()
        except TrainingError as error:
            fail(error)
    state = trainer.state
    if stop.signal_number is not None:
        console.print(
            f"stopped after step {state.step} of {trainer.config.max_steps}, which is saved; go on "
            f"with: kvik train --out {shlex.quote(str(out))} --resume",
            soft_wrap=True,
        )
        raise typer.Exit(128 + stop.signal_number)
    typer.echo(f"done       {state.step} steps")
    if state.best_step is not None:
        typer.echo(f"best       step {state.best_step}, val loss {state.best_val_loss:.4f}")
        typer.echo(f"try it     kvik generate --model {shlex.quote(str(out / 'best'))}")
