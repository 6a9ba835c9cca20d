"""The record of live requests, without a worker: what the next is given, and who is suspected."""

import asyncio

import pytest

from engine.errors import EngineDied, TokenOutOfRange
from engine.live_requests import LiveRequests
from engine.messages import Abort, Submit, TokenOutput
from engine.sampling_params import SamplingParams
from engine.token_stream import TokenStream
from tests.engine.streams import first_of


class Record:
    """Live requests, and the frames that a worker would have been sent."""

    def __init__(self, *names: str) -> None:
        """Have some requests already, and a worker that was given them."""
        self.frames: list[Submit | Abort] = []
        self.live = LiveRequests(self.frames.append)
        self.streams = {name: self.add(name) for name in names}
        self.live.give_out()

    def add(self, name: str, *, num_choices: int = 1) -> TokenStream:
        return self.live.add(
            name, [1, 2], SamplingParams(), num_choices=num_choices, salt=b"", priority=0
        )

    def seq_id(self, name: str) -> int:
        """What the worker calls a request's first choice."""
        submits = [frame for frame in self.frames if isinstance(frame, Submit)]
        return [frame for frame in submits if frame.request_id == name][-1].choices[0].seq_id

    def deliver(self, name: str, token_id: int, finish_reason: str | None = None) -> None:
        output = TokenOutput(self.seq_id(name), token_id, finish_reason)
        self.live.deliver([output])

    def die(self, *in_step: str) -> bool:
        """A worker dies in a step with some requests, and another takes its place."""
        self.live.hold()
        found = self.live.blame([self.seq_id(name) for name in in_step], reason="of its own")
        self.frames.clear()
        self.live.give_out()
        return found

    def aborts(self) -> list[Abort]:
        """What the worker was told to give up since it came."""
        return [frame for frame in self.frames if isinstance(frame, Abort)]

    def given(self) -> list[str]:
        """Who was given to the worker since it came, in order."""
        return [frame.request_id for frame in self.frames if isinstance(frame, Submit)]


def test_what_comes_before_there_is_a_worker_is_held() -> None:
    frames: list[Submit | Abort] = []
    live = LiveRequests(frames.append)
    live.add("a", [1], SamplingParams(), num_choices=1, salt=b"", priority=0)
    held = list(frames)

    live.give_out()

    assert held == []
    assert len(frames) == len(live) == 1


def test_what_is_given_up_while_there_is_no_worker_concerns_none() -> None:
    record = Record("leaves", "ends a choice")
    record.live.hold()
    record.frames.clear()

    record.streams["leaves"].close()
    record.live.abort_choice("ends a choice", 0)
    before = list(record.frames)
    record.live.give_out()

    assert before == record.frames == []


def test_the_next_worker_is_told_what_was_delivered_and_of_what_is_unfinished_alone() -> None:
    record = Record("ends")
    record.add("goes on", num_choices=2)
    record.deliver("ends", 7, "length")
    record.deliver("goes on", 8)
    record.live.abort_choice("goes on", 1)
    old = record.seq_id("goes on")

    record.die()

    (frame,) = record.frames
    assert isinstance(frame, Submit)
    (choice,) = frame.choices
    assert frame.prompt_ids == [1, 2]
    assert choice.completion_ids == [8]
    assert choice.seq_id != old


def test_who_got_somewhere_is_not_suspected() -> None:
    record = Record("a", "b")
    record.deliver("a", 7)
    record.deliver("b", 7)

    record.die("a", "b")

    assert record.given() == ["a", "b"]
    assert record.live.num_suspects == 0


def test_suspects_run_alone_one_by_one_and_the_others_when_all_are_cleared() -> None:
    record = Record("a", "b", "other")
    record.die("a", "b")
    alone = record.given()
    record.add("late")
    record.deliver("a", 7)  # and so it steps aside
    second = record.given()
    record.deliver("b", 7)

    assert alone == ["a"]
    assert second == ["a", "b"]
    assert record.aborts() == [Abort(request_id="a")]
    assert record.given() == ["a", "b", "a", "other", "late"]


@pytest.mark.parametrize("ends", ["given up", "finished"])
def test_a_suspect_that_ends_makes_room_for_the_others(ends: str) -> None:
    record = Record("a", "other")
    record.die("a")
    if ends == "finished":
        record.deliver("a", 7, "length")
    else:
        record.streams["a"].close()

    assert record.given() == ["a", "other"]
    assert record.live.num_suspects == 0


def test_only_who_kills_twice_alone_is_failed() -> None:
    record = Record("a", "other")
    found = [record.die("a", "other"), record.die("a"), record.die("a")]

    assert found == [False, False, True]
    assert record.given() == ["other"]
    with pytest.raises(EngineDied, match="of its own"):
        asyncio.run(first_of(record.streams["a"]))


def test_what_comes_for_a_request_that_was_given_up_is_dropped_and_counted() -> None:
    record = Record("a", "b")
    record.streams["a"].close()
    record.deliver("a", 7)
    record.deliver("b", 8)

    assert record.live.num_dropped_tokens == 1
    assert record.aborts() == [Abort(request_id="a")]
    assert [output.token_id for _, output in record.streams["b"].take_ready()] == [8]


def test_a_request_has_ended_with_its_last_choice() -> None:
    record = Record()
    stream = record.add("two", num_choices=2)
    record.live.abort_choice("two", 1)
    record.live.abort_choice("two", 1)
    before = len(record.live)
    record.deliver("two", 7, "length")
    record.live.abort_choice("two", 0)

    assert [before, len(record.live)] == [1, 0]
    assert len(stream.take_ready()) == 1
    assert record.aborts() == [Abort(request_id="two", choice=1)]


def test_what_does_not_fit_the_model_is_refused_once_it_is_known() -> None:
    live = LiveRequests(lambda frame: None)
    streams = [
        live.add(str(token_id), [token_id], SamplingParams(), num_choices=1, salt=b"", priority=0)
        for token_id in (5, 500)
    ]
    live.refuse_misfits(n_ctx=16, vocab_size=100)

    assert len(live) == 1
    with pytest.raises(TokenOutOfRange):
        asyncio.run(first_of(streams[1]))
