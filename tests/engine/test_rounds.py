"""Several rounds a step: tokens that the host looks at together, and when it must not."""

import random
from typing import Any

import pytest

from engine.attention import PagedAttention
from engine.cuda_graph import DecodeStep
from engine.engine import Engine
from engine.messages import Abort, Choice, Submit
from tests.engine.decoding import ON_DEVICE, params
from tests.engine.engines import make_engine, random_prompt


@pytest.mark.parametrize("max_num_rounds", [3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_several_rounds_change_nothing(max_num_rounds: int, seed: int) -> None:
    """Against an engine that looks at every token: ends, arrivals, aborts, little room."""
    chance = random.Random(seed)
    submits: list[Submit] = []
    arrivals: dict[int, list[Submit]] = {}
    aborts: dict[int, list[Abort]] = {}
    for index in range(9):
        choices = [Choice(seq_id=2 * index + i, index=i) for i in range(chance.choice([1, 1, 2]))]
        submit = Submit(
            request_id=f"r{index}",
            prompt_ids=random_prompt(chance.randint(1, 12), seed=100 * seed + index),
            choices=choices,
            params=params(
                max_tokens=chance.randint(1, 40),
                temperature=chance.choice([0.0, 1.0]),
                top_p=chance.choice([1.0, 0.9]),
                logprobs=chance.choice([None] * 6 + [1]),
                has_stop_strings=chance.random() < 0.3,
                stop_token_ids=chance.choice([(), (5, 6)]),
                seed=index,
                ignore_eos=chance.random() < 0.3,
            ),
        )
        submits.append(submit)
        arrivals.setdefault(chance.randint(0, 20), []).append(submit)
        if chance.random() < 0.3:
            aborts.setdefault(chance.randint(0, 20), []).append(Abort(request_id=f"r{index}"))
    settings: dict[str, Any] = {"eos_token_ids": (0, 40, 80), "share_completion_blocks": False}
    usual = make_engine(attention=PagedAttention, **settings)
    expected = tokens_of(usual, {0: submits}, {})
    ours = make_engine(
        attention=PagedAttention,
        decode_step=DecodeStep,
        num_blocks=chance.choice([18, 24, 100]),
        max_num_sequences=chance.choice([2, 5, 16]),
        max_num_rounds=max_num_rounds,
        **settings,
    )

    found = tokens_of(ours, arrivals, aborts)

    aborted = {abort.request_id for some in aborts.values() for abort in some}
    for submit in submits:
        for choice in submit.choices:
            tokens, whole = found.get(choice.seq_id, []), expected[choice.seq_id]
            if submit.request_id in aborted:
                assert tokens == whole[: len(tokens)]
            else:
                assert tokens == whole
    assert ours.counts().stats.num_used_blocks == 0


def tokens_of(
    engine: Engine, arrivals: dict[int, list[Submit]], aborts: dict[int, list[Abort]]
) -> dict[int, list[Any]]:
    """What each sequence is told, in order, where requests come and go before given steps."""
    told: dict[int, list[Any]] = {}
    step = 0
    while step <= max([*arrivals, *aborts]) or not engine.is_idle:
        for submit in arrivals.get(step, []):
            engine.add(submit)
        for abort in aborts.get(step, []):
            engine.abort(abort)
        output = engine.step()
        for token in output.outputs if output is not None else []:
            told.setdefault(token.seq_id, []).append((token.token_id, token.finish_reason))
        step += 1
    return told


@pytest.mark.parametrize(
    ("changes", "most"),
    [({}, 8), ({"has_stop_strings": True}, 4), ({"logprobs": 0}, 1), ({"min_tokens": 3}, 1)],
)
def test_a_frame_carries_as_many_tokens_as_need_no_host(changes: dict[str, Any], most: int) -> None:
    engine = make_engine(max_num_rounds=8, **ON_DEVICE)
    choices = [Choice(seq_id=0, index=0)]
    one = params(max_tokens=33, **changes)
    engine.add(Submit(request_id="a", prompt_ids=[1], choices=choices, params=one))

    counts = []
    while (output := engine.step()) is not None:
        counts.append(len(output.outputs))

    assert counts == [1] + [most] * (32 // most)


def test_an_engine_whose_device_waits_for_the_host_looks_at_every_token() -> None:
    engine = make_engine(max_num_rounds=8, share_completion_blocks=False)
    choices = [Choice(seq_id=0, index=0)]
    engine.add(Submit(request_id="a", prompt_ids=[1], choices=choices, params=params()))

    counts = []
    while (output := engine.step()) is not None:
        counts.append(len(output.outputs))

    assert counts == [1] * 12


def test_who_arrives_waits_for_the_rounds_that_were_started_and_no_more() -> None:
    engine = make_engine(max_num_rounds=8, **ON_DEVICE)
    for seq_id in range(2):
        if seq_id:
            for _ in range(3):
                engine.step()
        choices = [Choice(seq_id=seq_id, index=0)]
        one = params(max_tokens=60)
        engine.add(Submit(request_id=f"r{seq_id}", prompt_ids=[1], choices=choices, params=one))

    outputs = [engine.step() for _ in range(3)]

    told = [[token.seq_id for token in output.outputs] for output in outputs if output is not None]
    assert told[0] == [0] * 8, "was under way"
    assert told[1] == [0, 1], "comes in"
    assert told[2] == [0, 1] * 8
