"""The client with a real worker: tokens across the door, deaths, suspects, hangs and ends."""

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from engine.client import EngineClient, EngineState
from engine.config import EngineConfig, LaunchConfig
from engine.errors import EngineDied, EngineStopped, PromptTooLong, StartRefused, TokenOutOfRange
from engine.sampling_params import SamplingParams
from tests.engine.engines import Request, make_engine, random_prompt, run
from tests.engine.streams import first_of, ids_of, outputs_of
from tests.tiny_models import tiny_checkpoint, tiny_config, tiny_gpt

CONFIG = tiny_config(n_layer=3, n_embd=64, n_ctx=512)
ENGINE = EngineConfig(
    block_size=16, max_num_sequences=16, max_num_scheduled_tokens=64, share_completion_blocks=True
)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> LaunchConfig:
    directory = tmp_path_factory.mktemp("client") / "model"
    tiny_checkpoint(directory, model=tiny_gpt(CONFIG))
    return LaunchConfig(
        model=str(directory), device="cpu", dtype="float32", num_threads=1, engine=ENGINE
    )


def in_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in the server's kind of loop, and end it rather than wait for ever."""

    def run_test(launch: LaunchConfig) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.wait_for(test(launch), timeout=120))

    run_test.__name__ = test.__name__
    return run_test


@asynccontextmanager
async def started(launch: LaunchConfig, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(launch, **options)
    try:
        await client.start()
        yield client
    finally:
        await client.stop()


def params(seed: int, max_tokens: int = 200) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True)


def requests(count: int, max_tokens: int = 200) -> list[Request]:
    return [
        Request(random_prompt(5 + 11 * seed, seed=seed), params(seed, max_tokens))
        for seed in range(count)
    ]


def expected_tokens(wanted: list[Request]) -> list[list[int]]:
    """What an engine in this process makes of the requests."""
    engine = make_engine(tiny_gpt(CONFIG), vocab_size=270, num_blocks=1 + 16 * 32, block_size=16)
    return [result[0].token_ids for result in run(engine, wanted)]


def submit_all(client: EngineClient, wanted: list[Request]) -> list[asyncio.Task[list[int]]]:
    return [
        asyncio.ensure_future(
            ids_of(client.submit(f"request-{index}", request.prompt_ids, request.params))
        )
        for index, request in enumerate(wanted)
    ]


def kill_worker(client: EngineClient, number: int = signal.SIGKILL) -> None:
    assert client.worker_pid is not None
    os.kill(client.worker_pid, number)


@in_time
async def test_tokens_cross_the_door_unchanged(launch: LaunchConfig) -> None:
    wanted = requests(6, 40)
    async with started(launch) as client:
        found = await asyncio.gather(*submit_all(client, wanted))

        assert found == expected_tokens(wanted)
        assert client.num_live_requests == 0
        assert client.stats is not None
        assert client.stats.num_used_blocks == 0


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """A process that has every descriptor it may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 1 - num_open)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for filler in fillers:
            os.close(filler)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@in_time
async def test_a_shortage_of_the_system_delays_the_next_engine_and_no_more(
    launch: LaunchConfig,
) -> None:
    (wanted,) = requests(1)
    async with started(launch, max_fruitless_restarts=1) as client:
        (task,) = submit_all(client, [wanted])
        while client.stats is None:
            await asyncio.sleep(0.01)
        with no_descriptors_left():
            kill_worker(client)
            while "cannot be started: Too many open files" not in client.reason:
                await asyncio.sleep(0.05)
            num_open = len(os.listdir("/proc/self/fd"))
            await asyncio.sleep(2.5)  # a few attempts

            assert client.state == EngineState.RESTARTING
            assert len(os.listdir("/proc/self/fd")) == num_open  # which leave nothing open

        assert await task == expected_tokens([wanted])[0]


@in_time
async def test_what_never_passes_is_no_shortage(launch: LaunchConfig) -> None:
    (wanted,) = requests(1)
    python = sys.executable
    async with started(launch) as client:
        (task,) = submit_all(client, [wanted])
        while client.stats is None:
            await asyncio.sleep(0.01)
        sys.executable = "/nowhere/python"  # as an upgrade may leave it
        try:
            kill_worker(client)
            with pytest.raises(EngineDied, match="cannot be started: No such file or directory"):
                await task
        finally:
            sys.executable = python

        assert client.state == EngineState.DOWN


@in_time
async def test_a_mistake_in_looking_after_the_engine_is_told_and_lets_nobody_wait(
    launch: LaunchConfig,
) -> None:
    client = EngineClient(launch, worker_module="tests.engine.babbling_worker")
    stream = client.submit("a", [1], params(1))
    with pytest.raises(
        StartRefused, match="nobody looks after the engine any more: ValidationError"
    ):
        await client.start()
    with pytest.raises(EngineDied):
        await ids_of(stream)
    await client.stop()


def test_the_directory_one_stands_in_does_not_get_in_the_way(
    launch: LaunchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "http", "engine"):  # nanoGPT has a model.py, for one
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)

    @in_time
    async def answers(launch: LaunchConfig) -> None:
        async with started(launch) as client:
            wanted = requests(1, 3)
            found = await asyncio.gather(*submit_all(client, wanted))
            assert found == expected_tokens(wanted)

    answers(launch)


@in_time
async def test_a_request_may_have_more_choices_than_run_at_once(launch: LaunchConfig) -> None:
    assert ENGINE.max_num_sequences < 40
    async with started(launch) as client:
        stream = client.submit("many", [1, 2], params(1, 5), num_choices=40)
        counts = [0] * 40
        async for choice, _ in outputs_of(stream):
            counts[choice] += 1

        assert counts == [5] * 40
        assert client.num_restarts == 0


@in_time
async def test_killed_at_random_moments_every_request_continues_as_it_would_have(
    launch: LaunchConfig,
) -> None:
    wanted = requests(8, 400)
    moments = random.Random(5)
    async with started(launch) as client:
        steps: asyncio.Queue[None] = asyncio.Queue()
        client.on_step = lambda output: steps.put_nowait(None)
        tasks = submit_all(client, wanted)
        for _ in range(4):
            # A count of steps, not of seconds: however fast the machine, 4 x 60 of them end no
            # request. And at least one: a death before any step would be blamed on a request.
            for _ in range(moments.randint(1, 60)):
                await steps.get()
            await asyncio.sleep(moments.uniform(0, 0.002))  # anywhere within the next
            kill_worker(client)
            while client.state == EngineState.READY:
                await asyncio.sleep(0.001)
            while not steps.empty():
                steps.get_nowait()
        found = await asyncio.gather(*tasks)

        assert client.num_restarts == 4
        assert found == expected_tokens(wanted)


@in_time
async def test_requests_may_come_and_go_while_a_worker_is_replaced(launch: LaunchConfig) -> None:
    async with started(launch) as client:
        for restarts in (1, 2):
            kill_worker(client)
            while client.num_restarts < restarts or client.state != EngineState.READY:
                client.submit("passes by", [1, 2], params(seed=1)).close()
                await asyncio.sleep(0)

            assert client.num_restarts == restarts
        wanted = requests(1)
        assert await submit_all(client, wanted)[0] == expected_tokens(wanted)[0]


@in_time
async def test_a_death_is_seen_within_half_a_second(launch: LaunchConfig) -> None:
    async with started(launch) as client:
        kill_worker(client)
        start = time.monotonic()
        while client.state == EngineState.READY:
            await asyncio.sleep(0.001)

        assert time.monotonic() - start < 0.5
        while not client.reason:
            await asyncio.sleep(0.001)
        assert "SIGKILL" in client.reason


def test_the_log_tells_of_a_death_and_that_the_engine_is_back(
    launch: LaunchConfig, caplog: pytest.LogCaptureFixture
) -> None:
    async def die_once() -> None:
        async with started(launch) as client:
            kill_worker(client)
            while not client.num_restarts or client.state != EngineState.READY:
                await asyncio.sleep(0.01)

    with caplog.at_level("INFO", logger="engine.client"):
        asyncio.run(asyncio.wait_for(die_once(), timeout=120))

    assert caplog.messages == [
        "engine died reason=the engine process ended with signal SIGKILL live_requests=0 "
        "suspects=0",
        "engine ready again restarts=1 live_requests=0",
    ]


@in_time
async def test_only_the_request_that_kills_the_engine_alone_is_failed(
    launch: LaunchConfig,
) -> None:
    wanted = requests(4, 300)
    async with started(launch) as client:
        tasks = submit_all(client, wanted)
        await asyncio.sleep(0.05)
        # Without a token, not even bos: the server never sends that, and the engine dies of it.
        poison = client.submit("poison", [], params(0))
        with pytest.raises(EngineDied, match="ended with"):
            await ids_of(poison)
        found = await asyncio.gather(*tasks)

        assert found == expected_tokens(wanted)
        assert client.num_restarts == 3  # with the others, and twice alone


@in_time
async def test_a_hung_worker_is_replaced(launch: LaunchConfig) -> None:
    wanted = requests(3, 400)
    async with started(launch, hang_seconds=3.0) as client:
        steps = asyncio.Semaphore(0)
        client.on_step = lambda output: steps.release()
        tasks = submit_all(client, wanted)
        for _ in range(20):
            await steps.acquire()
        kill_worker(client, signal.SIGSTOP)
        found = await asyncio.gather(*tasks)

        assert client.num_restarts == 1
        assert found == expected_tokens(wanted)


@in_time
async def test_an_idle_worker_is_not_taken_for_hung(launch: LaunchConfig) -> None:
    async with started(launch, hang_seconds=2.0) as client:
        await asyncio.sleep(3.0)
        stream = client.submit("late", [1, 2, 3], params(0, 5))

        assert len(await ids_of(stream)) == 5
        assert client.num_restarts == 0


@in_time
async def test_a_closed_stream_frees_its_blocks(launch: LaunchConfig) -> None:
    async with started(launch) as client:
        stream = client.submit("left", [1, 2, 3], params(0, 500))
        other = client.submit("stays", [4, 5, 6], params(1, 60))
        await first_of(stream)
        stream.close()
        stream.close()
        await ids_of(other)

        assert client.num_live_requests == 0
        assert client.stats is not None
        assert client.stats.num_used_blocks == 0
        assert client.stats.num_running == 0


@in_time
async def test_one_choice_may_end_and_the_others_go_on(launch: LaunchConfig) -> None:
    async with started(launch) as client:
        stream = client.submit("three", [1, 2, 3], params(0, 400), num_choices=3)
        counts = [0, 0, 0]
        async for choice, _ in outputs_of(stream):
            counts[choice] += 1
            if choice == 1 and counts[1] == 5:
                client.abort_choice("three", 1)

        assert counts[0] == counts[2] == 400
        # What had come by then is still told, and a fast engine may be well ahead of us.
        assert 5 <= counts[1] < 400


@in_time
async def test_requests_that_do_not_fit_the_model_are_refused_at_once(
    launch: LaunchConfig,
) -> None:
    async with started(launch) as client:
        with pytest.raises(PromptTooLong, match="513"):
            client.submit("long", [1] * 513, params(0))
        with pytest.raises(TokenOutOfRange):
            client.submit("odd", [100_000], params(0))

        assert client.num_live_requests == 0


@in_time
async def test_requests_before_the_engine_is_ready_are_held_or_refused(
    launch: LaunchConfig,
) -> None:
    client = EngineClient(launch)
    starting = asyncio.create_task(client.start())
    held = client.submit("held", [1, 2, 3], params(0, 5))
    refused = client.submit("refused", [100_000], params(0, 5))

    with pytest.raises(TokenOutOfRange):
        await ids_of(refused)
    assert len(await ids_of(held)) == 5
    await starting
    await client.stop()


@in_time
async def test_stopping_ends_every_stream_and_the_worker(launch: LaunchConfig) -> None:
    client = EngineClient(launch)
    await client.start()
    pid = client.worker_pid
    stream = client.submit("running", [1, 2, 3], params(0, 500))
    await first_of(stream)
    await client.stop()

    with pytest.raises(EngineStopped):
        await ids_of(stream)
    with pytest.raises(EngineStopped):
        client.submit("late", [1], params(0))
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@in_time
async def test_a_checkpoint_that_cannot_be_loaded_is_refused_with_its_reason(
    launch: LaunchConfig,
) -> None:
    client = EngineClient(LaunchConfig(model=str(Path(launch.model) / "nowhere")))

    with pytest.raises(StartRefused, match="is not a directory"):
        await client.start()
    assert client.state == EngineState.DOWN


@in_time
async def test_stopping_at_any_moment_of_the_start_leaves_no_worker(launch: LaunchConfig) -> None:
    for moments in range(2, 7):  # a moment for `start`, and one for its supervisor
        client = EngineClient(launch)
        starting = asyncio.create_task(client.start())
        for _ in range(moments):
            await asyncio.sleep(0)
        worker = client.worker_pid

        starting.cancel()
        await client.stop()

        assert worker is not None
        assert not _is_running(worker)
        assert client.worker_pid is None


@in_time
async def test_an_engine_that_keeps_dying_is_not_started_for_ever(launch: LaunchConfig) -> None:
    client = EngineClient(launch, max_fruitless_restarts=1)
    starting = asyncio.create_task(client.start())
    stream = client.submit("waits", [1, 2, 3], params(0, 5))
    deaths = 0
    while client.state != EngineState.DOWN:
        await asyncio.sleep(0.02)
        if client.worker_pid is not None:
            kill_worker(client)
            deaths += 1
            while client.worker_pid is not None:
                await asyncio.sleep(0.01)

    assert deaths == 2
    with pytest.raises(StartRefused, match="2 times in a row"):
        await starting
    with pytest.raises(EngineDied, match="2 times in a row"):
        await ids_of(stream)
    with pytest.raises(EngineDied):
        client.submit("late", [1], params(0))
    await client.stop()


def test_the_worker_goes_with_its_parent(launch: LaunchConfig) -> None:
    program = (
        "import asyncio, sys\n"
        "from engine.client import EngineClient\n"
        "from engine.config import LaunchConfig\n"
        "async def main():\n"
        "    client = EngineClient(LaunchConfig(model=sys.argv[1], num_threads=1))\n"
        "    await client.start()\n"
        "    print(client.worker_pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, launch.model], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(worker):
        time.sleep(0.02)

    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie waits for nobody but init
