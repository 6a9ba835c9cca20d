import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models
from transformers import AutoTokenizer

from model.tokenizer import BytePairTokenizer, CharacterTokenizer, load_tokenizer
from model.vocabulary import END_OF_TEXT, TokenizerError, byte_alphabet
from tests.byte_pairs import MERGES, byte_level, byte_pair_tokenizer, vocabulary_of
from tests.json_documents import VALUES, mutations, nested, write_json


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A directory with vocab.json, merges.txt and tokenizer_config.json."""
    byte_pair_tokenizer().write(tmp_path)
    return tmp_path


def tokenizer_json() -> dict[str, Any]:
    """The same vocabulary as the `tokenizers` library writes it."""
    reference = byte_level(models.BPE(vocab=vocabulary_of(MERGES), merges=MERGES))
    reference.add_special_tokens([END_OF_TEXT])
    document: dict[str, Any] = json.loads(reference.to_str())
    return document


def refusal(directory: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(directory)
    return str(caught.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    write_json(path, document)


# The alphabet


def test_the_alphabet_has_a_printable_character_for_every_byte() -> None:
    alphabet = byte_alphabet()

    assert sorted(alphabet.values()) == list(range(256))
    assert all(character.isprintable() and not character.isspace() for character in alphabet)


@pytest.mark.parametrize(
    ("character", "byte"), [("A", 65), ("Ġ", 32), ("Ċ", 10), ("ĉ", 9), ("ÿ", 255)]
)
def test_the_alphabet_is_that_of_gpt2(character: str, byte: int) -> None:
    assert byte_alphabet()[character] == byte


# Which files are read


def test_vocab_json_and_encoder_json_are_two_names_of_one_file(pair: Path) -> None:
    before = load_tokenizer(pair)
    (pair / "vocab.json").rename(pair / "encoder.json")
    (pair / "merges.txt").rename(pair / "vocab.bpe")

    assert load_tokenizer(pair).fingerprint == before.fingerprint


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())

    assert load_tokenizer(tmp_path).fingerprint == byte_pair_tokenizer().fingerprint


def test_characters_json_goes_before_all_others(pair: Path) -> None:
    CharacterTokenizer.from_text("abc").write(pair)

    assert load_tokenizer(pair).kind == "characters"


def test_merges_may_be_strings_as_older_files_have_them(tmp_path: Path) -> None:
    document = tokenizer_json()
    document["model"]["merges"] = [" ".join(merge) for merge in MERGES]
    write_json(tmp_path / "tokenizer.json", document)

    assert load_tokenizer(tmp_path).encode(" the") == [258]


def test_merges_may_end_their_lines_as_windows_does(pair: Path) -> None:
    text = (pair / "merges.txt").read_bytes()
    (pair / "merges.txt").write_bytes(text.replace(b"\n", b"\r\n"))

    assert load_tokenizer(pair).encode(" the") == [258]


def test_merges_may_lack_their_version_and_begin_with_a_number_sign(tmp_path: Path) -> None:
    merges = [("#", "!"), ("#", "#")]
    write_json(tmp_path / "vocab.json", vocabulary_of(merges))
    (tmp_path / "merges.txt").write_text("# !\n# #\n", encoding="utf-8")

    assert load_tokenizer(tmp_path).encode("#!a##") == [256, 97, 257]


def test_a_template_that_adds_nothing_passes(tmp_path: Path) -> None:
    document = tokenizer_json()
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    }
    write_json(tmp_path / "tokenizer.json", document)

    assert load_tokenizer(tmp_path).vocab_size == 268


def test_a_byte_that_is_called_special_stays_what_text_spells(tmp_path: Path) -> None:
    document = tokenizer_json()
    document["added_tokens"].append({"id": 124, "content": "|", "special": True})
    write_json(tmp_path / "tokenizer.json", document)

    assert load_tokenizer(tmp_path).encode("a|b") == [97, 124, 98]


OLD_FILES = {
    "added_tokens.json": {"<x>": 268, "<|pad|>": 269, "<extra>": 270, "<list>": 271},
    "special_tokens_map.json": {
        "pad_token": {"content": "<|pad|>", "lstrip": False},
        "bos_token": END_OF_TEXT,
        "additional_special_tokens": ["<list>"],
    },
    "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
}


def test_added_tokens_of_an_older_checkpoint_are_read_as_transformers_reads_them(
    pair: Path,
) -> None:
    for name, document in OLD_FILES.items():
        write_json(pair / name, document)
    texts = ["a<x>b", "a<|pad|>b", "<extra> <", f"{END_OF_TEXT}x"]

    tokenizer = load_tokenizer(pair)

    theirs = AutoTokenizer.from_pretrained(pair)
    expected = theirs(texts, split_special_tokens=True)["input_ids"]
    assert [tokenizer.encode(text) for text in texts] == expected


def test_what_an_older_checkpoint_names_as_special_is_never_read_from_text(pair: Path) -> None:
    for name, document in OLD_FILES.items():
        write_json(pair / name, document)

    tokenizer = load_tokenizer(pair)

    assert not {267, 269, 271} & {*tokenizer.encode(f"<|pad|> <list> {END_OF_TEXT}")}
    assert tokenizer.decode([269, 271]) == "<|pad|><list>"


# Which files are refused


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no tokenizer: expected vocab.json and merges.txt, encoder.json and "
        "vocab.bpe, tokenizer.json, or characters.json."
    )


FILES = ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json", "characters.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_dangling_link_is_refused(name: str, pair: Path) -> None:
    (pair / name).unlink(missing_ok=True)
    (pair / name).symlink_to("nowhere")

    assert refusal(pair) == f"{pair / name} is a dangling link."


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused_and_not_opened(name: str, pair: Path) -> None:
    (pair / name).unlink(missing_ok=True)
    os.mkfifo(pair / name)

    assert refusal(pair) == f"{pair / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file_is_refused(name: str, pair: Path) -> None:
    (pair / name).unlink(missing_ok=True)
    (pair / name).mkdir()

    assert refusal(pair) == f"{pair / name} is not a regular file."


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_utf8_is_refused(name: str, pair: Path) -> None:
    (pair / name).write_bytes(b'{"a\xff": 0}')

    assert refusal(pair) == f"{pair / name} is not UTF-8 text: byte 3 does not fit."


@pytest.mark.parametrize("name", FILES)
def test_a_file_larger_than_any_vocabulary_is_refused(name: str, pair: Path) -> None:
    with (pair / name).open("w") as stream:
        stream.truncate(2**26 + 1)  # a hole: takes no space

    expected = f"{pair / name} has 67108865 bytes; at most 67108864 are expected."
    assert refusal(pair) == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="/proc/self/mem is Linux's")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused(name: str, pair: Path) -> None:
    (pair / name).unlink(missing_ok=True)
    (pair / name).symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read

    assert refusal(pair) == f"{pair / name} cannot be read: Input/output error."


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("json")])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not valid JSON: Expecting property name enclosed in double quotes"),
        ("", "is not valid JSON: Expecting value"),
        (nested(100_000), "is not valid JSON: maximum recursion depth exceeded"),
        ("1" * 5000, "is not valid JSON: Exceeds the limit"),
        ("[1]", "must hold a JSON object, found list."),
        ("null", "must hold a JSON object, found NoneType."),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    name: str, text: str, reason: str, pair: Path
) -> None:
    (pair / name).write_text(text, encoding="utf-8")

    assert refusal(pair).startswith(f"{pair / name} {reason}")


def test_a_vocabulary_without_its_merges_is_refused(pair: Path) -> None:
    (pair / "merges.txt").unlink()

    expected = f"{pair / 'merges.txt'} is missing (No such file or directory)."
    assert refusal(pair) == expected


@pytest.mark.parametrize("line", ["onlyone", "a b c", "a  b", " b", "a ", " "])
def test_a_line_of_merges_that_is_no_pair_is_refused(line: str, pair: Path) -> None:
    with (pair / "merges.txt").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")

    expected = f"{pair / 'merges.txt'}, line 13: expected two tokens, found {line!r}."
    assert refusal(pair) == expected


# What in vocab.json, merges.txt and tokenizer_config.json is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": True}, "The vocabulary has an id that is not a whole number from 0 on."),
        ({"a": 1.0}, "The vocabulary has an id that is not a whole number from 0 on."),
        ({"a": "97"}, "The vocabulary has an id that is not a whole number from 0 on."),
        ({"a": -1}, "The vocabulary has an id that is not a whole number from 0 on."),
        ({"a": None}, "The vocabulary has an id that is not a whole number from 0 on."),
        ({"a": 2**20}, "The vocabulary has the id 1048576; ids beyond 1048575 are not supported."),
        ({"a": 98}, "The vocabulary gives one id to two tokens."),
        ({"<pad>": 98}, "The vocabulary gives one id to two tokens."),
        ({"": 300}, "The added token '' is not text."),
        ({"\ud800": 300}, r"The added token '\ud800' is not text."),
        ({"Ġt": 300}, "The merge 'h' 'e' makes id 257 after id 300: merges must be listed in the "
                      "order of the ids they make."),
    ],
)  # fmt: skip
def test_ids_that_do_not_fit_together_are_refused(
    change: dict[str, Any], message: str, pair: Path
) -> None:
    edit(pair / "vocab.json", lambda document: document.update(change))

    assert refusal(pair) == f"{pair / 'vocab.json'}: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q q", "The merge 'q' 'q' needs a token that is not in the vocabulary."),
        ("zz z", "The merge 'zz' 'z' needs a token that is not in the vocabulary."),
        ("h e", "The merge 'h' 'e' makes id 257 after id 266: merges must be listed in the order "
                "of the ids they make."),
        ("▁ a", "The merge '▁' 'a' is not written in GPT-2's byte alphabet: this is not a "
                "byte-level BPE."),
    ],
)  # fmt: skip
def test_a_merge_that_does_not_fit_is_refused(line: str, message: str, pair: Path) -> None:
    with (pair / "merges.txt").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")

    assert refusal(pair) == f"{pair / 'vocab.json'}: {message}"


def test_a_token_longer_than_any_is_refused(pair: Path) -> None:
    names = ["a" * 2**power for power in range(12)]
    edit(
        pair / "vocab.json",
        lambda document: document.update({name: 300 + i for i, name in enumerate(names) if i}),
    )
    with (pair / "merges.txt").open("a", encoding="utf-8") as stream:
        stream.writelines(f"{name} {name}\n" for name in names[:-1])

    assert refusal(pair).endswith("has 2048 bytes; at most 1024 are supported.")


@pytest.mark.parametrize("option", ["add_prefix_space", "add_bos_token", "add_eos_token"])
def test_an_option_that_changes_the_ids_is_refused(option: str, pair: Path) -> None:
    edit(pair / "tokenizer_config.json", lambda document: document.update({option: True}))

    expected = f"{pair / 'tokenizer_config.json'} asks for {option}, which is not supported."
    assert refusal(pair) == expected


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_eats_its_surroundings_is_refused(option: str, pair: Path) -> None:
    entry = {"content": "<x>", option: True}
    edit(
        pair / "tokenizer_config.json",
        lambda document: document["added_tokens_decoder"].update({"268": entry}),
    )

    assert refusal(pair) == (
        f"{pair / 'tokenizer_config.json'} adds the token '<x>' with {option}, which is not "
        "supported."
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"268": {"content": "he"}}, "The token 'he' is added as 268 and listed as 257 too."),
        ({"257": {"content": "he"}}, "The token 'he' is added as 257 and listed as 257 too."),
        ({"268": {"content": END_OF_TEXT, "special": True}},
         "The token '<|endoftext|>' is added as 268 and listed as 267 too."),
        ({"268": {"content": ""}}, "The added token '' is not text."),
        ({"268": {"content": 7}}, "The added token 7 is not text."),
        ({"97": {"content": "<x>"}}, "The vocabulary gives one id to two tokens."),
    ],
)  # fmt: skip
def test_an_added_token_that_does_not_fit_is_refused(
    entry: dict[str, Any], message: str, pair: Path
) -> None:
    edit(
        pair / "tokenizer_config.json", lambda document: document.update(added_tokens_decoder=entry)
    )

    assert refusal(pair) == f"{pair / 'vocab.json'}: {message}"


def test_entries_of_another_build_are_refused_as_such(pair: Path) -> None:
    edit(
        pair / "tokenizer_config.json",
        lambda document: document.update(added_tokens_decoder={"268": {"text": "<x>"}}),
    )

    assert refusal(pair) == f"{pair / 'vocab.json'} is not built as expected: KeyError('content')."


def test_a_token_that_no_merge_makes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="No merge makes the token 'zz' of the vocabulary"):
        BytePairTokenizer.from_merges({**vocabulary_of([]), "zz": 256}, [], {})


def test_a_name_in_two_places_is_refused() -> None:
    with pytest.raises(TokenizerError, match="The vocabulary lists a token twice"):
        BytePairTokenizer.from_merges(vocabulary_of([]), [], {"a": 256})


# What in tokenizer.json is refused


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model", None, "has no vocabulary under model.vocab."),
        ("model.vocab", [], "has no vocabulary under model.vocab."),
        ("model.type", "Unigram", "is a 'Unigram' tokenizer; only byte-level BPE is supported."),
        ("model.type", "WordPiece",
         "is a 'WordPiece' tokenizer; only byte-level BPE is supported."),
        ("model.dropout", 0.1, "sets model.dropout to 0.1, which is not supported."),
        ("model.unk_token", "<unk>", "sets model.unk_token to '<unk>', which is not supported."),
        ("model.continuing_subword_prefix", "##",
         "sets model.continuing_subword_prefix to '##', which is not supported."),
        ("model.end_of_word_suffix", "</w>",
         "sets model.end_of_word_suffix to '</w>', which is not supported."),
        ("model.byte_fallback", True, "sets model.byte_fallback to True, which is not supported."),
        ("model.ignore_merges", True, "sets model.ignore_merges to True, which is not supported."),
        ("model.merges", [["a"]], "has a merge that is not a pair of tokens."),
        ("model.merges", ["a b c"], "has a merge that is not a pair of tokens."),
        ("normalizer", {"type": "NFC"}, "has a 'NFC' normalizer, which is not supported."),
        ("pre_tokenizer", None, "splits text by None; only GPT-2's ByteLevel is supported."),
        ("pre_tokenizer", {"type": "Metaspace"},
         "splits text by 'Metaspace'; only GPT-2's ByteLevel is supported."),
        ("pre_tokenizer.use_regex", False,
         "splits text by 'ByteLevel'; only GPT-2's ByteLevel is supported."),
        ("pre_tokenizer.add_prefix_space", True,
         "asks for add_prefix_space, which is not supported."),
        ("post_processor", {"type": "RobertaProcessing"},
         "adds tokens by a 'RobertaProcessing' post-processor, which is not supported."),
        ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]},
         "adds tokens by a 'TemplateProcessing' post-processor, which is not supported."),
    ],
)  # fmt: skip
def test_what_gpt2_does_not_do_is_refused_by_name(
    place: str, value: Any, message: str, tmp_path: Path
) -> None:
    document = tokenizer_json()
    *path, last = place.split(".")
    container = document
    for name in path:
        container = container[name]
    container[last] = value
    write_json(tmp_path / "tokenizer.json", document)

    assert refusal(tmp_path) == f"{tmp_path / 'tokenizer.json'} {message}"


def test_an_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    document = tokenizer_json()
    document["model"] |= {"vocab": {}, "merges": []}
    document["added_tokens"] = []
    write_json(tmp_path / "tokenizer.json", document)

    assert refusal(tmp_path) == f"{tmp_path / 'tokenizer.json'}: The vocabulary is empty."


def test_a_prefix_space_asked_for_beside_tokenizer_json_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": True})

    expected = (
        f"{tmp_path / 'tokenizer_config.json'} asks for add_prefix_space, which is not supported."
    )
    assert refusal(tmp_path) == expected


# What in characters.json is refused


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, ": A character vocabulary needs at least one character."),
        ({"a": 1}, " must number its 1 characters from 0 on, each number once."),
        ({"a": 0, "b": 0}, " must number its 2 characters from 0 on, each number once."),
        ({"a": 0, "b": "1"}, " must number its 2 characters from 0 on, each number once."),
        ({"a": 0, "b": [1]}, " must number its 2 characters from 0 on, each number once."),
        ({"ab": 0}, ": 'ab' in a character vocabulary is no character."),
        ({"": 0}, ": '' in a character vocabulary is no character."),
        ({"\ud800": 0}, ": The text has half of a surrogate pair (U+D800) at character 0: it is "
                        "not valid Unicode."),
    ],
)  # fmt: skip
def test_characters_that_do_not_fit_are_refused(
    document: Any, message: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "characters.json", document)

    assert refusal(tmp_path) == f"{tmp_path / 'characters.json'}{message}"


def test_a_character_listed_twice_is_refused() -> None:
    with pytest.raises(TokenizerError, match="A character vocabulary lists a character twice"):
        CharacterTokenizer("aba")


# Anything at all

PAIR_DOCUMENTS = {
    "vocab.json": {"a": 0, "b": 1, "ab": 2, END_OF_TEXT: 3},
    "tokenizer_config.json": {
        "add_prefix_space": False,
        "pad_token": "<pad>",
        "added_tokens_decoder": {"4": {"content": "<x>", "special": False, "lstrip": False}},
    },
    "added_tokens.json": {"<y>": 5},
    "special_tokens_map.json": {
        "bos_token": {"content": "<y>"},
        "additional_special_tokens": ["a"],
    },
}


def load_or_refuse(directory: Path) -> None:
    """Load the tokenizer, and use it: no error but TokenizerError may come out of either."""
    try:
        tokenizer = load_tokenizer(directory)
        tokenizer.decode(tokenizer.encode("ab<x>ab"))
    except TokenizerError as error:
        str(error).encode()


no_health_check = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", PAIR_DOCUMENTS)
@no_health_check
@given(data=st.data())
def test_any_json_beside_merges_loads_or_is_refused(
    name: str, data: st.DataObject, tmp_path: Path
) -> None:
    for other, document in PAIR_DOCUMENTS.items():
        write_json(tmp_path / other, document)
    (tmp_path / "merges.txt").write_text("a b\n", encoding="utf-8")
    write_json(tmp_path / name, data.draw(mutations(PAIR_DOCUMENTS[name]) | VALUES))

    load_or_refuse(tmp_path)


SMALL_TOKENIZER_JSON = {
    "added_tokens": [{"id": 3, "content": "<x>", "special": False, "lstrip": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]},
    "model": {"type": "BPE", "dropout": None, "vocab": {"a": 0, "b": 1, "ab": 2},
              "merges": [["a", "b"]]},
}  # fmt: skip


@no_health_check
@given(document=mutations(SMALL_TOKENIZER_JSON) | VALUES)
def test_any_tokenizer_json_loads_or_is_refused(document: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", document)

    load_or_refuse(tmp_path)


@no_health_check
@given(document=mutations({"a": 0, "b": 1, "<": 2, "x": 3, ">": 4}) | VALUES)
def test_any_characters_json_loads_or_is_refused(document: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "characters.json", document)

    load_or_refuse(tmp_path)


@no_health_check
@given(text=st.text(alphabet="ab #Ġ\n\r▁", max_size=12) | st.text(max_size=12))
def test_any_merges_load_or_are_refused(text: str, tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", PAIR_DOCUMENTS["vocab.json"])
    (tmp_path / "merges.txt").write_bytes(text.encode())

    load_or_refuse(tmp_path)
