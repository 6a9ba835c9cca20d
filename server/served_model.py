"""The facts of the served model that text and HTTP need, read without torch."""

from dataclasses import dataclass
from pathlib import Path

from model.tokenizer import Tokenizer
from weights.layout import Layout, read_layout, read_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A checkpoint as the server sees it."""

    name: str
    tokenizer: Tokenizer
    n_ctx: int
    vocab_size: int  # ids that can be asked for and sampled; above is padding
    bos_token_id: int | None
    special_token_ids: frozenset[int]  # shown only on request
    max_token_bytes: int  # of the longest token
    mean_token_bytes: float
    created: int  # unix time

    @classmethod
    def read(cls, directory: Path, *, name: str | None = None) -> "ServedModel":
        """Read and check a checkpoint directory; raises CheckpointError, TokenizerError."""
        layout = read_layout(directory)
        return cls.of(layout, read_tokenizer(layout), name=name)

    @classmethod
    def of(cls, layout: Layout, tokenizer: Tokenizer, *, name: str | None = None) -> "ServedModel":
        """Put together what a checkpoint and its tokenizer say."""
        bos = layout.bos_token_id if layout.bos_token_id is not None else tokenizer.bos_token_id
        sizes = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
        return cls(
            name=name or layout.directory.absolute().name,
            tokenizer=tokenizer,
            n_ctx=layout.config.n_ctx,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=bos if bos is not None and bos < tokenizer.vocab_size else None,
            special_token_ids=tokenizer.special_token_ids | {*layout.eos_token_ids},
            max_token_bytes=max(sizes),
            mean_token_bytes=sum(sizes) / len(sizes),
            created=int(layout.config_file.stat().st_mtime),
        )

    def estimate_tokens(self, prompt: str | list[int]) -> int:
        """How many tokens a prompt may have, at most a context: a guess, before it is tokenised."""
        if isinstance(prompt, str):
            # Frequent tokens are shorter than the vocabulary's mean.
            length = 1 + int(
                len(prompt.encode(errors="replace")) / max(1, self.mean_token_bytes / 2)
            )
        else:
            length = len(prompt)
        return min(length, self.n_ctx)

    def spell(self, token_id: int) -> str:
        """A token as logprobs name it: its text, or its bytes or id where they are no text.

        No two tokens of a byte-level vocabulary are spelled alike.
        """
        data = self.tokenizer.token_bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def spell_text(self, token_ids: list[int]) -> str:
        """The text of ids, special ones included."""
        return self.tokenizer.decode(token_ids)
