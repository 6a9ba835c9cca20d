"""What the server says once it can be used: what runs, where memory goes, where and how to ask."""

import json
import shlex

from engine.messages import Ready
from server.config import ServerConfig
from server.served_model import ServedModel
from weights.ledger import format_bytes


def describe_start(
    address: str, facts: Ready, model: ServedModel, config: ServerConfig
) -> list[str]:
    """Lines for people."""
    cache_tokens = facts.num_blocks * facts.block_size
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    body = {
        "model": model.name, "prompt": "Once upon a time", "max_tokens": 200, "stream": True,
    }  # fmt: skip
    return [
        f"model    {model.name} on {facts.device} in {facts.dtype}, "
        f"weights {facts.weights_id[:16]}",
        f"numbers  {facts.numerics}",
        *([f"threads  {facts.threads}"] if facts.threads else []),
        f"memory   {format_bytes(facts.available_bytes)} free: {facts.kv_cache_dtype} KV cache "
        f"{format_bytes(facts.kv_cache_bytes)} ({facts.num_blocks:,} blocks, "
        f"{cache_tokens:,} tokens, {cache_tokens // model.n_ctx:,} contexts of {model.n_ctx}), "
        f"a step {format_bytes(facts.working_bytes)}; weights {format_bytes(facts.weights_bytes)}",
        *([] if facts.same_bytes else ["bytes    may vary with what else runs"]),
        f"address  {address}",
        f"watch    {address}/dashboard",
        "try it   "
        f"curl -N {address}/v1/completions{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}",
    ]
