"""Byte-level BPEs: one by hand, small enough to follow, and others trained by `tokenizers`."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.tokenizer import BytePairTokenizer
from model.vocabulary import END_OF_TEXT, byte_alphabet

MERGES = [
    ("Ġ", "t"),  # Ġ stands for a space
    ("h", "e"),
    ("Ġt", "he"),
    ("i", "n"),
    ("in", "g"),
    ("Ġ", "a"),
    ("o", "n"),
    ("Ã", "©"),  # é
    ("Ġa", "n"),
    ("Ġan", "d"),
    ("Ġ", "Ġ"),
]


def letters() -> list[str]:
    """The characters that stand for the bytes 0 to 255, in that order."""
    alphabet = byte_alphabet()
    return sorted(alphabet, key=alphabet.__getitem__)


def vocabulary_of(
    merges: Iterable[tuple[str, str]], characters: Sequence[str] | None = None
) -> dict[str, int]:
    """Ids from 0 on: first the characters, every byte's unless told, then what the merges make."""
    tokens = [*(letters() if characters is None else characters), *(a + b for a, b in merges)]
    return {token: token_id for token_id, token in enumerate(tokens)}


def byte_pair_tokenizer() -> BytePairTokenizer:
    """256 bytes, eleven merges and <|endoftext|>: 268 ids, the last of them special."""
    vocabulary = vocabulary_of(MERGES)
    return BytePairTokenizer.from_merges(vocabulary, MERGES, {END_OF_TEXT: len(vocabulary)})


def train_byte_pairs(
    text: str, vocab_size: int, *, special_tokens: Sequence[str] = (), alphabet: bool = True
) -> Tokenizer:
    """A tokenizer of the `tokenizers` library with GPT-2's rules, trained on a text.

    Its special tokens have the first ids. Without `alphabet` it has only the bytes that occur.
    """
    tokenizer = byte_level(models.BPE())
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
            show_progress=False,
        ),
    )
    return tokenizer


def byte_level(model: models.BPE) -> Tokenizer:
    """The `tokenizers` library's own reading of a BPE by GPT-2's rules."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
