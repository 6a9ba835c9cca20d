"""Loaded by schemathesis: what JSON Schema cannot say of a completion request.

Rules between fields (docs/api.md has them) are 400s when they are broken, and a deadline that
passes is a 504, as asked for. Without this, most generated requests would end there and never
reach the engine.
"""

import os
from typing import Any

import schemathesis

N_CTX = int(os.environ["TEST_N_CTX"])
MAX_CHOICES = int(os.environ["TEST_MAX_CHOICES"])
VOCAB_SIZE = int(os.environ["TEST_VOCAB_SIZE"])
TOKENS_PER_CHARACTER = 4  # at most: UTF-8's bytes


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    body = case.body
    if case.path != "/v1/completions" or not isinstance(body, dict):
        return
    timeout_s = body.get("timeout_s")
    if isinstance(timeout_s, int | float) and 0 < timeout_s < 60:
        body["timeout_s"] = 60
    if case.meta is not None and case.meta.generation.mode.is_positive:
        keep_rules(body)


def keep_rules(body: dict[str, Any]) -> None:
    """Change a request as little as its own fields want it."""
    max_tokens = 16 if body.get("max_tokens") is None else int(body["max_tokens"])
    if (body.get("min_tokens") or 0) > max_tokens:
        body["min_tokens"] = max_tokens
    if (body.get("best_of") or 128) < (body.get("n") or 1):
        body["best_of"] = None
    if body.get("stream"):
        body["best_of"] = None
    else:
        body.pop("stream_options", None)
    if body.get("logit_bias"):
        ids = {int(key) % VOCAB_SIZE: bias for key, bias in body["logit_bias"].items()}
        body["logit_bias"] = {str(key): bias for key, bias in ids.items()}
    room = N_CTX - max_tokens
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        body["prompt"] = prompt[: room // TOKENS_PER_CHARACTER]
    elif isinstance(prompt, list) and not isinstance(prompt[0], str | list):
        body["prompt"] = prompt[:room]
    elif isinstance(prompt, list):
        num_prompts = MAX_CHOICES // (body.get("best_of") or body.get("n") or 1)
        body["prompt"] = [
            p[: room // TOKENS_PER_CHARACTER] if isinstance(p, str) else p[:room]
            for p in prompt[:num_prompts]
        ]
