"""The commands that measure: `bench serve` and `bench decode`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from kvik.options import STORYTELLER, DeviceOption, DtypeOption, ModelOption
from kvik.terminal import console, fail


def bench_serve(
    url: Annotated[str, typer.Argument(help="Any OpenAI-style server: http://127.0.0.1:8000.")],
    model: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_BENCH_MODEL",
            help="What the server calls the model.",
            show_default="the first it lists",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVIK_BENCH_API_KEY", help="The server's key.")
    ] = None,
    num_requests: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_NUM_REQUESTS", help="Streams in all.")
    ] = 100,
    concurrency: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_CONCURRENCY", help="Streams at any time.")
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            envvar="KVIK_BENCH_RATE",
            help="Streams a second, at random moments, however many run.",
            show_default="as --concurrency has it",
        ),
    ] = None,
    prompt_words: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_PROMPT_WORDS", help="Words a prompt.")
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_MAX_TOKENS", help="Tokens a completion.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(envvar="KVIK_BENCH_TEMPERATURE", help="0 is greedy.")
    ] = 1.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            envvar="KVIK_BENCH_IGNORE_EOS", help="Completions of full length; not every server can."
        ),
    ] = True,
    good_ttft: Annotated[
        float, typer.Option(envvar="KVIK_BENCH_GOOD_TTFT", help="Goodput: TTFT at most, seconds.")
    ] = 1.0,
    good_itl: Annotated[
        float,
        typer.Option(envvar="KVIK_BENCH_GOOD_ITL", help="Goodput: mean ITL at most, seconds."),
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_SEED", help="Of the prompts and the moments.")
    ] = 1,
    report: Annotated[
        Path | None, typer.Option(envvar="KVIK_BENCH_REPORT", help="Write the numbers as JSON.")
    ] = None,
) -> None:
    """Put load on a server and show its latencies, tokens/s and goodput."""
    from benchmarks.serving import BenchmarkError, LoadConfig, bench_serving, table_of

    try:
        config = LoadConfig(
            url=url,
            model=model,
            api_key=api_key,
            num_requests=num_requests,
            concurrency=concurrency,
            rate=rate,
            prompt_words=prompt_words,
            max_tokens=max_tokens,
            temperature=temperature,
            ignore_eos=ignore_eos,
            good_ttft_seconds=good_ttft,
            good_itl_seconds=good_itl,
            seed=seed,
        )
        with Progress(
            "streams",
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task("streams", total=num_requests)
            numbers = bench_serving(config, advance=lambda: progress.advance(task))
    except (BenchmarkError, ValueError) as error:
        fail(error)
    Console(highlight=False).print(table_of(numbers))
    if report is not None:
        try:
            report.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            fail(f"{report} cannot be written: {error.strerror}.")


def bench_decode(
    model: ModelOption = str(STORYTELLER),
    num_sequences: Annotated[
        list[int] | None,
        typer.Option(
            envvar="KVIK_BENCH_NUM_SEQUENCES",
            min=1,
            help="Sequences decoded together; may be repeated.",
            show_default="1, 8 and 32",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_PROMPT_TOKENS", min=1, help="Tokens a prompt.")
    ] = 32,
    new_tokens: Annotated[
        int, typer.Option(envvar="KVIK_BENCH_NEW_TOKENS", min=2, help="Tokens a completion.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(envvar="KVIK_BENCH_TEMPERATURE", min=0, max=2, help="0 is greedy.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(envvar="KVIK_BENCH_TOP_P", min=0, max=1, help="Mass kept.")
    ] = 1.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Measure the engine alone, decoding in batches of several sizes."""
    from benchmarks.decode import bench_decode as measure
    from engine.errors import EngineError
    from weights.errors import CheckpointError
    from weights.hub import resolve

    try:
        measure(
            str(resolve(model)),
            num_sequences=num_sequences or [1, 8, 32],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            temperature=temperature,
            top_p=top_p,
            device=device,
            dtype=dtype,
            console=Console(highlight=False),
        )
    except (CheckpointError, EngineError, ValueError) as error:
        fail(error)
