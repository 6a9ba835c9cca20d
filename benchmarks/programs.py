"""The peers' sides of a comparison: each a few lines, for an environment of that peer's own.

`python -m benchmarks.programs NAME ...` needs nothing but the peer's library, and prints tokens/s
in lines that `benchmarks.peers` reads. `gpt2` writes the model that all of them run, by Kvik.
"""

import argparse
import contextlib
import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COUNTS = (1, 8, 32)
_NEW_TOKENS = 64
_PROMPT_WORDS = 24


def random_gpt2(
    directory: Path, vocabulary: Path, *, layers: int = 12, heads: int = 12, width: int = 768
) -> None:
    """Write a GPT-2 with random weights, 124M by default, and the tokenizer in `vocabulary`.

    Matrices are large for random ones: logits lie apart, and no tie decides what greedy draws.
    """
    torch = importlib.import_module("torch")
    from model.config import GPTConfig
    from model.gpt import GPT
    from model.tokenizer import load_tokenizer
    from weights.checkpoint import save

    tokenizer = load_tokenizer(vocabulary)
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=layers, n_head=heads, n_embd=width, n_ctx=1024, vocab_size=tokenizer.vocab_size
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and not name.startswith(("wte", "wpe")):
                weight.mul_(2.5)
    save(model, directory, tokenizer=tokenizer)


def time_prompts(text: Path, run: Callable[[list[str]], int]) -> None:
    """Time 1, 8 and 32 prompts of a text, twice each; `run` says how many tokens it made."""
    words = text.read_text(encoding="utf-8").split()
    numbers = random.Random(3)
    for count in _COUNTS:
        for _ in range(2):  # the second counts
            starts = [numbers.randrange(len(words) - _PROMPT_WORDS) for _ in range(count)]
            prompts = [" ".join(words[start : start + _PROMPT_WORDS]) for start in starts]
            begin = time.perf_counter()
            made = run(prompts)
            seconds = time.perf_counter() - begin
        _tell(count, made / seconds)


def _tell(count: int, rate: float) -> None:
    print(f"batch {count}: {rate:.1f} tokens/s", flush=True)


def openvino(directory: str, precision: str, text: Path) -> None:
    """Run OpenVINO GenAI's continuous batching; `precision` is its hint, f32 or bf16."""
    genai = importlib.import_module("openvino_genai")
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 4, 64
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 2}
    pipeline = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", hints)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = _NEW_TOKENS
    config.ignore_eos, config.do_sample = True, False

    def run(prompts: list[str]) -> int:
        pipeline.generate(prompts, [config] * len(prompts))
        return len(prompts) * _NEW_TOKENS

    time_prompts(text, run)


def openvino_first(directory: str, precision: str) -> None:
    """Time the first token of a prompt of 512 tokens, as scenario `ttft` of `benchmarks.peers`."""
    genai, numpy = (importlib.import_module(name) for name in ("openvino_genai", "numpy"))
    tensor = importlib.import_module("openvino").Tensor
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 4, 1024  # the prompt in one step
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 2}
    pipeline = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", hints)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample = 1, False
    numbers = random.Random(3)
    times = []
    for _ in range(9):
        ids = numpy.array([numbers.choices(range(50_000), k=512)])
        begin = time.perf_counter()
        pipeline.generate([tensor(ids)], [config])
        times.append(time.perf_counter() - begin)
    print(f"512 tokens: {1e3 * statistics.median(times[1:]):.0f} ms", flush=True)


def ctranslate2(directory: str, precision: str, gpt2: str, text: Path) -> None:
    """Run CTranslate2's static batches, tokens by the tokenizer in `gpt2`."""
    library = importlib.import_module("ctranslate2")
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(gpt2)
    generator = library.Generator(
        directory, device="cpu", compute_type=precision, inter_threads=1, intra_threads=2
    )

    def run(prompts: list[str]) -> int:
        tokens = [tokenizer.convert_ids_to_tokens(tokenizer.encode(one)) for one in prompts]
        replies = generator.generate_batch(
            tokens, max_length=_NEW_TOKENS, min_length=_NEW_TOKENS, sampling_topk=1,
            include_prompt_in_result=False, end_token=[], max_batch_size=len(prompts),
        )  # fmt: skip
        return sum(len(reply.sequences_ids[0]) for reply in replies)

    time_prompts(text, run)


def nanogpt(checkout: str, precision: str) -> None:
    """Run `generate` of nanoGPT's model as its sample.py does: sampling, without a KV cache."""
    sys.path.insert(0, checkout)  # before Kvik's own `model`, which is not imported here
    torch, theirs = importlib.import_module("torch"), importlib.import_module("model")
    torch.manual_seed(0)
    model: Any = theirs.GPT(theirs.GPTConfig(vocab_size=50257, dropout=0.0, bias=True)).eval()
    rounding = contextlib.nullcontext()
    if precision == "bf16":
        rounding = torch.amp.autocast(device_type="cpu", dtype=torch.bfloat16)
    with torch.no_grad(), rounding:
        for count in _COUNTS:
            ids = torch.randint(0, 50000, (count, 32))
            for num_tokens in (4, _NEW_TOKENS):  # the second counts
                begin = time.perf_counter()
                model.generate(ids, num_tokens, temperature=0.8, top_k=200)
                seconds = time.perf_counter() - begin
            _tell(count, count * _NEW_TOKENS / seconds)


def llamacpp(gguf: str, port: int) -> None:
    """Serve a model by llama.cpp's own server, as xllamacpp packs it, until ended."""
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = gguf, 32 * 512, 32
    params.cont_batching, params.ui = True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.hostnames, params.port = ["127.0.0.1"], port
    server = library.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)
    arguments: dict[Callable[..., None], dict[str, type]] = {
        random_gpt2: {"directory": Path, "vocabulary": Path},
        openvino: {"directory": str, "precision": str, "text": Path},
        openvino_first: {"directory": str, "precision": str},
        ctranslate2: {"directory": str, "precision": str, "gpt2": str, "text": Path},
        nanogpt: {"checkout": str, "precision": str},
        llamacpp: {"gguf": str, "port": int},
    }
    for function, kinds in arguments.items():
        command = commands.add_parser(function.__name__.removeprefix("random_").replace("_", "-"))
        for name, kind in kinds.items():
            command.add_argument(name, type=kind)
        command.set_defaults(function=function)
    given = vars(parser.parse_args())
    del given["name"]
    given.pop("function")(**given)


if __name__ == "__main__":
    main()
