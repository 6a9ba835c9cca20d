import codecs
import random
import re
import unicodedata
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as ReferenceTokenizer
from transformers import AutoTokenizer, GPT2Tokenizer

from model.tokenizer import BytePairTokenizer, CharacterTokenizer, load_tokenizer
from model.vocabulary import END_OF_TEXT, TokenizerError, Vocabulary, read_vocabulary
from tests.byte_pairs import (
    MERGES,
    byte_level,
    byte_pair_tokenizer,
    letters,
    train_byte_pairs,
    vocabulary_of,
)
from tests.sample_texts import ENGLISH, PIECES, mixed_text, random_texts

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GPT2_FILES = SHARED_DATA / "gpt2"
needs_gpt2 = pytest.mark.skipif(
    not GPT2_FILES.is_dir(), reason="GPT-2's own vocabulary is not in ../shared/data/gpt2"
)

SPECIAL_TOKENS = [END_OF_TEXT, "<|pad|>"]


def reference_ids(reference: ReferenceTokenizer, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]


def our_ids(tokenizer: BytePairTokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


def read(directory: Path) -> BytePairTokenizer:
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, BytePairTokenizer)
    return tokenizer


class Pair:
    """A BPE as the `tokenizers` library has it, and as we read it from the file it wrote."""

    def __init__(self, reference: ReferenceTokenizer, directory: Path) -> None:
        reference.save(str(directory / "tokenizer.json"))
        self.reference = reference
        self.ours = read(directory)
        # Or it would read a spelled-out <|endoftext|> as the special token; ours never does.
        reference.encode_special_tokens = True


@pytest.fixture(
    scope="module",
    params=["256 ids", "300 ids", "1500 ids", "700 ids, special first", "700 ids, special last"],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """BPEs trained on a mixed text, of several sizes, with and without special tokens."""
    size, _, place = str(request.param).partition(" ids")
    first = SPECIAL_TOKENS if "first" in place else []
    reference = train_byte_pairs(mixed_text(0, 3000), int(size), special_tokens=first)
    if "last" in place:
        reference.add_special_tokens(SPECIAL_TOKENS)
    return Pair(reference, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def gpt2() -> BytePairTokenizer:
    """GPT-2's own vocabulary."""
    return read(GPT2_FILES)


@pytest.fixture(scope="module")
def transformers_gpt2() -> GPT2Tokenizer:
    """GPT-2's own vocabulary in transformers."""
    return GPT2Tokenizer(str(GPT2_FILES / "encoder.json"), str(GPT2_FILES / "vocab.bpe"))


# The same ids as others


def test_ids_equal_those_of_the_tokenizers_library_on_texts_of_every_kind(pair: Pair) -> None:
    texts = [*PIECES, *random_texts(seed=1, count=1500), mixed_text(2, 300)]

    assert our_ids(pair.ours, texts) == reference_ids(pair.reference, texts)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80))
def test_ids_equal_those_of_the_tokenizers_library_on_any_text(pair: Pair, text: str) -> None:
    assert pair.ours.encode(text) == reference_ids(pair.reference, [text])[0]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aàs'  \n\t\u00a0\u30001٣!\u0301😀", max_size=30))
def test_ids_equal_where_the_rule_for_splitting_decides(pair: Pair, text: str) -> None:
    assert pair.ours.encode(text) == reference_ids(pair.reference, [text])[0]


@needs_gpt2
def test_gpt2_ids_equal_those_of_transformers(
    gpt2: BytePairTokenizer, transformers_gpt2: GPT2Tokenizer
) -> None:
    texts = [*PIECES, *random_texts(seed=3, count=4000)]

    expected = transformers_gpt2(texts, split_special_tokens=True)["input_ids"]

    assert our_ids(gpt2, texts) == expected


@needs_gpt2
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "stories/peter-pan.txt"])
def test_gpt2_ids_of_a_book_equal_those_of_transformers(
    name: str, gpt2: BytePairTokenizer, transformers_gpt2: GPT2Tokenizer
) -> None:
    file = SHARED_DATA / name
    if not file.is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    text = file.read_text(encoding="utf-8")[:500_000]

    expected = transformers_gpt2(text, split_special_tokens=True)["input_ids"]

    assert gpt2.encode(text) == expected


@needs_gpt2
def test_gpt2_has_the_ids_that_its_authors_gave(gpt2: BytePairTokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.bos_token_id == gpt2.eos_token_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]


@needs_gpt2
def test_gpt2_passes_the_check_that_its_known_merges_are_spared() -> None:
    whole = read_vocabulary(GPT2_FILES)
    *merges, (left, right) = whole.merges
    tokens = {token: i for token, i in whole.tokens.items() if token != left + right}

    Vocabulary(tokens=tokens, merges=merges).check_merges()


def split_probe() -> tuple[ReferenceTokenizer, BytePairTokenizer]:
    """A vocabulary whose ids show what kind of character each of the two takes another for.

    It joins "a", "1" and "!" with any byte that can begin a character; the rule for splitting lets
    it do so only where that character is a letter, a number, or neither and no space.
    """
    begin = [*range(0x80), *range(0xC2, 0xF5)]
    merges = [(first, letters()[byte]) for first in "a1!" for byte in begin]
    vocabulary = vocabulary_of(merges)
    reference = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    return reference, BytePairTokenizer.from_merges(vocabulary, merges, {})


def test_every_character_is_of_the_same_kind_to_both() -> None:
    # tiktoken and tokenizers bring a Unicode table each. With tiktoken 0.14 and tokenizers 0.23
    # they agree everywhere. Should a release know characters that the other does not, only those
    # that Python's table lacks too may differ: nobody has trained on text written in them.
    reference, ours = split_probe()
    # Beyond the first two planes lie ideographs and what is unassigned or private.
    planes = [range(0xD800), range(0xE000, 0x20000), range(0xE0000, 0xE0200)]
    codes = [*(code for plane in planes for code in plane), *range(0x20000, 0x110000, 31)]
    texts = [f"a{c}1{c}!{c}" for c in map(chr, codes)]

    pairs = zip(codes, our_ids(ours, texts), reference_ids(reference, texts), strict=True)

    differing = [code for code, our, their in pairs if our != their]
    known = [hex(code) for code in differing if unicodedata.category(chr(code)) != "Cn"]
    assert not known
    assert len(differing) < 5000


def test_the_probe_tells_the_kinds_of_characters_apart() -> None:
    _, ours = split_probe()

    kinds = {c: [len(ours.encode(first + c)) for first in "a1!"] for c in "b2?\u2003"}

    assert kinds == {"b": [1, 2, 2], "2": [2, 1, 2], "?": [2, 2, 1], "\u2003": [4, 4, 4]}


def test_contractions_end_where_those_of_gpt2_end() -> None:
    # Joined where the rule lets them: an apostrophe with what follows, a letter with an "a" behind.
    characters = "sSdDmMtTlLvVrReE"
    merges = [*(("'", c) for c in characters), *((c, "a") for c in characters)]
    reference = byte_level(models.BPE(vocab=vocabulary_of(merges), merges=merges))
    ours = BytePairTokenizer.from_merges(vocabulary_of(merges), merges, {})
    texts = [f"x'{''.join(parts)}a" for parts in product([*characters, "'", " "], repeat=3)]

    assert our_ids(ours, texts) == reference_ids(reference, texts)


# There and back


def test_text_comes_back_from_its_ids(pair: Pair) -> None:
    texts = [*PIECES, *random_texts(seed=4, count=300)]

    assert [pair.ours.decode(pair.ours.encode(text)) for text in texts] == texts


def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(pair: Pair) -> None:
    text = "".join(random_texts(seed=5, count=100))

    pieces = [pair.ours.token_bytes(token_id) for token_id in pair.ours.encode(text)]

    assert b"".join(pieces) == text.encode()


def test_every_id_has_the_bytes_that_the_tokenizers_library_gives_it(pair: Pair) -> None:
    ids = range(pair.ours.vocab_size)

    ours = [pair.ours.decode([token_id]) for token_id in ids]

    assert ours == [pair.reference.decode([i], skip_special_tokens=False) for i in ids]


def test_text_streamed_token_by_token_is_the_text_decoded_at_once(pair: Pair) -> None:
    ids = random.Random(0).choices(range(pair.ours.vocab_size), k=3000)  # seldom whole UTF-8
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    streamed = [decoder.decode(pair.ours.token_bytes(token_id)) for token_id in ids]

    assert "".join(streamed) + decoder.decode(b"", final=True) == pair.ours.decode(ids)


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    first_byte_of_two = byte_pair_tokenizer().encode("é\u00e8")[1]

    assert byte_pair_tokenizer().decode([first_byte_of_two]) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 268, 2**31, 2**63])
def test_an_id_out_of_the_vocabulary_is_refused(token_id: int) -> None:
    message = f"The token id {token_id} is not in this model's vocabulary of 268 ids."

    with pytest.raises(TokenizerError, match=re.escape(message)):
        byte_pair_tokenizer().decode([1, token_id])


def test_an_id_that_the_vocabulary_skips_stands_for_nothing() -> None:
    tokenizer = BytePairTokenizer.from_merges(vocabulary_of([]), [], {END_OF_TEXT: 299})

    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([65, 270, 66]) == "AB"


# What a text may hold


def test_half_a_surrogate_pair_is_refused() -> None:
    message = (
        "The text has half of a surrogate pair (U+D83D) at character 2: it is not valid Unicode."
    )

    with pytest.raises(TokenizerError, match=re.escape(message)):
        byte_pair_tokenizer().encode("ab\ud83d")


def test_a_special_token_spelled_out_is_just_characters() -> None:
    tokenizer = byte_pair_tokenizer()

    ids = tokenizer.encode(f"a{END_OF_TEXT}b")

    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_an_empty_text_has_no_ids() -> None:
    assert byte_pair_tokenizer().encode("") == []


BLANKS = [" ", "\n", "\u3000", " \n", "\u2028\u2029\x85\x0b"]


# tiktoken's regular expression gives up, and panics, after a million steps back.
@pytest.mark.parametrize("blank", BLANKS)
def test_a_million_blanks_before_a_word_are_encoded(blank: str) -> None:
    text = "a" + blank * (1_100_000 // len(blank)) + "b"

    ids = byte_pair_tokenizer().encode(text)

    assert byte_pair_tokenizer().decode(ids) == text


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("end", ["", "b", " b", "!", "\x1c"])
def test_many_blanks_are_split_as_a_few_are(blank: str, end: str, pair: Pair) -> None:
    text = "a" + blank * (100_002 // len(blank)) + end

    assert pair.ours.encode(text + text) == reference_ids(pair.reference, [text + text])[0]


# What the vocabulary may hold


@pytest.fixture(scope="module")
def ascii_tokenizer() -> BytePairTokenizer:
    """A BPE that knows printable ASCII alone, and an added token with another character."""
    characters = [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = Vocabulary(
        tokens=vocabulary_of([("h", "e")], characters), merges=[("h", "e")], added={"<é>": 99}
    )
    return BytePairTokenizer(vocabulary)


def test_a_vocabulary_that_lacks_bytes_encodes_what_it_has(
    ascii_tokenizer: BytePairTokenizer,
) -> None:
    ids = ascii_tokenizer.encode("the<é>")

    assert [ascii_tokenizer.token_bytes(token_id) for token_id in ids] == [
        b"t",
        b"he",
        "<é>".encode(),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("thé", r"'é' (U+00E9) at position 2"),
        ("<é>he é", r"' ' (U+0020) at position 5"),
        ("he\0", r"'\x00' (U+0000) at position 2"),
        ("😀", r"'😀' (U+1F600) at position 0"),
    ],
)
def test_a_byte_that_the_vocabulary_lacks_is_refused_by_its_character(
    text: str, shown: str, ascii_tokenizer: BytePairTokenizer
) -> None:
    message = f"The character {shown} is not in this model's vocabulary of 100 tokens."

    with pytest.raises(TokenizerError, match=re.escape(message)):
        ascii_tokenizer.encode(text)


def test_a_bpe_trained_without_the_whole_alphabet_agrees_on_what_it_covers(tmp_path: Path) -> None:
    pair = Pair(train_byte_pairs(ENGLISH, 200, alphabet=False), tmp_path)

    assert pair.ours.encode(ENGLISH) == reference_ids(pair.reference, [ENGLISH])[0]


ADDED_TEXTS = [
    "<x>", "a<x>b", "a <x> b", "<x><x>", "<xy>", "<x", "<xyz>", "q r", "q  r", "aq rb", "<|pad|>",
    "the<x>the", " <x>  the", "<x>\n\n<x>", "é<x>é", "<x> ", " the  <xy>'s",
]  # fmt: skip


def test_added_tokens_are_found_in_a_text_as_the_tokenizers_library_finds_them(
    tmp_path: Path,
) -> None:
    reference = byte_level(models.BPE(vocab=vocabulary_of(MERGES), merges=MERGES))
    # One begins like another, one has a space in it; the special one is never read from text.
    reference.add_tokens([AddedToken(text) for text in ("<x", "<xyz>", "<x>", "<xy", "q r")])
    reference.add_special_tokens(["<|pad|>"])
    pair = Pair(reference, tmp_path)
    texts = [*ADDED_TEXTS, *("".join(parts) for parts in product(ADDED_TEXTS, repeat=2))]

    assert our_ids(pair.ours, texts) == reference_ids(pair.reference, texts)


def test_of_two_added_tokens_that_begin_alike_the_longer_is_found() -> None:
    vocabulary = Vocabulary(tokens=vocabulary_of([]), merges=[], added={"<x": 256, "<x>": 257})

    assert BytePairTokenizer(vocabulary).encode("<x><x") == [257, 256]


# Merging by rank, as tiktoken does, and merging by pairs, as the files say


def random_vocabulary(seed: int) -> Vocabulary:
    chance = random.Random(seed)
    tokens, merges = {"a": 0, "b": 1}, []
    for _ in range(chance.randint(2, 8)):
        left, right = chance.choices(list(tokens), k=2)
        if left + right not in tokens and len(left + right) <= 8:
            tokens[left + right] = len(tokens)
            merges.append((left, right))
    return Vocabulary(tokens=tokens, merges=merges)


def is_refused(vocabulary: Vocabulary) -> bool:
    try:
        vocabulary.check_merges()
    except TokenizerError:
        return True
    return False


def test_a_vocabulary_is_refused_exactly_when_ranks_and_pairs_disagree() -> None:
    texts = ["".join(parts) for length in range(1, 10) for parts in product("ab", repeat=length)]
    verdicts = []

    for seed in range(150):
        vocabulary = random_vocabulary(seed)
        by_rank = our_ids(BytePairTokenizer(vocabulary), texts)
        pairs = byte_level(models.BPE(vocab=dict(vocabulary.tokens), merges=vocabulary.merges))
        verdicts.append((is_refused(vocabulary), by_rank != reference_ids(pairs, texts)))

    assert all(refused == differs for refused, differs in verdicts)
    assert 30 < sum(refused for refused, _ in verdicts) < 120


def test_an_ambiguous_vocabulary_is_refused_with_the_token_and_its_two_readings() -> None:
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    message = (
        "The vocabulary is ambiguous: the token 'abc' is listed as 'ab' + 'c', and its bytes merge "
        "as 'a' + 'bc'."
    )

    with pytest.raises(TokenizerError, match=re.escape(message)):
        BytePairTokenizer.from_merges(vocabulary_of(merges), merges, {})


# Writing


def test_what_is_written_is_read_as_the_same_vocabulary(pair: Pair, tmp_path: Path) -> None:
    texts = [*PIECES, *random_texts(seed=6, count=100)]

    pair.ours.write(tmp_path)

    again = read(tmp_path)
    assert again.fingerprint == pair.ours.fingerprint
    assert again.eos_token_id == pair.ours.eos_token_id
    assert our_ids(again, texts) == our_ids(pair.ours, texts)


def test_transformers_reads_what_is_written(pair: Pair, tmp_path: Path) -> None:
    texts = [*PIECES, *random_texts(seed=7, count=100)]

    pair.ours.write(tmp_path)

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts, split_special_tokens=True)["input_ids"] == our_ids(pair.ours, texts)
    assert len(theirs) == pair.ours.vocab_size
    assert theirs.eos_token_id == pair.ours.eos_token_id


def test_we_read_what_transformers_writes(pair: Pair, tmp_path: Path) -> None:
    pair.ours.write(tmp_path / "..")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "..")
    theirs.add_tokens(["<x>", "<xy>"])

    theirs.save_pretrained(tmp_path)

    ours = read(tmp_path)
    texts = [*ADDED_TEXTS, *PIECES]
    assert our_ids(ours, texts) == theirs(texts, split_special_tokens=True)["input_ids"]


def test_added_tokens_survive_being_written(tmp_path: Path) -> None:
    vocabulary = Vocabulary(
        tokens=vocabulary_of(MERGES), merges=MERGES, special={END_OF_TEXT: 267}, added={"<é>": 270}
    )

    BytePairTokenizer(vocabulary).write(tmp_path)

    assert read(tmp_path).encode("a<é>b") == [97, 270, 98]
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a<é>b") == [97, 270, 98]


def test_the_fingerprint_tells_vocabularies_apart() -> None:
    tokenizers = [
        byte_pair_tokenizer(),
        BytePairTokenizer.from_merges(vocabulary_of(MERGES), MERGES, {}),
        BytePairTokenizer.from_merges(vocabulary_of(MERGES), MERGES, {"<|endoftexu|>": 267}),
        BytePairTokenizer.from_merges(vocabulary_of(MERGES), MERGES, {END_OF_TEXT: 268}),
        BytePairTokenizer.from_merges(vocabulary_of(MERGES[:-1]), MERGES[:-1], {END_OF_TEXT: 267}),
    ]

    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_the_fingerprint_is_that_of_the_vocabulary_and_not_of_the_object() -> None:
    assert byte_pair_tokenizer().fingerprint == byte_pair_tokenizer().fingerprint


# Characters


def test_characters_have_ids_in_the_order_of_code_points() -> None:
    tokenizer = CharacterTokenizer.from_text("hélla\n😀")

    assert tokenizer.encode("\nahélla😀"[:1] + "a") == [0, 1]
    assert tokenizer.decode(range(tokenizer.vocab_size)) == "\nahlé😀"


def test_characters_come_back_from_their_ids() -> None:
    tokenizer = CharacterTokenizer.from_text("".join(PIECES))

    assert all(tokenizer.decode(tokenizer.encode(piece)) == piece for piece in PIECES)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("abxc", "'x' (U+0078) at position 2"),
        ("ab\n", r"'\n' (U+000A) at position 2"),
        ("😀", "'😀' (U+1F600) at position 0"),
        ("\ud83d", r"'\ud83d' (U+D83D) at position 0"),
    ],
)
def test_an_unknown_character_is_refused_and_shown(text: str, shown: str) -> None:
    message = f"The character {shown} is not in this model's vocabulary of 3 characters."

    with pytest.raises(TokenizerError, match=re.escape(message)):
        CharacterTokenizer.from_text("abc").encode(text)


@pytest.mark.parametrize("token_id", [-1, 3])
def test_an_id_beyond_the_characters_is_refused(token_id: int) -> None:
    message = f"The token id {token_id} is not in this model's vocabulary of 3 ids."

    with pytest.raises(TokenizerError, match=re.escape(message)):
        CharacterTokenizer.from_text("abc").decode([token_id])


def test_a_character_model_starts_from_a_newline_if_it_has_one() -> None:
    assert CharacterTokenizer.from_text("ab\n").bos_token_id == 0
    assert CharacterTokenizer.from_text("ab").bos_token_id is None


def test_characters_survive_being_written(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer.from_text("".join(PIECES))

    tokenizer.write(tmp_path)

    again = load_tokenizer(tmp_path)
    assert again.kind == "characters"
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(PIECES[0]) == tokenizer.encode(PIECES[0])
