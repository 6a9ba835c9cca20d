"""From a checkpoint directory to an engine that is ready to step."""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from engine.config import LaunchConfig
from engine.engine import Engine
from engine.errors import DoesNotFit, StartRefused
from engine.linear import can_fuse, can_pack
from engine.memory import plan_memory
from engine.messages import Ready
from model.vocabulary import TokenizerError
from weights.checkpoint import load_layout
from weights.layout import Layout, read_layout, read_tokenizer
from weights.ledger import available_memory_bytes

logger = logging.getLogger(__name__)

_NAMES = {torch.float8_e4m3fn: "float8"}


def load_engine(config: LaunchConfig) -> tuple[Engine, Ready]:
    """Load a checkpoint, plan the memory, and build the engine and what it says of itself.

    Raises CheckpointError for the checkpoint, StartRefused for device or precision, DoesNotFit for
    the memory.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    layout = read_layout(Path(config.model))
    device = _choose_device(config.device)
    dtype = _choose_dtype(config.dtype, device)
    cache_dtype = _choose_cache_dtype(config.kv_cache_dtype, dtype, device)
    if not config.same_bytes and device.type != "cuda":
        raise StartRefused(
            reason="Without same bytes only CUDA is faster; on a CPU nothing would change: leave "
            "--same-bytes on."
        )
    with ThreadPoolExecutor(1) as executor:  # hashing lets go of the interpreter lock
        weights_id = executor.submit(hash_weights, layout)
        model = load_layout(layout, device=device, dtype=dtype)
        digest = weights_id.result()
    engine_config = config.engine.for_device(device.type)
    bytes_per_value = dtype.itemsize
    weights_bytes = sum(p.nbytes for p in model.parameters())
    plan = plan_memory(
        layout.config,
        engine_config,
        bytes_per_value=bytes_per_value,
        bytes_per_cached_value=cache_dtype.itemsize,
        weights_bytes=weights_bytes,
        available_bytes=_available_bytes(device),
        kv_cache_bytes=config.kv_cache_bytes,
    )
    try:
        engine = Engine(
            model,
            engine_config,
            num_blocks=plan.num_blocks,
            vocab_size=_known_ids(layout),
            eos_token_ids=layout.eos_token_ids,
            weights_id=bytes.fromhex(digest),
            quantizes=config.dtype == "int8",
            cache_dtype=cache_dtype,
            same_bytes=config.same_bytes,
        )
    # torch's out-of-memory errors are RuntimeErrors, and mapped memory's OSErrors.
    except (MemoryError, OSError, RuntimeError) as error:
        raise DoesNotFit(
            f"The KV cache of {plan.kv_cache_bytes / 1e6:.0f} MB could not be allocated "
            f"({error}): lower kv_cache_bytes or num_blocks."
        ) from error
    try:
        engine.warm_up()
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise StartRefused(
            reason="On CUDA kernels are compiled at start, for which Triton needs gcc or clang: "
            "install one, or name it in CC."
        ) from error
    ready = Ready(
        pid=os.getpid(),
        device=str(device),
        dtype="int8" if config.dtype == "int8" else str(dtype).removeprefix("torch."),
        n_ctx=engine.n_ctx,
        vocab_size=engine.vocab_size,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        weights_bytes=weights_bytes,
        working_bytes=plan.working_bytes,
        kv_cache_bytes=plan.kv_cache_bytes,
        available_bytes=plan.available_bytes,
        weights_id=digest,
        is_batch_invariant=engine.is_batch_invariant(),
        kv_cache_dtype=_NAMES.get(cache_dtype, str(cache_dtype).removeprefix("torch.")),
        same_bytes=config.same_bytes,
    )
    return engine, ready


def hash_weights(layout: Layout) -> str:
    """sha256 over the weight files, in hex."""
    digest = hashlib.sha256()
    for file in layout.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


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


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision to compute in; `auto` is bfloat16 where the processor has it.

    int8 is the weights' alone: between the products and in the cache it is bfloat16.
    """
    if name == "int8":
        if not can_fuse(device, torch.bfloat16, quantizes=True):
            raise StartRefused(
                reason="dtype int8 needs a CPU with AVX-512 VNNI, which is not here; use --dtype "
                "auto."
            )
        return torch.bfloat16
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    has_bfloat16 = can_fuse(device, torch.bfloat16) or can_pack(device, torch.bfloat16)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _choose_cache_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What keys and values are stored in; `auto` is what the model computes in."""
    if name == "auto" or name == str(dtype).removeprefix("torch."):
        return dtype
    if name != "float8" or device.type != "cuda" or dtype != torch.bfloat16:
        raise StartRefused(
            reason=f"kv_cache_dtype {name} does not go with {str(dtype).removeprefix('torch.')} on "
            f"{device.type}: a cache is as the model computes (auto), or float8 on CUDA in "
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
