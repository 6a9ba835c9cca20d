"""What can go wrong in the engine, as types with a sentence each; knows no status codes.

EngineError
├── PromptTooLong      the prompt alone exceeds the context
├── TokenOutOfRange    an id of the request is not in the vocabulary
├── EngineOverloaded   the queue is full; later may be better
├── EngineStopped      the engine is shutting down, or never ran
├── EngineDied         the process died with the request, and running it again did not help
├── NonFiniteLogits    the model gave NaN or infinity for this request alone
├── StartRefused       the engine cannot start: bad checkpoint, device or options
├── DoesNotFit         at start: weights, cache and working memory exceed what there is
└── CacheTooSmall      at start: the KV cache holds less than one full context
"""

# ruff: noqa: N818  # a name that says what happened needs no "Error" behind it


class EngineError(Exception):
    """Anything the engine refuses or fails; its text is fit to be read by a client."""


class PromptTooLong(EngineError):
    """The prompt has more tokens than the model can see."""

    def __init__(self, *, num_tokens: int, n_ctx: int) -> None:
        super().__init__(f"The prompt has {num_tokens} tokens; this model's context is {n_ctx}.")
        self.num_tokens = num_tokens
        self.n_ctx = n_ctx


class TokenOutOfRange(EngineError):
    """A token id is not one of the model's; `field` names where in the request it stood."""

    def __init__(self, *, field: str, token_id: int, vocab_size: int) -> None:
        super().__init__(
            f"{field} contains the token id {token_id}; "
            f"this model's ids go from 0 to {vocab_size - 1}."
        )
        self.field = field
        self.token_id = token_id
        self.vocab_size = vocab_size


class EngineOverloaded(EngineError):
    """As many requests wait as may wait."""

    def __init__(self, *, num_waiting: int, max_num_waiting: int) -> None:
        super().__init__(
            f"The server is busy: {num_waiting} requests are waiting, "
            f"and at most {max_num_waiting} may. Try again later."
        )
        self.num_waiting = num_waiting
        self.max_num_waiting = max_num_waiting


class EngineStopped(EngineError):
    """The engine takes no requests any more."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.")


class EngineDied(EngineError):
    """The engine died while it ran this request, and a new one could not finish it either."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(f"The engine failed while generating: {reason.removesuffix('.')}.")
        self.reason = reason


class NonFiniteLogits(EngineError):
    """The logits of one sequence were NaN or infinite; the other sequences go on."""

    def __init__(self, *, position: int) -> None:
        super().__init__(
            f"The model gave no usable probabilities after token {position} of this request."
        )
        self.position = position


class CacheTooSmall(EngineError):
    """The KV cache cannot hold one full context, so its longest sequence could never finish."""

    def __init__(self, *, num_blocks: int, block_size: int, n_ctx: int) -> None:
        self.min_num_blocks = -(-n_ctx // block_size) + 1  # and the null block
        super().__init__(
            f"The KV cache has {num_blocks} blocks of {block_size} tokens, and block 0 is "
            f"padding: room for {max(0, num_blocks - 1) * block_size} tokens, less than one "
            f"context of {n_ctx}. Set num_blocks to at least {self.min_num_blocks}."
        )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.n_ctx = n_ctx


class StartRefused(EngineError):
    """The engine cannot start, and would not the next time either."""

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DoesNotFit(EngineError):
    """The memory there is cannot hold the weights, one context and a step's working memory."""
