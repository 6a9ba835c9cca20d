"""Hugging Face's config for GPT-2, into our terms and back; knows no tensors and opens no file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from model.config import Activation, GPTConfig
from model.files import shown
from weights.errors import CheckpointError

_MAX_LAYERS = 320  # nearly as many tensors as a header may list; GPT-2's largest has 48
_GPT2_END_OF_TEXT = 50256  # what transformers assumes for bos and eos where nobody says

# Fields of a config that change the computation, with the one value that we compute.
_ONLY = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "is_decoder": None,  # has no effect on GPT-2
    "tie_word_embeddings": True,
}
# Names that transformers takes for those of GPT-2.
_ALIASES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
}
_ACTIVATION_NAMES: dict[str, Activation] = {
    **{name: name for name in get_args(Activation)},
    "gelu_pytorch_tanh": "gelu_new",  # the same function under another name
}


def parse_config(document: Mapping[str, Any], path: Path) -> GPTConfig:
    """Turn Hugging Face's GPT-2 config into ours, refusing by name what we do not compute.

    Fields about training, heads we do not have and caching do not change what a language model
    computes and pass. Absent fields mean transformers' defaults, which are GPT-2 124M.
    """
    for field, value in _ONLY.items():
        found = document.get(field, value)
        if value is not None and found != value:
            raise CheckpointError(
                f"{path} has {field} {shown(found)}; only {value!r} is supported."
            )
    for field in ("quantization_config", "pruned_heads"):
        if document.get(field):
            raise CheckpointError(f"{path} has a {field}, which is not supported.")
    for field, alias in _ALIASES.items():
        if alias in document and document.get(field, document[alias]) != document[alias]:
            raise CheckpointError(
                f"{path} has {field} {shown(document[field])} and {alias} "
                f"{shown(document[alias])}, two names of one thing."
            )
    activation = document.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATION_NAMES:
        raise CheckpointError(
            f"{path} has activation_function {shown(activation)}; supported are "
            f"{', '.join(_ACTIVATION_NAMES)}."
        )
    kvik = document.get("kvik") or {}
    bias = kvik.get("bias", True) if isinstance(kvik, dict) else None
    if not isinstance(bias, bool):
        raise CheckpointError(f'{path} has an unreadable "kvik" entry: {shown(kvik)}.')
    inverse = document.get("scale_attn_by_inverse_layer_idx", False)
    if not isinstance(inverse, bool):
        raise CheckpointError(
            f"{path} has scale_attn_by_inverse_layer_idx {shown(inverse)}; expected true or false."
        )

    def whole(field: str, default: int, largest: int = 2**31 - 1) -> int:
        value = document.get(field, document.get(_ALIASES.get(field, field), default))
        if type(value) is not int or not 1 <= value <= largest:
            raise CheckpointError(
                f"{path} has {field} {shown(value)}; expected a whole number from 1 to {largest}."
            )
        return value

    def real(field: str, default: float) -> float:
        value = document.get(field, default)
        # Compared with 1 before anything else: a whole number may be too large for a float.
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise CheckpointError(
                f"{path} has {field} {shown(value)}; expected a number from 0 to 1."
            )
        return float(value)

    try:
        return GPTConfig(
            n_layer=whole("n_layer", 12, _MAX_LAYERS),
            n_head=whole("n_head", 12),
            n_embd=whole("n_embd", 768),
            n_ctx=whole("n_positions", 1024),
            vocab_size=whole("vocab_size", 50257),
            n_inner=None if document.get("n_inner") is None else whole("n_inner", 0),
            activation=_ACTIVATION_NAMES[activation],
            layer_norm_epsilon=real("layer_norm_epsilon", 1e-5),
            scale_attn_by_inverse_layer_idx=inverse,
            bias=bias,
            # The file may name three rates; training with ours sets its own, serving has none.
            dropout=real("resid_pdrop", 0.1),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from error


def parse_token_ids(
    document: Mapping[str, Any],
    generation: Mapping[str, Any],
    field: str,
    config: GPTConfig,
    directory: Path,
) -> tuple[int, ...]:
    """The ids a checkpoint names for `field`; its generation config has the last word.

    Where nobody names one, transformers assumes GPT-2's <|endoftext|> and writes it into the
    files, whatever the size of the vocabulary: beyond it, that id means none.
    """
    value = document.get(field, _GPT2_END_OF_TEXT)
    if generation.get(field) is not None:
        value = generation[field]
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if config.vocab_size <= _GPT2_END_OF_TEXT and ids == [_GPT2_END_OF_TEXT]:
        return ()
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{directory} names {field} {shown(value)}; ids of this model are 0 to "
                f"{config.vocab_size - 1}."
            )
    return tuple(ids)


def format_config(
    config: GPTConfig, *, dtype: str, bos_token_id: int | None, eos_token_id: int | None
) -> dict[str, Any]:
    """Turn our config into Hugging Face's; `dtype` is torch's name, such as "float32"."""
    document: dict[str, Any] = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
    }
    if not config.bias:
        document["kvik"] = {"bias": False}
    return document
