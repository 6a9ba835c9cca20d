"""Logits in, one token a row out, each row as its request wants it; knows no model and no queue.

The order: allowed ids, bias, min_tokens; penalties; then `engine.draw`: temperature, top_k, top_p,
min_p, typical_p. Logprobs are of the raw distribution, before any of it. Only rows that are edited
are copied; whatever is computed for a row is independent of the others, bitwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.draw import Draw, Filters, draw, lowest_argmax
from engine.random_stream import NoiseKeys
from engine.sampler_cpu import MOST_ALTERNATIVES, Options, score
from engine.sampler_cpu import choose as choose_on_cpu
from engine.sampling_params import COLDEST, SamplingParams
from engine.sampling_row import Ids, SamplingRow

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs of N tokens, each among all of its vocabulary, and the K most probable instead."""

    logprobs: Tensor  # (N,) float32
    top_ids: Tensor  # (N, K), the most probable first, the lower id first among equals
    top_logprobs: Tensor  # (N, K)

    def tolist(self) -> list[tuple[float, list[int], list[float]]]:
        """Read them to the host: for each token its logprob, and ids and logprobs of the top."""
        columns = (self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist())
        return list(zip(*columns, strict=True))


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What came of R rows.

    A row is finite if its highest logit is: a logit of -inf among others only bans its token.
    Where it is not, the token id is 0 and means nothing.
    """

    token_ids: Tensor  # (R,) int64
    is_finite: Tensor  # (R,) bool
    num_top: dict[int, int]  # rows that asked for logprobs, ascending, and for how many others
    logprobs: TokenLogprobs | None  # theirs, with as many alternatives as any of them asked for

    def logprobs_by_row(self) -> dict[int, tuple[float, list[int], list[float]]]:
        """Read the logprobs to the host: of each asking row what it asked for."""
        if self.logprobs is None:
            return {}
        return {
            place: (logprob, ids[:count], tops[:count])
            for (place, count), (logprob, ids, tops) in zip(
                self.num_top.items(), self.logprobs.tolist(), strict=True
            )
        }


def bare_options(rows: Sequence[SamplingRow]) -> Options | None:
    """Put together how rows are drawn on a CPU that want token ids alone; None if some want more.

    `sample` does so by itself, but late: behind a network, rows are in no cache any more.
    """
    return _options(rows) if all(row.is_bare for row in rows) else None


def sample(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    options: Options | None = None,
    *,
    draw: Draw = draw,
) -> SampledTokens:
    """Choose a token for each row from its logits (R, V) float32, which are left as they are.

    V is the number of ids the tokenizer knows: of a padded vocabulary pass `logits[:, :V]`, and no
    padding is ever drawn or counted. Unless some row has logprobs or penalties to be computed,
    nothing is read back to the host on a device other than a CPU. `options` are what
    `bare_options` made of the rows, if it was asked, for logits on a CPU; `draw` is another
    device's own, equal to the default.
    """
    if options is None and logits.device.type == "cpu":
        options = bare_options(rows)
    if options is not None:
        return SampledTokens(*choose_on_cpu(logits, options), {}, None)
    edited = [place for place, row in enumerate(rows) if row.is_edited]
    temperatures = [
        0.0 if row.params.is_greedy else max(row.params.temperature, COLDEST) for row in rows
    ]
    if not edited:
        token_ids, is_finite = _choose(logits, rows, temperatures, draw)
    else:
        # Whether a row is finite, its own logits say: of those to be edited nothing else is asked.
        unedited = [0.0 if row.is_edited else t for row, t in zip(rows, temperatures, strict=True)]
        token_ids, is_finite = _choose(logits, rows, unedited, draw)
        index = _index(edited, logits.device)
        changed = logits[index]
        some = [rows[place] for place in edited]
        _edit(changed, some)
        chosen, _ = _choose(changed, some, [temperatures[place] for place in edited], draw)
        token_ids[index] = chosen
        token_ids.masked_fill_(~is_finite, 0)

    wanted = ((place, row.params.logprobs) for place, row in enumerate(rows))
    num_top = {place: count for place, count in wanted if count is not None}
    logprobs = None
    if num_top:
        chosen = token_ids
        if len(num_top) < len(rows):
            index = _index(list(num_top), logits.device)
            logits, chosen = logits[index], token_ids[index]
        logprobs = token_logprobs(logits, chosen, max(num_top.values()))
    return SampledTokens(token_ids, is_finite, num_top, logprobs)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenLogprobs:
    """Compute the logprobs of given tokens (N,), and the `num_top` highest, from logits (N, V).

    For the prompt's tokens too: the logits of position p with the token at p + 1. Rows that are
    not finite give NaN.
    """
    num_top = min(num_top, logits.shape[1])
    if logits.device.type == "cpu" and num_top <= MOST_ALTERNATIVES:
        return TokenLogprobs(*score(logits, token_ids, num_top))
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    # topk leaves the order among equals open. No logprob is above 0, so the bits of its absolute
    # value grow as it falls: with the id below them they make keys that are never equal.
    keys = logprobs.abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys |= torch.arange(logits.shape[1], device=logits.device)
    top_ids = keys.topk(num_top, largest=False).values & 0xFFFFFFFF
    return TokenLogprobs(chosen, top_ids, logprobs.gather(1, top_ids))


def _choose(
    logits: Tensor, rows: Sequence[SamplingRow], temperatures: list[float], draw: Draw
) -> tuple[Tensor, Tensor]:
    """Choose a token a row (R,) from logits (R, V) as they are; tell which rows are finite (R,).

    Where the temperature is 0 it is the best, where the row is not finite it is 0.
    """
    vocab_size, device = logits.shape[1], logits.device
    drawn = [row.params for row, t in zip(rows, temperatures, strict=True) if t > 0]
    if device.type == "cpu":
        return choose_on_cpu(logits, _options(rows, temperatures) if drawn else None)
    if drawn:
        temperature = torch.tensor(temperatures, dtype=torch.float64, device=device)
        # The token to be drawn stands where the sequence ends now.
        key = (
            [row.params.seed for row in rows],
            [row.choice for row in rows],
            [row.num_tokens for row in rows],
        )
        keys = NoiseKeys(*torch.tensor(key, device=device).unbind())
        is_filtered = any(_is_filtered(params, vocab_size) for params in drawn)
        filters = _filters([row.params for row in rows], logits) if is_filtered else None
    token_ids, best = lowest_argmax(logits)
    if drawn:
        found = draw(logits, temperature.clamp(min=COLDEST), keys, filters)
        token_ids = found.where(temperature > 0, token_ids)
    is_finite = best.isfinite()
    return token_ids.masked_fill(~is_finite, 0), is_finite


def _options(rows: Sequence[SamplingRow], temperatures: list[float] | None = None) -> Options:
    """Put the rows' options together, with other temperatures than theirs if there are any."""
    # The token to be drawn stands where the sequence ends now.
    positions = [row.num_tokens for row in rows]
    return Options.packed([row.options for row in rows], positions, temperatures)


def _is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    has_top_k = 0 < params.top_k < vocab_size
    return has_top_k or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def _filters(params: list[SamplingParams], logits: Tensor) -> Filters:
    vocab_size, device = logits.shape[1], logits.device
    top_k = [min(one.top_k or vocab_size, vocab_size) for one in params]
    shares = [
        [one.top_p for one in params], [one.min_p for one in params],
        [one.typical_p for one in params],
    ]  # fmt: skip
    top_p, min_p, typical_p = torch.tensor(shares, dtype=torch.float64, device=device).unbind()
    return Filters(
        torch.tensor(top_k, device=device),
        top_p,
        min_p,
        typical_p,
        has_typical_p=any(one.typical_p < 1 for one in params),
    )


def _edit(logits: Tensor, rows: list[SamplingRow]) -> None:
    """Apply to logits (n, V), in place and where asked for, what precedes the temperature."""
    allowed = {i: row.allowed_ids for i, row in enumerate(rows) if row.allowed_ids is not None}
    if allowed:
        at = _at(allowed, logits)
        kept = logits[at]
        logits[list(allowed)] = -math.inf
        logits[at] = kept
    biased = {i: row.bias_ids for i, row in enumerate(rows) if len(row.bias_ids)}
    if biased:
        biases = np.concatenate([rows[i].biases for i in biased])
        logits[_at(biased, logits)] += torch.from_numpy(biases).to(logits.device)
    banned = {i: row.banned_ids for i, row in enumerate(rows) if row.has_bans}
    if banned:
        logits[_at(banned, logits)] = -math.inf
    if any(row.has_penalties for row in rows):
        _penalise(logits, rows)


def _penalise(logits: Tensor, rows: list[SamplingRow]) -> None:
    """Apply the penalties to logits (n, V), in place.

    Repetition (Keskar et al., 2019, arXiv:1909.05858; as transformers applies it) multiplies how
    unlikely a seen token is; presence and frequency (OpenAI) are subtracted. In float64, so that
    no penalty makes an infinity of a finite logit.
    """
    seen = {i: row.seen[0] for i, row in enumerate(rows) if row.has_penalties}
    at = _at(seen, logits)
    counts = np.concatenate([rows[i].seen[1] for i in seen])
    lengths = [len(ids) for ids in seen.values()]
    penalties = [
        (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        for params in (rows[i].params for i in seen)
    ]
    repetition, presence, frequency = np.repeat(np.array(penalties), lengths, axis=0).T
    subtracted = torch.from_numpy(presence * (counts > 0) + frequency * counts)
    factor = torch.from_numpy(repetition.copy()).to(logits.device)
    before = logits[at].double()
    after = torch.where(before > 0, before / factor, before * factor)
    after = (after - subtracted.to(logits.device)).clamp(-_LARGEST, _LARGEST)
    logits[at] = after.where(before != -math.inf, before).float()


def _at(ids: dict[int, Ids], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index the given ids of some rows: row and id of each, (n,) and (n,)."""
    row = np.repeat(np.array(list(ids)), [len(part) for part in ids.values()])
    column = np.concatenate(list(ids.values()))
    assert not len(column) or 0 <= column.min() <= column.max() < logits.shape[1], "ids are checked"
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(column).to(logits.device)


def _index(places: list[int], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)
