"""What a cache takes, and that a coarser one predicts as well."""

import math
import os
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, LaunchConfig
from engine.kv_cache import KVCache
from engine.loading import load_engine
from engine.messages import TopLogprobs
from engine.sampling_params import SamplingParams
from tests.tiny_models import gpt_with_outliers, tiny_checkpoint, tiny_config
from weights.ledger import kv_bytes_per_token

STORYTELLER = Path(__file__).parents[2] / "weights" / "storyteller"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_cache_takes_what_the_ledger_says(dtype: torch.dtype) -> None:
    config = tiny_config(n_layer=3)

    cache = KVCache(config, num_blocks=5, block_size=4, dtype=dtype, device="cpu")

    name = str(dtype).removeprefix("torch.")
    assert cache.num_bytes == 5 * 4 * kv_bytes_per_token(config, name)


def test_cleared_blocks_of_eight_bits_are_zeros() -> None:
    cache = KVCache(tiny_config(), num_blocks=3, block_size=4, dtype=torch.int8, device="cpu")
    cache.k.fill_(-1)  # as scales, NaN

    cache.clear([1])

    assert not cache.k[:, 1].any()
    assert cache.k[:, 2].all()


def test_memory_is_got_ahead_of_use_and_no_block_in_use_is_touched() -> None:
    config = tiny_config(n_layer=12, n_embd=256, n_ctx=2048)
    cache = KVCache(config, num_blocks=2000, block_size=16, dtype=torch.float32, device="cpu")
    block_bytes = cache.num_bytes // 2000
    cache.kv[:300] = 1
    before = _resident_bytes()

    pieces = 0
    while cache.prepare(300):
        pieces += 1

    assert (cache.kv[:300] == 1).all()
    got = _resident_bytes() - before
    assert 2**29 - 2**25 < got < 2**29 + 2**25  # the tests' process does other things too
    assert 2**29 / pieces < 2**21 + block_bytes  # a request waits for no more
    assert cache.prepare(301)  # and goes on when more is in use


def test_there_is_an_end_to_the_memory_got_ahead() -> None:
    config = tiny_config(n_layer=12, n_embd=256, n_ctx=64)  # so 16 contexts are 256 blocks of 4
    cache = KVCache(config, num_blocks=400, block_size=4, dtype=torch.float32, device="cpu")
    cache.kv.fill_(1)

    while cache.prepare(10):
        pass
    touched = (cache.kv[:, 0, 0, 0, 0, 0] == 0).nonzero().flatten().tolist()
    assert touched[0] == 10
    assert 10 + 256 <= len(touched) + 10 < 10 + 256 + 2**21 // (cache.num_bytes // 400)

    while cache.prepare(399):
        pass
    assert cache.kv[399].eq(0).all()
    assert cache.kv[:10].eq(1).all()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def scores(
    model: Path, kv_cache_dtype: str, texts: list[list[int]], length: int
) -> tuple[list[list[int]], list[TopLogprobs]]:
    """Each text continued to a length, and what the model says of the tokens given."""
    launch = LaunchConfig(
        model=str(model),
        device="cpu",
        dtype="float32",
        kv_cache_dtype=kv_cache_dtype,
        engine=EngineConfig(max_num_sequences=4, share_completion_blocks=True),
    )
    engine, ready = load_engine(launch)
    assert ready.kv_cache_dtype == kv_cache_dtype
    found: list[TopLogprobs] = []
    continued = []
    for seed, text in enumerate(texts):
        params = SamplingParams(
            max_tokens=max(1, length - len(text)), ignore_eos=True, prompt_logprobs=1, seed=seed,
            temperature=0.8,
        )  # fmt: skip
        drawn = []
        for _, output in engine.generate(text, params):
            found += output.prompt_logprobs or []
            drawn.append(output.token_id)
        continued.append([*text, *(token for token in drawn if token is not None)])
    return continued, found


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "int8"])
def test_a_coarser_cache_predicts_the_storyteller_s_text_as_well(kv_cache_dtype: str) -> None:
    texts, _ = scores(STORYTELLER, "float32", [[0, 5], [0, 900]], 400)
    _, exact = scores(STORYTELLER, "float32", texts, 400)
    _, rounded = scores(STORYTELLER, kv_cache_dtype, texts, 400)

    assert len(exact) == len(rounded) == 2 * 399
    loss, found = (-sum(one.logprob for one in some) / len(some) for some in (exact, rounded))
    assert found != loss
    assert math.exp(abs(found - loss)) < 1.005  # perplexity within half a percent
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, rounded, strict=True))
    assert agree > 0.95 * len(exact)


def test_eight_bits_bear_loud_channels(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "loud", model=gpt_with_outliers(tiny_config(n_ctx=64)))
    texts, _ = scores(model, "float32", [[1, 5], [7, 9], [2, 200]], 60)

    _, exact = scores(model, "float32", texts, 60)
    _, rounded = scores(model, "int8", texts, 60)

    # Logits of this model spread over some units, so a hundredth is small.
    errors = [abs(a.logprob - b.logprob) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < sum(errors) / len(errors) < 0.02
    agree = sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, rounded, strict=True))
    assert agree > 0.95 * len(exact)
