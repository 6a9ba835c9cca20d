"""The worker's loop around an engine in this process: what goes through its door, step by step."""

import socket
import threading
from io import BufferedReader

import pytest
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.flight_recorder import FlightRecorder
from engine.messages import (
    LENGTH_BYTES,
    Choice,
    StepOutput,
    Submit,
    TokenOutput,
    ToWorker,
    pack,
    unpack_from_worker,
)
from engine.sampling_params import SamplingParams
from engine.worker import Inbox, serve
from tests.engine.engines import Request, make_engine, run


class SmallAttention(PagedAttention):
    """Has the memory for three rows."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(q) > 3:
            raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return super().__call__(layer, q, k, v)


def read_step(stream: BufferedReader) -> StepOutput:
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    frame = unpack_from_worker(stream.read(length))
    assert isinstance(frame, StepOutput)
    return frame


def test_out_of_memory_ends_one_sequence_and_not_the_worker() -> None:
    params = SamplingParams(max_tokens=20, temperature=2.0, seed=3, ignore_eos=True)
    expected = [
        run(make_engine(attention=PagedAttention), [Request([i], params)])[0][0] for i in range(5)
    ]
    recorder = FlightRecorder.create(max_num_sequences=16)
    ours, theirs = socket.socketpair()
    engine = make_engine(attention=SmallAttention)

    def work() -> None:
        with pytest.raises(EOFError), theirs:
            serve(engine, Inbox(theirs), theirs, recorder)

    worker = threading.Thread(target=work)
    ours.settimeout(60)
    with ours, ours.makefile("rb") as stream:
        for seq_id in range(5):
            choices = [Choice(seq_id=seq_id, index=0)]
            frame = Submit(
                request_id=f"r{seq_id}", prompt_ids=[seq_id], choices=choices, params=params
            )
            ours.sendall(pack(frame))
        worker.start()
        outputs: list[TokenOutput] = []
        while sum(output.finish_reason is not None for output in outputs) < 5:
            outputs += read_step(stream).outputs
    worker.join()

    failed = {output.seq_id for output in outputs if output.finish_reason == "error"}
    assert failed == {3, 4}
    assert all(output.error_code == "out_of_memory" for output in outputs if output.error)
    for seq_id in range(3):
        mine = [output.token_id for output in outputs if output.seq_id == seq_id]
        assert mine == expected[seq_id].token_ids
    assert recorder.seq_ids_in_step() == []  # nobody is suspected of a death
    recorder.close()


def test_an_idle_worker_gets_memory_ahead_and_then_waits() -> None:
    ours, theirs = socket.socketpair()
    engine = make_engine()
    inbox = Inbox(theirs)
    has_waited = threading.Event()
    take = inbox.take

    def watched(*, wait: bool) -> list[ToWorker]:
        if wait:
            has_waited.set()
        return take(wait=wait)

    inbox.take = watched  # type: ignore[method-assign]

    def work() -> None:
        recorder = FlightRecorder.create(max_num_sequences=16)
        with pytest.raises(EOFError), theirs:
            serve(engine, inbox, theirs, recorder)
        recorder.close()

    worker = threading.Thread(target=work)
    worker.start()
    assert has_waited.wait(60)
    ours.close()
    worker.join()

    assert not engine.prepare_memory()
