"""The command `serve`: completions over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from kvik.options import (
    STORYTELLER,
    DeviceOption,
    DtypeOption,
    KVCacheDtypeOption,
    ModelOption,
    SameBytesOption,
)
from kvik.terminal import fail


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
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    same_bytes: SameBytesOption = True,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            envvar="KVIK_SERVED_MODEL_NAME",
            help="What requests call the model.",
            show_default="the directory's name, or that on the hub",
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
        int | None,
        typer.Option(
            envvar="KVIK_MAX_NUM_SCHEDULED_TOKENS",
            help="Tokens a step computes; of prompts 5/8 of that, where others decode and it "
            "cannot take all.",
            show_default="256, on CUDA 2048",
        ),
    ] = None,
    max_num_rounds: Annotated[
        int,
        typer.Option(
            envvar="KVIK_MAX_NUM_ROUNDS",
            help="On CUDA: tokens of a stream that may be drawn before any of them is looked at.",
        ),
    ] = 4,
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
            envvar="KVIK_KV_CACHE_BYTES",
            help="Size of the KV cache, in place of --num-blocks.",
            show_default="what fits",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option(envvar="KVIK_PREFIX_CACHE", help="Compute equal prefixes once.")
    ] = True,
    num_threads: Annotated[
        int | None,
        typer.Option(
            envvar="KVIK_NUM_THREADS",
            help="Threads of a CPU engine.",
            show_default="one a core, within the CPU quota",
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
    from engine.config import EngineConfig
    from engine.worker_process import WorkerProcess
    from model.vocabulary import TokenizerError
    from server import log
    from weights.errors import CheckpointError
    from weights.hub import name_of, resolve
    from weights.layout import read_layout

    if log_format not in log.FORMATS:
        fail(f"--log-format must be one of {', '.join(log.FORMATS)}, got {log_format!r}.")
    if log_level not in log.LEVELS:
        fail(f"--log-level must be one of {', '.join(log.LEVELS)}, got {log_level!r}.")
    log.configure(kind=log_format, level=log_level)
    try:
        layout = read_layout(resolve(model))
        engine = EngineConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_sequences=max_num_sequences,
            max_num_scheduled_tokens=max_num_scheduled_tokens,
            max_num_rounds=max_num_rounds,
            enable_prefix_cache=prefix_cache,
        )
        try:
            worker = WorkerProcess(layout.directory, max_num_sequences=max_num_sequences)
        except OSError as error:
            fail(f"The engine's process cannot be started: {error.strerror}.")
        with worker as first_worker:
            # What the worker imports takes longer than all of the following, and goes on beside it.
            from engine.config import LaunchConfig
            from server.announcement import describe_start
            from server.app import CannotServe
            from server.app import serve as serve_http
            from server.config import ServerConfig
            from server.served_model import ServedModel
            from weights.layout import read_tokenizer

            name = served_model_name or name_of(model)
            served = ServedModel.of(layout, read_tokenizer(layout), name=name)
            launch = LaunchConfig(
                model=str(layout.directory),
                device=device,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                same_bytes=same_bytes,
                kv_cache_bytes=kv_cache_bytes,
                num_threads=num_threads,
                vocab_size=served.vocab_size,
                engine=engine,
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
            try:
                serve_http(
                    config,
                    launch,
                    served,
                    hang_seconds=hang_seconds,
                    first_worker=first_worker,
                    announce=lambda address, facts: typer.echo(
                        "\n".join(describe_start(address, facts, served, config))
                    ),
                )
            except CannotServe as error:
                fail(error)
    except (CheckpointError, TokenizerError, ValueError) as error:
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
