"""nanoGPT's ckpt.pt: what its training script saves, names and habits included."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import Activation, GPTConfig
from weights.convert.foreign import (
    ForeignCheckpoint,
    check_size,
    check_tensors,
    clean_names,
    describe,
)
from weights.errors import CheckpointError

META_FILE = "meta.pkl"
_NUMBERS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_KNOWN = {*_NUMBERS, "bias", "dropout"}


def is_nanogpt(content: Any) -> bool:
    """Whether what torch.load gave is a checkpoint of nanoGPT's train.py."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def read_nanogpt(
    path: Path, content: Mapping[str, Any], activation: Activation | None
) -> ForeignCheckpoint:
    """Take a nanoGPT checkpoint apart.

    Args:
        path: the file.
        content: what was read from it.
        activation: of the MLP, if the user knows better. nanoGPT computed gelu_new until May 2023
            and gelu since, and says neither in its files.

    Raises:
        CheckpointError: it is not whole, or of another architecture.
    """
    arguments = content["model_args"]
    if not isinstance(arguments, dict) or not isinstance(content["model"], dict):
        raise CheckpointError(f"{path}: model_args and model must be dicts, as nanoGPT saves them.")
    unknown = sorted(map(str, arguments.keys() - _KNOWN))
    if unknown:
        raise CheckpointError(
            f"{path} has model_args that nanoGPT does not: {', '.join(unknown)[:200]}. A fork with "
            "another architecture cannot be converted. If they change nothing that is computed, "
            "remove them and save the file again."
        )
    num_bytes = path.stat().st_size
    tensors, changed = clean_names(path, content["model"], num_bytes)
    is_old = "bias" not in arguments  # before 27 January 2023: biases and gelu_new, always
    if activation is None:
        activation = "gelu_new" if is_old else "gelu"
    config = _config(path, arguments, activation)
    check_size(path, config, num_bytes)
    check_tensors(path, config, tensors)
    changed.append(
        f"activation {activation}: nanoGPT's files do not say, and yours is from before it could "
        "switch biases off"
        if is_old
        else f"activation {activation}: nanoGPT's files do not say; it has computed gelu since "
        "17 May 2023, and a model trained before that needs --activation gelu_new"
    )
    changed.append(f"block_size is called n_ctx here: {config.n_ctx}")
    if "optimizer" in content:
        changed.append("left the optimizer's state behind")
    settings = content.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    if not isinstance(dataset, str) or Path(dataset).is_absolute() or ".." in Path(dataset).parts:
        dataset = None
    return ForeignCheckpoint(
        path=path,
        config=config,
        tensors=tensors,
        found=[
            f"{path}: a nanoGPT checkpoint{_progress(content)}",
            describe(config, tensors["wte.weight"].dtype),
        ],
        changed=changed,
        meta_files=_meta_files(path, dataset),
        tokenizer_places=[path.absolute().parent],
        dataset=dataset,
    )


def _config(path: Path, arguments: Mapping[str, Any], activation: Activation) -> GPTConfig:
    for name in _NUMBERS:
        if type(arguments.get(name)) is not int:
            raise CheckpointError(f"{path}: model_args must give {name} as a whole number.")
    bias, dropout = arguments.get("bias", True), arguments.get("dropout", 0.0)
    if type(bias) is not bool or type(dropout) not in (int, float):
        raise CheckpointError(f"{path}: model_args must give bias as a truth, dropout as a number.")
    try:
        return GPTConfig(
            n_layer=arguments["n_layer"],
            n_head=arguments["n_head"],
            n_embd=arguments["n_embd"],
            n_ctx=arguments["block_size"],
            vocab_size=arguments["vocab_size"],
            activation=activation,
            bias=bias,
            dropout=dropout,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: model_args are impossible: {error}.") from error


def _progress(content: Mapping[str, Any]) -> str:
    parts = []
    if type(content.get("iter_num")) is int:
        parts.append(f"step {content['iter_num']}")
    loss = content.get("best_val_loss")
    if isinstance(loss, (float, Tensor)) and (isinstance(loss, float) or loss.numel() == 1):
        parts.append(f"best validation loss {float(loss):.4f}")
    return f", {', '.join(parts)}" if parts else ""


def _meta_files(path: Path, dataset: str | None) -> list[Path]:
    """Where the characters may lie: beside the checkpoint, or in nanoGPT's data/DATASET.

    nanoGPT writes out-NAME/ckpt.pt and data/DATASET/meta.pkl under one root, and is run from it.
    """
    places = [path.absolute().parent]
    if dataset is not None:
        roots = (*path.absolute().parents[:3], Path.cwd())
        places += [root / "data" / dataset for root in roots]
    return list(dict.fromkeys(place / META_FILE for place in places))
