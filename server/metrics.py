"""Every metric there is, declared in one place; the names follow vLLM's behind the prefix.

Two accounts close. Requests received = finished, summed over outcomes, + in flight. Blocks of
the KV cache, free + used + cached = all of them. Knows no requests and no HTTP.
"""

import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.client import EngineState
from engine.messages import StepOutput, StepStats

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for

Outcome = Literal["stop", "length", "abort", "error", "rejected", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error", "rejected", "timeout")

# vLLM's boundaries, and below them what a small model needs; 2.0 s, which vLLM lacks.
_TTFT_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_SECONDS = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0,
    10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_NUM_CHOICES = (1, 2, 5, 10, 20, 50, 100)


def _token_boundaries(n_ctx: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, ... up to the context, as vLLM has them."""
    steps = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    return [*(float(step) for step in steps if step < n_ctx), float(n_ctx)]


class InterTokenLatency(Collector):
    """A histogram that takes a value in well under a microsecond: it is asked once a token."""

    def __init__(self, name: str, documentation: str, boundaries: Iterable[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._boundaries = sorted(boundaries)
        self._counts = [0] * (len(self._boundaries) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, count: int = 1) -> None:
        """Count `count` tokens that came `seconds` apart."""
        self._counts[bisect.bisect_left(self._boundaries, seconds)] += count
        self._sum += seconds * count

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        buckets, total = [], 0
        for boundary, count in zip([*self._boundaries, "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((str(boundary), total))
        yield HistogramMetricFamily(
            self._name, self._documentation, buckets=buckets, sum_value=self._sum
        )


class _EngineState(Collector):
    """What is read off the engine when somebody asks, rather than written at every step."""

    def __init__(self, metrics: "Metrics") -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        stats = self._metrics.stats
        num_blocks = stats.num_free_blocks + stats.num_used_blocks + stats.num_cached_blocks
        state = GaugeMetricFamily(
            "kvik_kv_cache_blocks",
            "Blocks of the KV cache; free, used and cached are all there are.",
            labels=["state"],
        )
        state.add_metric(["free"], stats.num_free_blocks)
        state.add_metric(["used"], stats.num_used_blocks)
        state.add_metric(["cached"], stats.num_cached_blocks)
        yield state
        for name, documentation, value in (
            ("kvik_num_requests_running", "Generations that run.", stats.num_running),
            ("kvik_num_requests_waiting", "Generations that wait to run.", stats.num_waiting),
            (
                "kvik_kv_cache_usage_perc",
                "Share of the KV cache's blocks that running generations use, from 0 to 1.",
                stats.num_used_blocks / num_blocks if num_blocks else 0.0,
            ),
            (
                "kvik_engine_last_step_age_seconds",
                "Time since the engine's last step, while it has work; 0 while it has none.",
                self._metrics.seconds_without_sign(),
            ),
        ):
            yield GaugeMetricFamily(name, documentation, value=value)
        yield CounterMetricFamily(
            "kvik_overrun_tokens",
            "Tokens generated and thrown away: behind a stop string, or for a client that left.",
            value=self._metrics.num_overrun_tokens + self._metrics.num_dropped_tokens(),
        )
        yield CounterMetricFamily(
            "kvik_engine_restarts",
            "Times the engine process was started again since the server's start.",
            value=self._metrics.num_restarts(),
        )
        family = GaugeMetricFamily(
            "kvik_engine_state", "1 for the state the engine is in.", labels=["state"]
        )
        for engine_state in EngineState:
            family.add_metric([engine_state], float(engine_state == self._metrics.state()))
        yield family


_NO_STATS = StepStats(0, 0, 0, 0, 0, 0, 0, 0, 0)


class Metrics:
    """The server's numbers, in a registry of their own."""

    def __init__(self, *, n_ctx: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self.stats = _NO_STATS  # of the last step; totals in it count from a worker's start
        self.clock = clock
        # Asked when scraped; the application puts the engine's own in their place.
        self.seconds_without_sign: Callable[[], float] = lambda: 0.0
        self.num_restarts: Callable[[], int] = lambda: 0
        self.num_dropped_tokens: Callable[[], int] = lambda: 0
        self.num_overrun_tokens = 0  # that came to us, behind the end of their text
        self.state: Callable[[], str] = lambda: EngineState.LOADING
        tokens = _token_boundaries(n_ctx)

        self.received = Counter(
            "kvik_requests_received",
            "Completion requests that came, whatever became of them.",
            registry=registry,
        )
        self.finished = Counter(
            "kvik_requests_finished",
            "Completion requests that ended, by outcome.",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self.finished.labels(outcome)
        self.in_flight = Gauge(
            "kvik_requests_in_flight",
            "Completion requests received and not finished.",
            registry=registry,
        )
        self.http = Counter(
            "kvik_http_requests",
            "HTTP replies, by route, method and status.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.ttft = Histogram(
            "kvik_time_to_first_token_seconds",
            "From a request's arrival to its first token, for every prompt.",
            buckets=_TTFT_SECONDS,
            registry=registry,
        )
        self.inter_token_latency = InterTokenLatency(
            "kvik_inter_token_latency_seconds",
            "Between two tokens of one choice.",
            _ITL_SECONDS,
        )
        registry.register(self.inter_token_latency)
        self.e2e = _request_seconds(
            registry, "kvik_e2e_request_latency_seconds", "From a request's arrival to its end."
        )
        self.queue_time = _request_seconds(
            registry,
            "kvik_request_queue_time_seconds",
            "From a request's arrival to its first step.",
        )
        self.prefill_time = _request_seconds(
            registry,
            "kvik_request_prefill_time_seconds",
            "From a request's first step to its first token.",
        )
        self.decode_time = _request_seconds(
            registry,
            "kvik_request_decode_time_seconds",
            "From a request's first token to its last.",
        )
        self.request_prompt_tokens = Histogram(
            "kvik_request_prompt_tokens",
            "Tokens of a request's prompts.",
            buckets=tokens,
            registry=registry,
        )
        self.request_generation_tokens = Histogram(
            "kvik_request_generation_tokens",
            "Tokens generated for a request, all its choices together.",
            buckets=tokens,
            registry=registry,
        )
        self.request_params_max_tokens = Histogram(
            "kvik_request_params_max_tokens",
            "max_tokens, as requests ask for it.",
            buckets=tokens,
            registry=registry,
        )
        self.request_params_n = Histogram(
            "kvik_request_params_n",
            "n, as requests ask for it.",
            buckets=_NUM_CHOICES,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "kvik_prompt_tokens",
            "Prompt tokens, by where their keys and values came from.",
            ["source"],
            registry=registry,
        )
        for source in ("computed", "cached"):
            self.prompt_tokens.labels(source)
        self.generation_tokens = Counter(
            "kvik_generation_tokens",
            "Completion tokens that count in usage.",
            registry=registry,
        )
        self.preemptions = Counter(
            "kvik_num_preemptions",
            "Generations put back to wait because the KV cache was full.",
            registry=registry,
        )
        self.prefix_cache_queries = Counter(
            "kvik_prefix_cache_queries",
            "Prompt tokens that were looked up in the prefix cache.",
            registry=registry,
        )
        self.prefix_cache_hits = Counter(
            "kvik_prefix_cache_hits",
            "Prompt tokens that were found there.",
            registry=registry,
        )
        self.iteration_tokens = Histogram(
            "kvik_iteration_tokens",
            "Tokens that a step of the engine computed.",
            buckets=_STEP_TOKENS,
            registry=registry,
        )
        self.iteration_sequences = Histogram(
            "kvik_iteration_sequences",
            "Generations that ran after a step of the engine.",
            buckets=_STEP_TOKENS,
            registry=registry,
        )
        self.admission_rejections = Counter(
            "kvik_admission_rejections",
            "Requests turned away because too much was accepted already.",
            ["bound"],
            registry=registry,
        )
        for bound in ("requests", "prompt_tokens"):
            self.admission_rejections.labels(bound)
        self.stalled_readers = Counter(
            "kvik_stalled_readers",
            "Connections ended because their client took nothing for too long.",
            registry=registry,
        )
        self.info = Gauge(
            "kvik_build_info",
            "1; what runs, in its labels.",
            ["version", "model_name", "weights", "fingerprint", "device", "dtype"],
            registry=registry,
        )
        registry.register(_EngineState(self))

    def record_step(self, output: StepOutput) -> None:
        """Take in what the engine says after a step."""
        stats, last = output.stats, self.stats
        if stats.num_scheduled_tokens:  # or an abort changed the counts, and it was no step
            self.iteration_tokens.observe(stats.num_scheduled_tokens)
            self.iteration_sequences.observe(stats.num_running)
        for counter, now, before in (
            (self.preemptions, stats.num_preemptions, last.num_preemptions),
            (
                self.prefix_cache_queries,
                stats.num_prefix_query_tokens,
                last.num_prefix_query_tokens,
            ),
            (self.prefix_cache_hits, stats.num_prefix_hit_tokens, last.num_prefix_hit_tokens),
        ):
            if now != before:  # a new worker counts from zero
                counter.inc(now - before if now > before else now)
        self.stats = stats

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


def _request_seconds(registry: CollectorRegistry, name: str, documentation: str) -> Histogram:
    return Histogram(name, documentation, buckets=_REQUEST_SECONDS, registry=registry)
