"""The command line: every subcommand builds configs and calls a room; nothing is computed here."""

import importlib.metadata
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="kvik",
    help="Train a GPT and serve it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(stderr=True, highlight=False)

STORYTELLER = Path(__file__).resolve().parent / "weights" / "storyteller"


def fail(message: object) -> NoReturn:
    """Say what went wrong and leave with status 1."""
    console.print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)
    raise typer.Exit(1)


def _plain(message: object) -> str:
    return _printable(message).replace("[", r"\[")  # rich would take brackets for markup


def _printable(message: object) -> str:
    """The text with what no terminal should obey, or no encoding has, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(message))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvik {importlib.metadata.version('kvik')}")
        raise typer.Exit


@app.callback()
def kvik(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train a GPT and serve it."""


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="KVIK_MODEL",
        help="A checkpoint directory, or a name such as openai-community/gpt2.",
        show_default="the storyteller",
    ),
]
DeviceOption = Annotated[str, typer.Option(envvar="KVIK_DEVICE", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(envvar="KVIK_DTYPE", help="auto, float32 or bfloat16.")]


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
) -> None:
    """Show a checkpoint's shape, files, tokenizer and memory ledger. Loads nothing."""
    from model.vocabulary import TokenizerError
    from weights.layout import CheckpointError, read_layout, read_tokenizer
    from weights.ledger import MemoryLedger, available_memory_bytes

    try:
        layout = read_layout(directory)
        files = [(file.name, file.stat().st_size, _sha256(file)) for file in layout.files]
    except CheckpointError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}.")
    try:
        tokenizer = read_tokenizer(layout)
        vocabulary = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids"
    except (CheckpointError, TokenizerError) as error:
        vocabulary = f"unusable: {error}"

    config = layout.config
    lines = [
        ("parameters", f"{config.num_parameters:,}"),
        ("layers, heads, width", f"{config.n_layer}, {config.n_head}, {config.n_embd}"),
        ("MLP width", f"{config.mlp_width} ({config.activation})"),
        ("context", f"{config.n_ctx} tokens"),
        ("vocabulary", f"{config.vocab_size:,} rows"),
        ("biases", "yes" if config.bias else "no (stored as zeros)"),
        ("tokenizer", vocabulary),
        ("bos, eos", f"{layout.bos_token_id}, {list(layout.eos_token_ids)}"),
        ("dtype on disk", ", ".join(layout.dtypes)),
    ]
    # Lines and no table: rich would cut what is wider than the terminal, the sha256 first.
    for heading, value in lines:
        typer.echo(f"{heading:<22}{_printable(value)}")
    for name, size, digest in files:
        typer.echo(f"{'file':<22}{_printable(name)} ({_size(size)})\n  sha256 {digest}")

    available = available_memory_bytes()
    typer.echo(f"\nmemory available      {_size(available)}")
    columns = ("precision", "weights", "KV a token", "KV a context", "contexts fit")
    rows = [columns]
    for precision, num_bytes in (("float32", 4), ("bfloat16", 2)):
        ledger = MemoryLedger.of(config, bytes_per_value=num_bytes)
        rows.append(
            (
                precision,
                _size(ledger.weights_bytes),
                _size(ledger.kv_bytes_per_token),
                _size(ledger.kv_bytes_per_sequence),
                f"{ledger.num_sequences(available):,}",
            )
        )
    for first, *others in rows:
        typer.echo(f"{first:<10}" + "".join(f"{value:>16}" for value in others))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    model: ModelOption = str(STORYTELLER),
    max_tokens: Annotated[
        int, typer.Option(envvar="KVIK_MAX_TOKENS", min=1, help="Tokens to write at most.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(envvar="KVIK_TEMPERATURE", min=0, max=2, help="0 is greedy.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(envvar="KVIK_TOP_K", min=0, help="Most probable tokens kept; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(envvar="KVIK_TOP_P", min=0, max=1, help="Probability mass kept.")
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(envvar="KVIK_MIN_P", min=0, max=1, help="Kept if so probable by the best's."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(envvar="KVIK_REPETITION_PENALTY", help="Above 1: less of what was said."),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(envvar="KVIK_SEED", help="The same seed, the same text.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Continue a text, streaming it to the terminal."""
    import codecs
    import time

    from engine.config import EngineConfig, LaunchConfig
    from engine.errors import EngineError
    from engine.loading import load_engine
    from engine.sampling_params import SamplingParams
    from model.vocabulary import TokenizerError
    from weights.hub import resolve
    from weights.layout import CheckpointError, read_layout, read_tokenizer

    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    try:
        layout = read_layout(resolve(model))
        tokenizer = read_tokenizer(layout)
        prompt_ids = _encode(tokenizer, prompt)
        if not prompt_ids:
            if layout.bos_token_id is None:
                fail("The prompt is empty, and this model has no token to start from.")
            prompt_ids = [layout.bos_token_id]
        if len(prompt_ids) >= layout.config.n_ctx:
            fail(
                f"The prompt has {len(prompt_ids)} tokens; this model's context is "
                f"{layout.config.n_ctx}, and the completion needs room in it too."
            )
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        alone = EngineConfig(max_num_sequences=1)
        engine, _ = load_engine(
            LaunchConfig(model=str(layout.directory), device=device, dtype=dtype, engine=alone)
        )
    except (CheckpointError, TokenizerError, EngineError, ValueError) as error:
        fail(error)
    typer.echo(prompt, nl=False)
    # Bytes become text as soon as they are whole characters: a token may end inside one.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    start, count, failure = time.perf_counter(), 0, None
    for _, output in engine.generate(prompt_ids, params):
        failure = output.error
        if output.token_id is not None:
            count += 1
            if output.token_id not in layout.eos_token_ids:
                typer.echo(decoder.decode(tokenizer.token_bytes(output.token_id)), nl=False)
                sys.stdout.flush()
    typer.echo(decoder.decode(b"", final=True))
    if failure is not None:
        fail(failure)
    seconds = time.perf_counter() - start
    console.print(f"[dim]{count} tokens, {count / seconds:.0f} tokens/s, seed {seed}[/]")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    model: ModelOption = str(STORYTELLER),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Show how well a model predicts a text: loss, perplexity, bits per byte."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from model.score import log_likelihood

    try:
        raw = file.read_bytes()
        text = raw.decode()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8 text: byte {error.start} does not fit.")
    network, tokenizer, layout = _load(model, device, dtype)
    token_ids = _encode(tokenizer, text)
    with Progress(
        "scoring", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("scoring", total=len(token_ids))
        try:
            total, num_scored = log_likelihood(
                network,
                token_ids,
                bos_token_id=layout.bos_token_id,
                vocab_size=tokenizer.vocab_size,
                advance=lambda num_tokens: progress.advance(task, num_tokens),
            )
        except ValueError as error:
            fail(f"{file}: {error}")
    loss = -total / num_scored
    # Without a bos the first token is only context.
    num_bytes = len(raw)
    if layout.bos_token_id is None:
        num_bytes -= len(tokenizer.token_bytes(token_ids[0]))
    typer.echo(f"tokens scored    {num_scored:,} of {len(token_ids):,}")
    typer.echo(f"loss             {loss:.4f} nats a token")
    typer.echo(f"perplexity       {math.exp(min(loss, 700)):.3f}")
    typer.echo(f"bits per byte    {-total / math.log(2) / num_bytes:.4f}")


@app.command()
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
            "--no-tokenizer", envvar="KVIK_NO_TOKENIZER", help="Convert for token ids only."
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
    from typing import get_args

    import torch

    from model.config import Activation
    from weights.convert.conversion import convert as convert_checkpoint
    from weights.layout import CheckpointError

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
        ("changed", report.changed),
        (f"wrote {report.directory}", report.written),
    ):
        out.print(f"[bold]{_plain(heading)}[/]")
        for line in lines:
            out.print(f"  {_plain(line)}")


@app.command()
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
    from rich.progress import Progress

    from training.errors import TrainingError
    from training.prepare import PrepareConfig
    from training.prepare import prepare as prepare_data

    with Progress(console=console, transient=True) as progress:
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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
    """Train a model, or go on: --key value sets any training key of docs/training.md.

    Later ones win: defaults, --preset, --config, KVIK_TRAIN_<KEY> in the environment, --key value.
    """
    import logging

    from training.config import KEYS, parse_arguments, parse_value, preset_values, read_toml
    from training.display import LogDisplay, TerminalDisplay
    from training.errors import TrainingError
    from training.loop import StopRequest, resume_run, start_run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    display = TerminalDisplay(console) if console.is_terminal else LogDisplay()
    with StopRequest() as stop:
        try:
            settings = {
                **preset_values(preset),
                **({} if config is None else read_toml(config)),
                **{
                    key: parse_value(key, os.environ[f"KVIK_TRAIN_{key.upper()}"])
                    for key in KEYS
                    if f"KVIK_TRAIN_{key.upper()}" in os.environ
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
            f"with: kvik train --out {out} --resume",
            soft_wrap=True,
        )
        raise typer.Exit(128 + stop.signal_number)
    typer.echo(f"done       {state.step} steps")
    if state.best_step is not None:
        typer.echo(f"best       step {state.best_step}, val loss {state.best_val_loss:.4f}")
        typer.echo(f"try it     kvik generate --model {out / 'best'}")


@app.command()
def serve(
    model: ModelOption = str(STORYTELLER),
    host: Annotated[
        str, typer.Option(envvar="KVIK_HOST", help="The address to listen on; 0.0.0.0 is all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="KVIK_PORT", help="The port to listen on; 0 is any free one.")
    ] = 8000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    served_model_name: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_SERVED_MODEL_NAME",
            help="What requests call the model.",
            show_default="the directory's name",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="KVIK_API_KEY", help="Let in who has this key; may be repeated."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="KVIK_API_KEY_FILE", help="A file with a key a line.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="KVIK_CORS_ORIGIN", help="Let pages from this origin ask; may be repeated."
        ),
    ] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(envvar="KVIK_TLS_CERTIFICATE", help="A PEM file: serve HTTPS.")
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_TLS_KEY", help="A PEM file.", show_default="in the certificate's file"
        ),
    ] = None,
    max_num_sequences: Annotated[
        int, typer.Option(envvar="KVIK_MAX_NUM_SEQUENCES", help="Generations running at once.")
    ] = 256,
    max_num_scheduled_tokens: Annotated[
        int, typer.Option(envvar="KVIK_MAX_NUM_SCHEDULED_TOKENS", help="Tokens a step computes.")
    ] = 512,
    block_size: Annotated[
        int, typer.Option(envvar="KVIK_BLOCK_SIZE", help="Tokens a block of the KV cache.")
    ] = 16,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            envvar="KVIK_NUM_BLOCKS", help="Blocks of the KV cache.", show_default="what fits"
        ),
    ] = None,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(
            envvar="KVIK_KV_CACHE_BYTES", help="Size of the KV cache.", show_default="what fits"
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(envvar="KVIK_PREFIX_CACHE", help="Compute equal prefixes once.")
    ] = True,
    num_threads: Annotated[
        int | None,
        typer.Option(
            envvar="KVIK_NUM_THREADS", help="Threads of a CPU engine.", show_default="all cores"
        ),
    ] = None,
    max_waiting_requests: Annotated[
        int,
        typer.Option(
            envvar="KVIK_MAX_WAITING_REQUESTS",
            help="Generations accepted beyond those that run; more get a 429.",
        ),
    ] = 256,
    max_prompt_tokens: Annotated[
        int,
        typer.Option(
            envvar="KVIK_MAX_PROMPT_TOKENS",
            help="Prompt tokens accepted and not finished; more get a 429.",
        ),
    ] = 262_144,
    max_body_bytes: Annotated[
        int, typer.Option(envvar="KVIK_MAX_BODY_BYTES", help="Largest body taken.")
    ] = 2 * 2**20,
    max_header_bytes: Annotated[
        int, typer.Option(envvar="KVIK_MAX_HEADER_BYTES", help="Largest head of a request taken.")
    ] = 16 * 2**10,
    receive_seconds: Annotated[
        float,
        typer.Option(envvar="KVIK_RECEIVE_SECONDS", help="Time a request has to arrive."),
    ] = 30.0,
    drain_seconds: Annotated[
        float,
        typer.Option(envvar="KVIK_DRAIN_SECONDS", help="Time for what runs, after SIGTERM."),
    ] = 30.0,
    keepalive_seconds: Annotated[
        float,
        typer.Option(envvar="KVIK_KEEPALIVE_SECONDS", help="Silence until a stream's comment."),
    ] = 15.0,
    stalled_reader_seconds: Annotated[
        float,
        typer.Option(
            envvar="KVIK_STALLED_READER_SECONDS",
            help="Time until a client that reads nothing is dropped.",
        ),
    ] = 30.0,
    hung_after_seconds: Annotated[
        float,
        typer.Option(
            envvar="KVIK_HUNG_AFTER_SECONDS",
            help="A busy engine's silence until readiness calls it hung.",
        ),
    ] = 5.0,
    hang_seconds: Annotated[
        float,
        typer.Option(
            envvar="KVIK_HANG_SECONDS", help="A busy engine's silence until it is replaced."
        ),
    ] = 30.0,
    num_timelines: Annotated[
        int,
        typer.Option(
            envvar="KVIK_NUM_TIMELINES", help="Requests that /v1/requests/{id} remembers."
        ),
    ] = 4096,
    log_format: Annotated[
        str, typer.Option(envvar="KVIK_LOG_FORMAT", help="human or json.")
    ] = "human",
    log_level: Annotated[
        str, typer.Option(envvar="KVIK_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Serve completions over HTTP, until SIGTERM or Ctrl-C."""
    from engine.config import EngineConfig, LaunchConfig
    from engine.messages import Ready
    from model.vocabulary import TokenizerError
    from server import log
    from server.app import CannotServe
    from server.app import serve as serve_http
    from server.config import ServerConfig
    from server.served_model import ServedModel
    from weights.hub import resolve
    from weights.layout import CheckpointError

    if log_format not in log.FORMATS:
        fail(f"--log-format must be one of {', '.join(log.FORMATS)}, got {log_format!r}.")
    if log_level not in log.LEVELS:
        fail(f"--log-level must be one of {', '.join(log.LEVELS)}, got {log_level!r}.")
    log.configure(kind=log_format, level=log_level)
    try:
        directory = resolve(model)
        served = ServedModel.read(directory, name=served_model_name)
        launch = LaunchConfig(
            model=str(directory),
            device=device,
            dtype=dtype,
            kv_cache_bytes=kv_cache_bytes,
            num_threads=num_threads,
            engine=EngineConfig(
                block_size=block_size,
                num_blocks=num_blocks,
                max_num_sequences=max_num_sequences,
                max_num_scheduled_tokens=max_num_scheduled_tokens,
                enable_prefix_cache=prefix_cache,
            ),
        )
        config = ServerConfig(
            host=host,
            port=port,
            api_keys=(*(api_key or ()), *_read_keys(api_key_file)),
            cors_origins=tuple(cors_origin or ()),
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            max_waiting_requests=max_waiting_requests,
            max_prompt_tokens=max_prompt_tokens,
            max_body_bytes=max_body_bytes,
            max_header_bytes=max_header_bytes,
            receive_seconds=receive_seconds,
            drain_seconds=drain_seconds,
            keepalive_seconds=keepalive_seconds,
            stalled_reader_seconds=stalled_reader_seconds,
            hung_after_seconds=hung_after_seconds,
            num_timelines=num_timelines,
        )

        def announce(address: str, facts: Ready) -> None:
            key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
            body = f'{{"model": "{served.name}", "prompt": "Once upon a time", '
            body += '"max_tokens": 200, "stream": true}'
            cache_tokens = facts.num_blocks * facts.block_size
            for line in (
                f"model    {served.name} on {facts.device} in {facts.dtype}, "
                f"weights {facts.weights_id[:16]}",
                f"memory   {_size(facts.available_bytes)} free: KV cache "
                f"{_size(facts.kv_cache_bytes)} ({facts.num_blocks:,} blocks, "
                f"{cache_tokens:,} tokens, {cache_tokens // served.n_ctx:,} contexts of "
                f"{served.n_ctx}), a step {_size(facts.working_bytes)}; "
                f"weights {_size(facts.weights_bytes)}",
                f"address  {address}",
                "try it   "
                f"curl -N {address}/v1/completions{key} -H 'Content-Type: application/json' "
                f"-d '{body}'",
            ):
                typer.echo(line)

        serve_http(config, launch, served, hang_seconds=hang_seconds, announce=announce)
    except (CheckpointError, TokenizerError, CannotServe, ValueError) as error:
        fail(error)


bench = typer.Typer(help="Measure a server, or the engine alone.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("serve")
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
    """Put load on a server and show TTFT, ITL, end-to-end time, tokens/s and goodput."""
    import asyncio
    import json

    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    from benchmarks.serving import BenchmarkError, LoadConfig, measure_serving, table_of

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
            "streams", BarColumn(), MofNCompleteColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task("streams", total=num_requests)
            numbers = asyncio.run(measure_serving(config, advance=lambda: progress.advance(task)))
        if report is not None:
            report.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    except (BenchmarkError, ValueError) as error:
        fail(error)
    except OSError as error:
        fail(f"{report} cannot be written: {error.strerror}.")
    Console(highlight=False).print(table_of(numbers))


@bench.command("decode")
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
    from weights.hub import resolve
    from weights.layout import CheckpointError

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


def _read_keys(path: Path | None) -> list[str]:
    """API keys from a file, a line each, empty lines left out."""
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}.")
    if not any(keys):
        fail(f"{path} has no API key in it.")
    return [key for key in keys if key]


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """Load a checkpoint for the commands that compute: model, tokenizer, layout."""
    import torch

    from model.vocabulary import TokenizerError
    from weights.checkpoint import load_layout
    from weights.hub import resolve
    from weights.layout import CheckpointError, read_layout, read_tokenizer

    dtypes = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        fail(f"--dtype must be one of {', '.join(dtypes)}, got {dtype!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        target = torch.device("meta")
    if target.type not in ("cpu", "cuda"):
        fail(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}.")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        fail(f"--device {device}: there is no such CUDA device here; use --device cpu.")
    try:
        layout = read_layout(resolve(model))
        tokenizer = read_tokenizer(layout)
        return load_layout(layout, device=target, dtype=dtypes[dtype]), tokenizer, layout
    except (CheckpointError, TokenizerError) as error:
        fail(error)


def _encode(tokenizer: Any, text: str) -> list[int]:
    from model.vocabulary import TokenizerError

    try:
        token_ids: list[int] = tokenizer.encode(text)
    except TokenizerError as error:
        fail(error)
    return token_ids


def _sha256(file: Path) -> str:
    import hashlib

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def main() -> None:
    """Run the command line."""
    # Before torch is imported; why, `_worker_environment` in engine/client.py tells.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
