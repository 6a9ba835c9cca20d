"""What a request gets back, over an engine that says what it is told to."""

import json
from itertools import accumulate
from typing import Any

import pytest
from starlette.testclient import TestClient

from engine.sampling_params import SamplingParams
from server.served_model import ServedModel
from tests.server.conftest import Serve


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json={"model": "tiny", "prompt": " the", **body})
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


def events(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    reply = client.post(
        "/v1/completions", json={"model": "tiny", "prompt": " the", "stream": True, **body}
    )
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def streamed_text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def says(text: bytes) -> Any:
    """A script that says these bytes, a token each, whatever it is asked."""

    def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
        return list(text[: params.max_tokens])

    return script


def test_max_tokens_is_16_unless_told(serve: Serve) -> None:
    with serve() as (client, _):
        reply = complete(client)

    assert reply["choices"][0]["text"] == "abcdefghijklmnop"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 16


def test_null_means_the_default(serve: Serve) -> None:
    fields = ("max_tokens", "temperature", "n", "stop", "logit_bias", "stream", "suffix", "seed")
    with serve() as (client, _):
        reply = complete(client, **dict.fromkeys(fields))

    assert reply["usage"]["completion_tokens"] == 16


def test_max_tokens_0_computes_the_prompt_alone(serve: Serve) -> None:
    with serve() as (client, _):
        reply = complete(client, prompt=" the end", max_tokens=0, echo=True, logprobs=0)

    (choice,) = reply["choices"]
    assert choice["text"] == " the end"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"][:2] == [" the", " "]
    assert choice["logprobs"]["token_logprobs"][:2] == [None, -0.5]
    assert reply["usage"]["completion_tokens"] == 0


def test_logprobs_0_is_the_token_alone_and_absent_is_null(serve: Serve) -> None:
    with serve() as (client, _):
        none = complete(client, max_tokens=2)
        zero = complete(client, max_tokens=2, logprobs=0)
        two = complete(client, max_tokens=2, logprobs=2)

    assert none["choices"][0]["logprobs"] is None
    assert zero["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]
    assert two["choices"][0]["logprobs"]["top_logprobs"][0] == {"b": -1.0, "c": -2.0, "a": -0.5}


@pytest.mark.parametrize("echo", [False, True])
def test_text_offsets_count_from_the_start_of_the_prompt(serve: Serve, echo: bool) -> None:
    with serve() as (client, _):
        reply = complete(client, prompt="é the", max_tokens=3, logprobs=0, echo=echo)

    offsets = reply["choices"][0]["logprobs"]["text_offset"]
    assert offsets == ([0, 1] if echo else []) + [5, 6, 7]


def test_offsets_within_a_character_are_where_it_begins(serve: Serve) -> None:
    with serve(says("a€b".encode())) as (client, _):
        reply = complete(client, prompt="x", max_tokens=5, logprobs=0)

    logprobs = reply["choices"][0]["logprobs"]
    assert reply["choices"][0]["text"] == "a€b"
    assert logprobs["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert logprobs["text_offset"] == [1, 2, 2, 2, 3]


def test_indices_go_by_prompt_and_then_by_choice(serve: Serve) -> None:
    def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
        return [prompt_ids[0], ord("0") + choice]

    with serve(script) as (client, _):
        whole = complete(client, prompt=["x", "y"], n=2, max_tokens=2)
        chunks = events(client, prompt=["x", "y"], n=2, max_tokens=2)

    assert [(c["index"], c["text"]) for c in whole["choices"]] == [
        (0, "x0"), (1, "x1"), (2, "y0"), (3, "y1"),
    ]  # fmt: skip
    assert [streamed_text(chunks, index) for index in range(4)] == ["x0", "x1", "y0", "y1"]


def test_best_of_returns_the_best_by_mean_logprob_and_counts_all(serve: Serve) -> None:
    def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
        return [ord("0") + choice] * 4  # later choices are less probable in the fake

    with serve(script) as (client, _):
        reply = complete(client, n=2, best_of=4, max_tokens=4)

    assert [choice["text"] for choice in reply["choices"]] == ["0000", "1111"]
    assert reply["choices"][0]["logprobs"] is None
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["usage"]["completion_tokens_details"] == {"discarded_tokens": 8}


def test_best_of_ranks_by_mean_and_not_by_sum(serve: Serve) -> None:
    def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
        # 0: one token of -0.5. 1: the end at once, so a sum would favour neither by length.
        return [97] * 8 if choice == 0 else [98, 267]

    with serve(script) as (client, _):
        reply = complete(client, best_of=2, max_tokens=8)

    assert reply["choices"][0]["text"] == "aaaaaaaa"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_left_out_and_usage_ends_with_it(serve: Serve, stream: bool) -> None:
    body = {"max_tokens": 16, "stop": ["efg", "fx"]}
    with serve() as (client, service):
        if stream:
            chunks = events(client, stream_options={"include_usage": True}, **body)
            text, last, usage = streamed_text(chunks), chunks[-2]["choices"][0], chunks[-1]["usage"]
        else:
            reply = complete(client, **body)
            text, last, usage = reply["choices"][0]["text"], reply["choices"][0], reply["usage"]

        (request,) = service.engine.submitted

    assert text == "abcd"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "efg")
    assert usage["completion_tokens"] == 7
    assert request.aborted == {0}


def test_stop_strings_may_be_kept(serve: Serve) -> None:
    with serve() as (client, _):
        reply = complete(client, stop="cd", include_stop_str_in_output=True)

    assert reply["choices"][0]["text"] == "abcd"


def test_no_part_of_a_stop_string_is_streamed(serve: Serve) -> None:
    with serve() as (client, _):
        chunks = events(client, max_tokens=8, stop=["cdx", "fgh"])

    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    so_far = list(accumulate(texts))  # how much leaves together depends on the machine
    assert so_far[-1] == "abcde"  # fg never left
    assert not any(text.endswith(("c", "cd")) for text in so_far)  # they waited for their end


def test_stop_strings_wait_for_min_tokens(serve: Serve) -> None:
    with serve() as (client, _):
        reply = complete(client, stop=["b", "f"], min_tokens=4, max_tokens=8)

    assert reply["choices"][0]["text"] == "abcde"


def test_stop_token_ends_the_text_and_is_named(serve: Serve) -> None:
    with serve() as (client, _):
        left_out = complete(client, stop_token_ids=[ord("d")])
        kept = complete(client, stop_token_ids=[ord("d")], include_stop_str_in_output=True)

    assert left_out["choices"][0]["text"] == "abc"
    assert left_out["choices"][0]["stop_reason"] == ord("d")
    assert left_out["usage"]["completion_tokens"] == 4
    assert kept["choices"][0]["text"] == "abcd"


def test_special_tokens_show_only_when_asked_for(serve: Serve, served: ServedModel) -> None:
    (eos,) = served.special_token_ids

    def script(prompt_ids: list[int], params: SamplingParams, choice: int) -> list[int]:
        return [97, eos]

    with serve(script) as (client, _):
        hidden = complete(client, logprobs=0)
        shown = complete(client, skip_special_tokens=False, include_stop_str_in_output=True)

    assert hidden["choices"][0]["text"] == "a"
    assert hidden["choices"][0]["finish_reason"] == "stop"
    assert hidden["choices"][0]["stop_reason"] is None
    assert hidden["choices"][0]["logprobs"]["tokens"] == ["a", "<|endoftext|>"]
    assert shown["choices"][0]["text"] == "a<|endoftext|>"


def test_streamed_utf_8_is_whole_and_equal_to_the_whole_reply(serve: Serve) -> None:
    text = "Ærø 😀 नमस्ते"
    with serve(says(text.encode())) as (client, _):
        whole = complete(client, max_tokens=60)
        chunks = events(client, max_tokens=60)

    assert whole["choices"][0]["text"] == text == streamed_text(chunks)
    assert not any("\ufffd" in c["text"] for chunk in chunks for c in chunk["choices"])


def test_a_text_cut_within_a_character_ends_with_a_replacement(serve: Serve) -> None:
    with serve(says("a😀".encode())) as (client, _):
        whole = complete(client, max_tokens=3)
        chunks = events(client, max_tokens=3)

    assert whole["choices"][0]["text"] == "a\ufffd" == streamed_text(chunks)


@pytest.mark.parametrize("prompt", ["", None])
def test_an_empty_prompt_starts_from_bos(
    serve: Serve, served: ServedModel, prompt: str | None
) -> None:
    with serve() as (client, service):
        reply = complete(client, prompt=prompt, max_tokens=1, echo=True)
        (request,) = service.engine.submitted

    assert request.prompt_ids == [served.bos_token_id]
    assert reply["choices"][0]["text"] == "a"
    assert reply["usage"]["prompt_tokens"] == 1


def test_a_missing_prompt_starts_from_bos(serve: Serve, served: ServedModel) -> None:
    with serve() as (client, service):
        client.post("/v1/completions", json={"model": "tiny", "max_tokens": 1})
        (request,) = service.engine.submitted

    assert request.prompt_ids == [served.bos_token_id]


def test_prompts_may_be_ids_or_lists_of_ids(serve: Serve) -> None:
    with serve() as (client, service):
        one = complete(client, prompt=[97, 98], max_tokens=1, echo=True)
        two = complete(client, prompt=[[97], [98, 99]], max_tokens=1, echo=True)
        prompts = [r.prompt_ids for r in service.engine.submitted]

    assert [c["text"] for c in one["choices"]] == ["aba"]
    assert [c["text"] for c in two["choices"]] == ["aa", "bca"]
    assert prompts == [[97, 98], [97], [98, 99]]


def test_a_spelled_out_special_token_is_just_characters(serve: Serve, served: ServedModel) -> None:
    with serve() as (client, service):
        complete(client, prompt="<|endoftext|>", max_tokens=1)
        (request,) = service.engine.submitted

    assert not served.special_token_ids & set(request.prompt_ids)


def test_an_explicit_seed_applies_unchanged_to_each_prompt(serve: Serve) -> None:
    with serve() as (client, service):
        reply = complete(client, prompt=["a", "b"], seed=-5, max_tokens=1)
        seeds = [r.params.seed for r in service.engine.submitted]

    assert seeds == [-5, -5]
    assert [choice["seed"] for choice in reply["choices"]] == [-5, -5]


def test_without_a_seed_each_prompt_draws_its_own_and_the_reply_tells_it(serve: Serve) -> None:
    with serve() as (client, service):
        reply = complete(client, prompt=["a", "b"], n=2, max_tokens=1)
        chunks = events(client, max_tokens=1)
        seeds = [r.params.seed for r in service.engine.submitted]

    told = [choice["seed"] for choice in reply["choices"]]
    assert told == [seeds[0], seeds[0], seeds[1], seeds[1]]
    assert seeds[0] != seeds[1]
    assert chunks[-1]["choices"][0]["seed"] == seeds[2]


def test_truncation_keeps_the_end_of_the_prompt(serve: Serve) -> None:
    with serve() as (client, service):
        some = complete(client, prompt="abcdef", truncate_prompt_tokens=2, max_tokens=1, echo=True)
        complete(client, prompt="z" * 500, truncate_prompt_tokens=-1, max_tokens=10)
        lengths = [len(r.prompt_ids) for r in service.engine.submitted]

    assert some["choices"][0]["text"] == "efa"
    assert some["usage"]["prompt_tokens"] == 2
    assert lengths == [2, 54]


def test_token_ids_come_back_on_request(serve: Serve) -> None:
    with serve() as (client, _):
        whole = complete(client, max_tokens=3, return_token_ids=True)
        chunks = events(client, max_tokens=3, return_token_ids=True)

    assert whole["choices"][0]["token_ids"] == [97, 98, 99]
    assert whole["choices"][0]["prompt_token_ids"] == [258]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice["token_ids"]] == [97, 98, 99]
    assert choices[0]["prompt_token_ids"] == [258]
    assert "prompt_token_ids" not in choices[1]


def test_include_usage_puts_it_behind_the_text_and_null_before(serve: Serve) -> None:
    with serve() as (client, _):
        without = events(client, max_tokens=2)
        chunks = events(client, max_tokens=2, stream_options={"include_usage": True})

    assert all("usage" not in chunk for chunk in without)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 3
    assert "timings" in chunks[-1]


def test_finish_reason_is_null_until_a_choice_ends(serve: Serve) -> None:
    with serve() as (client, _):
        chunks = events(client, max_tokens=3, n=2)

    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_the_last_chunk_has_the_timings_and_no_other(serve: Serve) -> None:
    with serve() as (client, _):
        chunks = events(client, max_tokens=3, n=2)

    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert set(chunks[-1]["timings"]) == {
        "queue_seconds", "prefill_seconds", "decode_seconds", "total_seconds", "tokens_per_second",
        "num_preemptions",
    }  # fmt: skip


def test_cached_tokens_are_those_of_the_first_choice(serve: Serve) -> None:
    with serve() as (client, _):
        reply = complete(client, prompt="abcdef", n=3, max_tokens=2)

    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert reply["usage"]["prompt_tokens"] == 6
    assert reply["usage"]["total_tokens"] == 12


def test_ids_of_requests_are_echoed_or_made(serve: Serve) -> None:
    def ask(headers: dict[str, str], **body: Any) -> tuple[str, str]:
        reply = client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "a", "max_tokens": 1, **body},
            headers=headers,
        )
        return reply.headers["x-request-id"], reply.json()["id"]

    with serve() as (client, _):
        assert ask({"X-Request-Id": "mine-1"}) == ("mine-1", "cmpl-mine-1")
        assert ask({"X-Request-Id": "mine-1"}, request_id="b:2") == ("b:2", "cmpl-b:2")
        made, _ = ask({"X-Request-Id": "no good id"})
        assert made != "no good id"
        timeline = client.get("/v1/requests/cmpl-b:2").json()

    assert timeline["outcome"] == "length"
    events = timeline["events"]
    order = ["admitted", "tokenized", "submitted", "scheduled", "first_token", "last_token"]
    assert [events[name] for name in order] == sorted(events[name] for name in order)
    assert "prompt" not in timeline


@pytest.mark.parametrize(("stop", "is_told"), [(None, False), ([], False), (["zz"], True)])
def test_the_engine_is_told_whether_a_string_may_end_the_text(
    serve: Serve, stop: list[str] | None, is_told: bool
) -> None:
    with serve() as (client, service):
        complete(client, stop=stop)
        (request,) = service.engine.submitted

    assert request.params.has_stop_strings == is_told


def test_sampling_fields_reach_the_engine(serve: Serve) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
        "min_tokens": 2, "ignore_eos": True, "max_tokens": 5, "logprobs": 3,
    }  # fmt: skip
    with serve() as (client, service):
        complete(
            client, **fields, logit_bias={"97": -100, "98": 1.5}, allowed_token_ids=[97, 98],
            stop_token_ids=[99], priority=-2, n=3,
        )  # fmt: skip
        (request,) = service.engine.submitted

    assert {name: getattr(request.params, name) for name in fields} == fields
    assert request.params.logit_bias == {97: -100.0, 98: 1.5}
    assert request.params.allowed_token_ids == (97, 98)
    assert request.params.stop_token_ids == (99,)
    assert request.params.prompt_logprobs is None
    assert (request.priority, request.num_choices) == (-2, 3)
