"""The command `generate`: a completion on the terminal, by an engine in this process."""

import codecs
import os
import sys
import time
from typing import Annotated

import typer

from kvik.options import STORYTELLER, DeviceOption, DtypeOption, ModelOption
from kvik.terminal import console, fail


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
    from engine.config import EngineConfig, LaunchConfig
    from engine.errors import EngineError
    from engine.loading import load_engine
    from engine.sampling_params import SamplingParams
    from model.vocabulary import TokenizerError
    from weights.errors import CheckpointError
    from weights.hub import resolve
    from weights.layout import read_layout, read_tokenizer

    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    try:
        layout = read_layout(resolve(model))
        tokenizer = read_tokenizer(layout)
        prompt_ids = tokenizer.encode(prompt)
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
            LaunchConfig(
                model=str(layout.directory),
                device=device,
                dtype=dtype,
                vocab_size=tokenizer.vocab_size,
                engine=alone,
            )
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
    full = ""
    if count < max_tokens and len(prompt_ids) + count == engine.n_ctx:
        full = f", and the context of {engine.n_ctx} is full"
    console.print(f"[dim]{count} tokens, {count / seconds:.0f} tokens/s, seed {seed}{full}[/]")
