"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

STORYTELLER = Path(__file__).resolve().parent.parent / "weights" / "storyteller"

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="KVIK_MODEL",
        help="A checkpoint directory, or a name such as openai-community/gpt2.",
        show_default="the storyteller",
    ),
]
DeviceOption = Annotated[str, typer.Option(envvar="KVIK_DEVICE", help="auto, cpu, cuda or cuda:N.")]
KVCacheDtypeOption = Annotated[
    str,
    typer.Option(
        envvar="KVIK_KV_CACHE_DTYPE",
        help="auto (as the model computes), float32, bfloat16, int8 (on a CPU), float8 (on CUDA).",
    ),
]
SameBytesOption = Annotated[
    bool,
    typer.Option(
        envvar="KVIK_SAME_BYTES",
        help="On CUDA: the same request gives the same bytes whatever runs beside it.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(envvar="KVIK_DTYPE", help="auto, float32, bfloat16 or int8.")
]
