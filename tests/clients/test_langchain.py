"""LangChain's client for completions, which sends and expects more than OpenAI's own."""

from collections.abc import Iterator

import openai
import pytest
from langchain_openai import OpenAI

from tests.clients.conftest import API_KEY
from tests.server.live import LiveServer


@pytest.fixture
def http_client() -> Iterator[openai.DefaultHttpxClient]:
    """In place of LangChain's own, which nobody closes."""
    with openai.DefaultHttpxClient() as client:
        yield client


def _model(server: LiveServer, client: openai.DefaultHttpxClient, **options: object) -> OpenAI:
    return OpenAI(
        model="tiny", base_url=f"{server.url}/v1", api_key=API_KEY, max_tokens=24, seed=3,
        max_retries=0, http_client=client, **options,
    )  # fmt: skip


def test_a_stream_adds_up_to_what_invoke_returns(
    server: LiveServer, http_client: openai.DefaultHttpxClient
) -> None:
    model = _model(server, http_client)

    streamed = list(model.stream(" the"))

    assert "".join(streamed) == model.invoke(" the")


def test_a_batch_answers_in_order_and_obeys_stops(
    server: LiveServer, http_client: openai.DefaultHttpxClient
) -> None:
    model = _model(server, http_client, temperature=0.0)
    prompts = [" the", "on", "ing"]
    alone = [model.invoke(prompt) for prompt in prompts]

    together = model.generate(prompts)

    assert [choices[0].text for choices in together.generations] == alone
    assert together.llm_output["token_usage"]["completion_tokens"] > 0
    stop = alone[0][3:5]
    assert model.invoke(" the", stop=[stop]) == alone[0].partition(stop)[0]
