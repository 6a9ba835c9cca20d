"""Times vLLM's own batching on a checkpoint, greedy; prints tokens/s by number of sequences.

`python -m benchmarks.gpu.vllm_offline MODEL --counts 1 64 256`; a process of its own, because vLLM
keeps the device's memory until it ends.
"""

import argparse
import importlib
import json
import random
import time


def main() -> None:
    """Run each number of prompts twice and time the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--counts", type=int, nargs="+", required=True)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    arguments = parser.parse_args()
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(
        arguments.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_num_seqs=max(arguments.counts),
        gpu_memory_utilization=0.5,
        disable_log_stats=True,
    )
    params = vllm.SamplingParams(
        temperature=0,
        min_tokens=arguments.num_tokens,
        max_tokens=arguments.num_tokens,
        ignore_eos=True,
        detokenize=False,
    )
    numbers = random.Random(1)
    rates: dict[int, float] = {}
    for count in arguments.counts:
        for _ in range(2):
            prompts = [
                {"prompt_token_ids": numbers.choices(range(256), k=arguments.prompt_tokens)}
                for _ in range(count)
            ]
            start = time.perf_counter()
            outputs = engine.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        rates[count] = made / seconds
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
