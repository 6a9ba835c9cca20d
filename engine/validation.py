"""What can be refused of a request at once; asked on both sides of the process door."""

from collections.abc import Sequence

from engine.errors import PromptTooLong, TokenOutOfRange
from engine.sampling_params import SamplingParams


def check_request(
    prompt_ids: Sequence[int], params: SamplingParams, *, n_ctx: int, vocab_size: int
) -> None:
    """Check a request against the model: lengths and every id that it names.

    Ids go up to the tokenizer's vocabulary; what the model has above is padding. Raises
    PromptTooLong, TokenOutOfRange.
    """
    if len(prompt_ids) > n_ctx:
        raise PromptTooLong(num_tokens=len(prompt_ids), n_ctx=n_ctx)
    for field, token_ids in (
        ("prompt", prompt_ids),
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            token_id = next(i for i in token_ids if not 0 <= i < vocab_size)
            raise TokenOutOfRange(field=field, token_id=token_id, vocab_size=vocab_size)
