"""From a checkpoint directory to an engine that is ready to step."""

import ctypes
import dataclasses
import logging
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from engine.config import EngineConfig, LaunchConfig
from engine.cpu_features import compiled_for
from engine.cpu_math import announce_compiling, kept_mark
from engine.cpu_threads import choose_threads
from engine.engine import Engine
from engine.errors import DoesNotFit, StartRefused
from engine.memory import plan_memory
from engine.messages import Ready
from engine.precision import Precision, choose_precision
from model.config import GPTConfig
from model.gpt import GPT
from model.vocabulary import TokenizerError
from weights.checkpoint import load_layout
from weights.digest import start_hashing
from weights.layout import Layout, read_layout, read_tokenizer
from weights.ledger import MemoryLedger, available_memory_bytes, kv_bytes_per_token

logger = logging.getLogger(__name__)

_NAMES = {torch.float8_e4m3fn: "float8"}


def load_engine(
    config: LaunchConfig, *, hashing: Future[str] | None = None
) -> tuple[Engine, Ready]:
    """Load a checkpoint, plan the memory, and build the engine and what it says of itself.

    `hashing` is that of its weights, where it has begun already. Raises CheckpointError for the
    checkpoint, StartRefused for device or precision, DoesNotFit for the memory.
    """
    threads = choose_threads(config.num_threads, torch.get_num_threads())
    torch.set_num_threads(threads.count)
    layout = read_layout(Path(config.model))
    device = _choose_device(config.device)
    precision = choose_precision(config.dtype, device)
    dtype = precision.dtype
    kv_cache_dtype = _choose_kv_cache_dtype(config.kv_cache_dtype, dtype, device)
    kv_cache_precision = _NAMES.get(kv_cache_dtype, str(kv_cache_dtype).removeprefix("torch."))
    if not config.same_bytes and device.type != "cuda":
        raise StartRefused(
            reason="Without same bytes only CUDA is faster; on a CPU nothing would change: leave "
            "--same-bytes on."
        )
    vocab_size = config.vocab_size or _known_ids(layout)
    hashing = hashing or start_hashing(layout.directory)
    engine_config = config.engine.for_device(device.type)
    on_cpu = device.type == "cpu"
    with ThreadPoolExecutor(1) as executor:
        # LLVM and torch let go of the interpreter's lock: kernels come while weights are packed.
        if on_cpu:
            mark = kept_mark(precision.name, kv_cache_precision)
            are_kept = mark.exists()
            kernels = executor.submit(_load_kernels, layout.config, precision, kv_cache_dtype)
            if not are_kept:
                # A compiler leaves some 200 MB behind, which the cache cannot have.
                kernels.result()
                with suppress(OSError):  # a full disk: the next start waits again
                    mark.parent.mkdir(parents=True, exist_ok=True)
                    mark.touch()
        # On a CPU each block is packed, and read no sooner: reading all of them at first would take
        # as much memory again, which takes longer to come than what is read into it.
        model = load_layout(layout, device=device, dtype=dtype, reads_blocks_late=on_cpu)
        weights_bytes = MemoryLedger.of(layout.config, precision=precision.name).weights_bytes
        held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        plan = plan_memory(
            layout.config,
            engine_config,
            kv_bytes_per_token=kv_bytes_per_token(layout.config, kv_cache_precision),
            weights_bytes=weights_bytes,
            available_bytes=_available_bytes(device) - max(0, weights_bytes - held),
            kv_cache_bytes=config.kv_cache_bytes,
        )
        digest = hashing.result()
        try:
            engine = Engine(
                model,
                engine_config,
                num_blocks=plan.num_blocks,
                vocab_size=vocab_size,
                eos_token_ids=layout.eos_token_ids,
                weights_id=bytes.fromhex(digest),
                quantizes=precision.quantizes,
                kv_cache_dtype=kv_cache_dtype,
                same_bytes=config.same_bytes,
            )
        # torch's out-of-memory errors are RuntimeErrors, and mapped memory's OSErrors.
        except (MemoryError, OSError, RuntimeError) as error:
            raise DoesNotFit(
                f"The KV cache of {plan.kv_cache_bytes / 1e6:.0f} MB could not be allocated "
                f"({error}): lower kv_cache_bytes or num_blocks."
            ) from error
        del model
        if on_cpu:
            kernels.result()
    try:
        engine.warm_up()
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise StartRefused(
            reason="On CUDA kernels are compiled at start, for which Triton needs gcc or clang: "
            "install one, or name it in CC."
        ) from error
    is_batch_invariant = engine.is_batch_invariant()
    _return_free_memory()
    ready = Ready(
        pid=os.getpid(),
        device=str(device),
        dtype=precision.name,
        products=precision.products,
        compiled_for=_compiled_for(device),
        numerics=precision.reason,
        kv_cache_dtype=kv_cache_precision,
        n_ctx=engine.n_ctx,
        vocab_size=engine.vocab_size,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        weights_bytes=engine.weights_bytes,
        working_bytes=plan.working_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        available_bytes=plan.available_bytes,
        weights_id=digest,
        is_batch_invariant=is_batch_invariant,
        same_bytes=config.same_bytes,
        threads=f"{threads.count}, {threads.reason}" if device.type == "cpu" else "",
    )
    return engine, ready


def _load_kernels(config: GPTConfig, precision: Precision, kv_cache_dtype: torch.dtype) -> None:
    """Compile what a step on a CPU runs, or load it from the disk, by a step of a small model.

    One of a single layer and head and few ids: kernels are compiled for types, not for sizes.
    """
    small = dataclasses.replace(
        config, n_layer=1, n_head=1, n_embd=config.head_size, n_ctx=16, vocab_size=64
    )
    with torch.device("meta"):
        model = GPT(small)
    for name, parameter in list(model.named_parameters()):
        module, _, attribute = name.rpartition(".")
        zeros = nn.Parameter(torch.zeros(parameter.shape, dtype=precision.dtype))
        setattr(model.get_submodule(module), attribute, zeros)
    settings = EngineConfig(max_num_sequences=1, max_num_scheduled_tokens=16)
    engine = Engine(
        model.eval(),
        settings,
        num_blocks=3,
        vocab_size=64,
        eos_token_ids=(),
        quantizes=precision.quantizes,
        kv_cache_dtype=kv_cache_dtype,
    )
    with announce_compiling():
        engine.warm_up()


def _compiled_for(device: torch.device) -> str:
    if device.type == "cpu":
        return compiled_for()
    return f"{torch.cuda.get_device_name(device)} torch {torch.__version__}"  # and its Triton


def _return_free_memory() -> None:
    """Give back to the system what loading needed and glibc keeps for later; elsewhere, nothing."""
    if sys.platform == "linux":
        # A C library without it, musl say, returns memory by itself.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _known_ids(layout: Layout) -> int:
    """How many ids may be sampled: the tokenizer's, or all where there is none."""
    try:
        return read_tokenizer(layout).vocab_size
    except TokenizerError as error:
        logger.warning("no tokenizer, so every id may be sampled reason=%s", error)
        return layout.config.vocab_size


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartRefused(
            reason=f"device must be auto, cpu, cuda or cuda:N, got {name!r}."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise StartRefused(reason=f"device must be auto, cpu, cuda or cuda:N, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartRefused(
            reason=f"There is no CUDA device {device.index or 0} here "
            f"({torch.cuda.device_count()} found); use --device cpu."
        )
    if device.type == "cuda":
        # Streams, events and Triton's launches go to the current device, wherever tensors are.
        torch.cuda.set_device(device.index or 0)
    return device


def _choose_kv_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of the cache; `auto` is that of the computation."""
    own = str(dtype).removeprefix("torch.")
    if name in ("auto", own):
        return dtype
    if device.type == "cpu" and name != "float8":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[name]
    if name != "float8" or device.type != "cuda" or dtype != torch.bfloat16:
        raise StartRefused(
            reason=f"kv_cache_dtype {name} does not go with {own} on {device.type}: on a CPU it is "
            "float32, bfloat16 or int8; on CUDA as the model computes (auto), or float8 in "
            "bfloat16."
        )
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise StartRefused(
            reason="kv_cache_dtype float8 needs a GPU of compute capability 8.9 or later; use auto."
        )
    return torch.float8_e4m3fn


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()
