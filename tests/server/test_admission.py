import asyncio
from typing import Any

import httpx2
import pytest

from model.tokenizer import Tokenizer
from server.admission import Admission
from server.app import create_app
from server.errors import InvalidRequest, Overloaded
from server.served_model import ServedModel
from server.service import Service
from tests.server.conftest import make_service


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_room_is_taken_at_once_and_given_back_once() -> None:
    admission = Admission(max_choices=3, max_prompt_tokens=100)

    first = admission.reserve(num_choices=2, num_prompt_tokens=10)
    with pytest.raises(Overloaded):
        admission.reserve(num_choices=2, num_prompt_tokens=10)
    first.release(is_finished=True)
    first.release(is_finished=True)

    assert (admission.num_choices, admission.num_prompt_tokens) == (0, 0)
    admission.reserve(num_choices=3, num_prompt_tokens=10)


def test_an_estimate_is_replaced_by_what_the_prompts_turned_out_to_be() -> None:
    admission = Admission(max_choices=10, max_prompt_tokens=100)

    permit = admission.reserve(num_choices=1, num_prompt_tokens=80)
    permit.correct(20)
    admission.reserve(num_choices=1, num_prompt_tokens=80)
    with pytest.raises(Overloaded):
        admission.reserve(num_choices=1, num_prompt_tokens=1)
    permit.release(is_finished=False)

    assert admission.num_prompt_tokens == 80


def test_what_can_never_fit_is_no_overload() -> None:
    admission = Admission(max_choices=3, max_prompt_tokens=100)

    with pytest.raises(InvalidRequest, match="at most 3"):
        admission.reserve(num_choices=4, num_prompt_tokens=1)
    with pytest.raises(InvalidRequest, match="at most 100"):
        admission.reserve(num_choices=1, num_prompt_tokens=101)


@pytest.mark.parametrize(("every_seconds", "expected"), [(0.5, "1"), (4.0, "4"), (0.0, "1")])
def test_retry_after_follows_from_the_measured_rate(every_seconds: float, expected: str) -> None:
    clock = Clock()
    admission = Admission(max_choices=2, max_prompt_tokens=1000, clock=clock)
    for _ in range(6):  # one request finishes every so often
        permit = admission.reserve(num_choices=1, num_prompt_tokens=1)
        permit.release(is_finished=True)
        clock.now += every_seconds
    admission.reserve(num_choices=2, num_prompt_tokens=1)

    with pytest.raises(Overloaded) as caught:
        admission.reserve(num_choices=1, num_prompt_tokens=1)

    assert caught.value.headers["Retry-After"] == expected


def test_without_a_rate_the_advice_is_one_second_and_never_more_than_a_minute() -> None:
    clock = Clock()
    admission = Admission(max_choices=1, max_prompt_tokens=1000, clock=clock)
    admission.reserve(num_choices=1, num_prompt_tokens=1)
    with pytest.raises(Overloaded) as caught:
        admission.reserve(num_choices=1, num_prompt_tokens=1)
    assert caught.value.headers["Retry-After"] == "1"


class CountingTokenizer:
    """Passes everything on and counts the texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_encoded = 0

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return self._tokenizer.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


async def burst(service: Service, count: int, **body: Any) -> list[httpx2.Response]:
    """Many requests at once, while the engine brings nothing until all others are refused."""
    engine: Any = service.engine
    engine.running.clear()
    transport = httpx2.ASGITransport(create_app(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        asked = [
            asyncio.create_task(
                client.post(
                    "/v1/completions",
                    json={"model": "tiny", "prompt": "abc", "max_tokens": 1, **body},
                )
            )
            for _ in range(count)
        ]
        while sum(task.done() for task in asked) + len(engine.submitted) < count:
            await asyncio.sleep(0.001)
        engine.running.set()
        return await asyncio.gather(*asked)


def test_of_a_burst_so_many_are_tokenised_and_the_rest_is_refused_untokenised(
    served: ServedModel,
) -> None:
    tokenizer = CountingTokenizer(served.tokenizer)
    counted = ServedModel(
        **{
            **{name: getattr(served, name) for name in ServedModel.__slots__},
            "tokenizer": tokenizer,
        }
    )

    async def run() -> tuple[list[httpx2.Response], Service]:
        service = make_service(counted, max_num_sequences=8, max_waiting_requests=12)
        return await burst(service, 100), service

    replies, service = asyncio.run(run())

    statuses = [reply.status_code for reply in replies]
    assert (statuses.count(200), statuses.count(429)) == (20, 80)
    assert tokenizer.num_encoded == 20
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert service.admission.num_choices == service.admission.num_prompt_tokens == 0


def test_choices_and_candidates_count_and_so_do_prompts(served: ServedModel) -> None:
    async def run(**body: Any) -> list[int]:
        service = make_service(served, max_num_sequences=8, max_waiting_requests=4)
        return [reply.status_code for reply in await burst(service, 3, **body)]

    assert sorted(asyncio.run(run(n=6))) == [200, 200, 429]
    assert sorted(asyncio.run(run(best_of=6))) == [200, 200, 429]
    assert sorted(asyncio.run(run(prompt=["a", "b", "c"], n=2))) == [200, 200, 429]
    assert asyncio.run(run(n=13)) == [400] * 3


def test_prompt_tokens_are_bounded_too(served: ServedModel) -> None:
    async def run() -> list[int]:
        service = make_service(served, max_prompt_tokens=100)
        return [r.status_code for r in await burst(service, 4, prompt="a" * 40)]

    assert sorted(asyncio.run(run())) == [200, 200, 429, 429]


def test_a_refused_request_leaves_no_room_taken(served: ServedModel) -> None:
    async def run() -> Service:
        service = make_service(served)
        transport = httpx2.ASGITransport(create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            for body in (
                {"prompt": "a" * 65}, {"prompt": [268]}, {"logit_bias": {"268": 1}},
                {"prompt": ["a", "b" * 65], "n": 3},
            ):  # fmt: skip
                reply = await client.post(
                    "/v1/completions", json={"model": "tiny", "max_tokens": 1, **body}
                )
                assert reply.status_code == 400
        return service

    service = asyncio.run(run())

    assert service.admission.num_choices == service.admission.num_prompt_tokens == 0
    assert service.num_in_flight == 0
