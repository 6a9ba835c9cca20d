"""The commands around a checkpoint: `inspect`, `score` and `convert`."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from kvik.options import STORYTELLER, DeviceOption, ModelOption
from kvik.terminal import console, fail, printable, without_markup


def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
) -> None:
    """Show a checkpoint's shape, files, tokenizer and memory ledger. Loads nothing."""
    from weights.errors import CheckpointError
    from weights.inspection import describe

    try:
        lines = describe(directory)
    except CheckpointError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}.")
    for line in lines:
        typer.echo(printable(line))


def score(
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    model: ModelOption = str(STORYTELLER),
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(envvar="KVIK_DTYPE", help="auto, float32 or bfloat16.")
    ] = "auto",
) -> None:
    """Show loss, perplexity and bits per byte of a text."""
    import torch

    from model.score import score as score_tokens
    from model.vocabulary import TokenizerError
    from weights.checkpoint import load_layout
    from weights.errors import CheckpointError
    from weights.hub import resolve
    from weights.layout import read_layout, read_tokenizer

    try:
        text = file.read_bytes().decode()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8 text: byte {error.start} does not fit.")
    dtypes = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        fail(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}.")
    target = _existing_device(device)
    try:
        layout = read_layout(resolve(model))
        tokenizer = read_tokenizer(layout)
        network = load_layout(layout, device=target, dtype=dtypes[dtype])
        token_ids = tokenizer.encode(text)
    except (CheckpointError, TokenizerError) as error:
        fail(error)
    with Progress(
        "scoring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("scoring", total=len(token_ids))
        try:
            found = score_tokens(
                network,
                tokenizer,
                token_ids,
                bos_token_id=layout.bos_token_id,
                advance=lambda num_tokens: progress.advance(task, num_tokens),
            )
        except ValueError as error:
            fail(f"{file}: {error}")
    typer.echo(f"tokens scored    {found.num_scored:,} of {len(token_ids):,}")
    typer.echo(f"loss             {found.loss:.4f} nats a token")
    typer.echo(f"perplexity       {found.perplexity:.3f}")
    typer.echo(f"bits per byte    {found.bits_per_byte:.4f}")


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="nanoGPT's ckpt.pt, llm.c's model.bin, or a Hugging Face directory."),
    ],
    destination: Annotated[Path, typer.Argument(help="A new checkpoint directory.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_CONVERT_DTYPE",
            help="float32, bfloat16 or float16 on disk.",
            show_default="the source's",
        ),
    ] = None,
    tokenizer_dir: Annotated[
        Path | None,
        typer.Option(envvar="KVIK_TOKENIZER_DIR", help="Where GPT-2's or another BPE lies."),
    ] = None,
    meta: Annotated[
        Path | None,
        typer.Option(envvar="KVIK_META", help="nanoGPT's meta.pkl, for a model of characters."),
    ] = None,
    no_tokenizer: Annotated[
        bool,
        typer.Option(
            "--no-tokenizer",
            envvar="KVIK_NO_TOKENIZER",
            help="Convert the weights alone; they are served once a tokenizer lies beside them.",
        ),
    ] = False,
    activation: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_ACTIVATION",
            help="What an old nanoGPT checkpoint computes: gelu_new before May 2023.",
            show_default="gelu",
        ),
    ] = None,
) -> None:
    """Turn any supported checkpoint into ours. Says what it found and what it changed."""
    import torch

    from model.config import Activation
    from weights.convert.conversion import convert as convert_checkpoint
    from weights.errors import CheckpointError

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        fail(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}.")
    activations: dict[str, Activation] = {name: name for name in get_args(Activation)}
    if activation is not None and activation not in activations:
        fail(f"--activation must be one of {', '.join(activations)}, got {activation!r}.")
    try:
        report = convert_checkpoint(
            source,
            destination,
            dtype=None if dtype is None else dtypes[dtype],
            tokenizer_directory=tokenizer_dir,
            meta=meta,
            without_tokenizer=no_tokenizer,
            activation=None if activation is None else activations[activation],
        )
    except CheckpointError as error:
        fail(error)
    out = Console(highlight=False, soft_wrap=True)
    for heading, lines in (
        ("found", report.found),
        ("changed", report.changed or ["nothing"]),
        (f"wrote {report.directory}", report.written),
    ):
        out.print(f"[bold]{without_markup(heading)}[/]")
        for line in lines:
            out.print(f"  {without_markup(line)}")


def _existing_device(name: str) -> str:
    """The device of that name, or that `auto` finds, as torch calls it."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: there is no such CUDA device here; use --device cpu.")
    return name
