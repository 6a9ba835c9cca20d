import re
from pathlib import Path

import pytest

from training.config import KEYS, NANOGPT_NAMES, PRESETS, RESUMABLE_KEYS, TrainingConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", KEYS)
def test_page_has_every_key_with_its_default(key: str) -> None:
    value = getattr(TrainingConfig(), key)
    default = str(value).lower() if isinstance(value, bool) else str(value)

    assert f"| `{key}` | {default} | " in PAGE


@pytest.mark.parametrize("preset", PRESETS)
def test_page_has_every_preset(preset: str) -> None:
    assert f"| `{preset}` | " in PAGE


def test_page_has_nanogpts_names_and_what_they_are_here() -> None:
    table = PAGE.partition("| nanoGPT says | here |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    theirs = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]

    assert sorted(theirs) == sorted(NANOGPT_NAMES)
    for name in theirs:
        (ours,) = (row[1] for row in rows if f"`{name}`" in row[0])
        words = set(NANOGPT_NAMES[name].split()) - {"or", "with"}
        assert all(f"`{word}`" in ours for word in words)


def test_every_resumable_key_is_a_key() -> None:
    assert set(RESUMABLE_KEYS) <= set(KEYS)
