from pathlib import Path

import pytest

from training.config import KEYS, PRESETS, RESUMABLE_KEYS, TrainingConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", KEYS)
def test_page_has_every_key_with_its_default(key: str) -> None:
    value = getattr(TrainingConfig(), key)
    default = str(value).lower() if isinstance(value, bool) else str(value)

    assert f"| `{key}` | {default} | " in PAGE


@pytest.mark.parametrize("preset", PRESETS)
def test_page_has_every_preset(preset: str) -> None:
    assert f"| `{preset}` | " in PAGE


def test_every_resumable_key_is_a_key() -> None:
    assert set(RESUMABLE_KEYS) <= set(KEYS)
