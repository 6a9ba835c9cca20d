from pathlib import Path

import pytest
import torch

from tests.training.tiny import begin
from training.config import PRESETS, resolve
from training.errors import ConfigError
from training.machine import resolve_machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_absent_device_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device is available here; use cpu"):
        begin(tmp_path / "run", data, device="cuda")


@pytest.mark.parametrize("name", PRESETS)
def test_machine_of_every_preset_is_decided(name: str) -> None:
    config = resolve_machine(resolve([PRESETS[name]]))

    assert config.device in ("cpu", "cuda")
    assert config.precision in ("float32", "bfloat16")
