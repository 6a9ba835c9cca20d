"""What a decode step costs the host, beside a device that only pretends: any machine can tell.

`python -m benchmarks.host` runs the scheduler, the persistent batch and the frame to the server for
real, over a device that takes a settable time a round and draws any token. A host that is a step
behind costs nothing as long as it takes less than the device; where a step has several rounds, it
looks once for all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.config import EngineConfig
from engine.cuda_graph import DecodeStep, Sampling
from engine.engine import Engine
from engine.messages import Choice, Submit, pack
from engine.sampling_params import SamplingParams
from model.config import GPTConfig
from model.gpt import GPT

# As GPT-2's in everything the host sees, and next to nothing to compute for the prompts.
_CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=1024, vocab_size=50257)


class SimulatedStep(DecodeStep):
    """A device that runs its rounds one after the other, each for `latency` seconds.

    To start one takes the host `launch` seconds.
    """

    def __init__(self, *arguments: Any, latency: float, launch: float, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._latency, self._launch = latency, launch
        self._free_at = 0.0
        self.waited = 0.0  # seconds that the host spent in `read`

    def run(self, num_rows: int, sampling: Sampling) -> Tensor:
        """Begin a round when the last one has ended."""
        launched_at = _spin_until(time.perf_counter() + self._launch)
        self._free_at = max(self._free_at, launched_at) + self._latency
        return torch.full((num_rows,), 11)

    def read(self, token_ids: Tensor) -> Callable[[], list[list[int]]]:
        """Let the host wait for the round begun last."""
        ready_at = self._free_at

        def wait() -> list[list[int]]:
            start = time.perf_counter()
            self.waited += _spin_until(ready_at) - start
            values: list[list[int]] = token_ids.tolist()
            return values

        return wait


def _spin_until(moment: float) -> float:
    """Wait without sleeping, which would overshoot; returns when that was."""
    while (now := time.perf_counter()) < moment:
        pass
    return now


def measure_host(
    *,
    num_sequences: int,
    latency: float,
    launch: float,
    is_ahead: bool,
    max_num_rounds: int = 1,
    num_steps: int = 100,
) -> tuple[float, float]:
    """Medians over the steps that decode: seconds a round, and seconds the host worked for it."""
    steps: list[SimulatedStep] = []

    def make(*arguments: Any, **keywords: Any) -> SimulatedStep:
        steps.append(SimulatedStep(*arguments, latency=latency, launch=launch, **keywords))
        return steps[-1]

    config = EngineConfig(
        max_num_sequences=num_sequences,
        max_num_scheduled_tokens=max(512, num_sequences),
        max_num_rounds=max_num_rounds,
        # Not what it is for, but where these are shared no step is started ahead.
        share_completion_blocks=not is_ahead,
    )
    engine = Engine(
        GPT(_CONFIG).eval(),
        config,
        num_blocks=1 + num_sequences * (_CONFIG.n_ctx // config.block_size),
        vocab_size=_CONFIG.vocab_size,
        eos_token_ids=(50256,),
        decode_step=make,
    )
    num_tokens = max_num_rounds * num_steps + 40
    params = SamplingParams(max_tokens=num_tokens, temperature=0)
    for index in range(num_sequences):
        engine.add(
            Submit(
                request_id=f"host-{index}",
                prompt_ids=[index, 7],
                choices=[Choice(seq_id=index, index=0)],
                params=params,
            )
        )
    (step,) = steps
    walls: list[float] = []
    works: list[float] = []
    while len(walls) < num_steps:
        waited, start = step.waited, time.perf_counter()
        output = engine.step()
        assert output is not None
        pack(output)
        wall = time.perf_counter() - start
        num_rounds, rest = divmod(len(output.outputs), num_sequences)
        if num_rounds and not rest and output.stats.num_waiting == 0:
            walls.append(wall / num_rounds)
            works.append((wall - (step.waited - waited)) / num_rounds)
    return statistics.median(walls), statistics.median(works)


def main() -> None:
    """Measure the host at several device latencies, a step ahead and not, looking less often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 1.2, 3.0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1], help="of a step, at most")
    parser.add_argument("--launch-us", type=float, default=0.0, help="to start one round")
    arguments = parser.parse_args()
    table = Table()
    headings = (
        "sequences",
        "device",
        "rounds",
        "round, host behind",
        "round, host between",
        "host",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for num_sequences in arguments.sequences:
        for latency in arguments.latency_ms:
            settings = {
                "num_sequences": num_sequences,
                "latency": latency / 1e3,
                "launch": arguments.launch_us / 1e6,
            }
            between, _ = measure_host(**settings, is_ahead=False)
            for num_rounds in arguments.rounds:
                ahead, work = measure_host(**settings, is_ahead=True, max_num_rounds=num_rounds)
                table.add_row(
                    str(num_sequences),
                    f"{latency:.2f} ms",
                    str(num_rounds),
                    f"{ahead * 1e3:.3f} ms",
                    f"{between * 1e3:.3f} ms",
                    f"{work * 1e3:.3f} ms",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
