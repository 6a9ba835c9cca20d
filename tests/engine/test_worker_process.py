"""The worker's process, started before anyone needs it."""

import asyncio
import os
from pathlib import Path

from engine.client import EngineClient
from engine.config import EngineConfig, LaunchConfig
from engine.sampling_params import SamplingParams
from engine.worker_process import WorkerProcess
from tests.engine.streams import ids_of
from tests.tiny_models import tiny_checkpoint

ENGINE = EngineConfig(num_blocks=100, max_num_sequences=4, max_num_scheduled_tokens=32)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_the_first_worker_is_the_one_that_was_started_and_the_next_is_another(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path / "model")
    launch = LaunchConfig(
        model=str(tmp_path / "model"), device="cpu", dtype="float32", num_threads=1, engine=ENGINE
    )

    async def use(worker: WorkerProcess) -> list[int]:
        client = EngineClient(launch, first_worker=worker)
        pids = [(await client.start()).pid]
        worker.kill()
        # Held until there is another: the stream outlives its engine.
        stream = client.submit("a", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(await ids_of(stream)) == 3
        assert client.facts is not None
        pids.append(client.facts.pid)
        await client.stop()
        return pids

    with WorkerProcess(launch.model, max_num_sequences=4) as worker:
        first, second = asyncio.run(asyncio.wait_for(use(worker), 120))

    assert first == worker.pid != second
    assert not exists(first)
    assert not exists(second)


def test_a_worker_that_nobody_needed_does_not_stay() -> None:
    descriptors = os.listdir("/proc/self/fd")

    with WorkerProcess("nowhere", max_num_sequences=4) as worker:
        assert exists(worker.pid)

    assert not exists(worker.pid)
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_signal_of_the_terminal_does_not_reach_a_worker() -> None:
    # Ctrl-C goes to the group in the foreground, ours; while it imports, a worker would print it.
    with WorkerProcess("nowhere", max_num_sequences=4) as worker:
        assert os.getpgid(worker.pid) != os.getpgrp()


def test_a_worker_ends_by_itself_where_the_other_side_hangs_up() -> None:
    async def hang_up(worker: WorkerProcess) -> str:
        worker.take_connection().close()
        return await worker.end(grace_seconds=60)

    with WorkerProcess("nowhere", max_num_sequences=4) as worker:
        assert asyncio.run(hang_up(worker)) == "status 0"
