from pathlib import Path

from model.tokenizer import BytePairTokenizer, CharacterTokenizer
from model.vocabulary import END_OF_TEXT
from server.served_model import ServedModel
from tests.byte_pairs import MERGES, vocabulary_of
from tests.tiny_models import tiny_checkpoint


def test_every_special_token_is_left_out_of_the_text(tmp_path: Path) -> None:
    special = {END_OF_TEXT: 267, "<|pad|>": 268, "<|user|>": 270}
    tokenizer = BytePairTokenizer.from_merges(vocabulary_of(MERGES), MERGES, special)
    tiny_checkpoint(tmp_path / "tiny", tokenizer=tokenizer)

    assert ServedModel.read(tmp_path / "tiny").special_token_ids == {267, 268, 270}


def test_no_character_is_special_where_a_text_starts_from_one(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "tiny", tokenizer=CharacterTokenizer("\nab"))

    model = ServedModel.read(tmp_path / "tiny")

    assert (model.bos_token_id, model.special_token_ids) == (0, frozenset())
