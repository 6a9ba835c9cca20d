"""OpenAI's own Python client against a live server: what its users type, and what they catch."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.clients.conftest import API_KEY
from tests.server.live import LiveServer

MODEL = "tiny"
PROMPT = " the thing and"


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def test_a_completion_has_every_field_the_client_knows(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=[PROMPT, "on"], n=2, max_tokens=8, logprobs=2, echo=True, seed=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip

    assert reply.object == "text_completion"
    assert reply.system_fingerprint
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 4
    assert reply.choices[0].text.startswith(PROMPT)
    assert reply.usage.completion_tokens == 4 * 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    logprobs = reply.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert logprobs.token_logprobs[0] is None


def test_a_stream_adds_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, seed=5)

    with client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, seed=5, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)

    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_async_client_runs_many_at_once_and_may_leave(server: LiveServer) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0
        ) as client:

            async def tell(seed: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=20, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            left = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=200, stream=True
            )
            await left.close()
            return list(await asyncio.gather(*(tell(seed) for seed in (1, 2, 3, 1))))

    texts = asyncio.run(run())

    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"temperature": 3}, "temperature", None),
        ({"suffix": "."}, "suffix", "unsupported_parameter"),
        ({"max_tokens": 1000}, "max_tokens", "context_length_exceeded"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
    ],
)
def test_a_bad_request_names_its_field(
    client: openai.OpenAI, changes: dict, param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **changes})

    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_stream_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=PROMPT, n=0, stream=True)


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="davinci", prompt=PROMPT)

    assert caught.value.code == "model_not_found"


def test_a_wrong_key_is_an_authentication_error(server: LiveServer) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]

    assert listed == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
