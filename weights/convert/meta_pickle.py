"""nanoGPT's meta.pkl, a pickle of plain data, read without unpickling.

A pickle is a program. This one is read by our own interpreter of the few instructions that build
dicts, lists, strings and numbers; the first other one ends the reading. Python's unpickler with a
`find_class` that refuses would keep code from running, but not a seven-byte file from filling the
memory: the index of a memo entry decides how much is reserved for it.
"""

import pickletools
from pathlib import Path
from typing import Any

from model.tokenizer import CharacterTokenizer
from model.vocabulary import TokenizerError
from weights.errors import CheckpointError

_MAX_FILE_BYTES = 64 * 2**20  # every character of Unicode, both ways, takes some 25 MB

# Instructions that push their own argument, of pickle protocols 0 to 5.
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SKIP = frozenset(("PROTO", "FRAME"))


class _Mark:
    """Where a dict's or a list's items begin on the stack."""


def read_characters(path: Path) -> CharacterTokenizer:
    """Read the character vocabulary of a meta.pkl.

    Raises CheckpointError, naming file and instruction, for a pickle that is more than plain data,
    and for one whose `stoi`, `itos` and `vocab_size` do not say the same.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path} is no file of at most {_MAX_FILE_BYTES} bytes, as a meta.pkl is."
            )
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    meta = parse_plain_pickle(content, path)
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} holds a {type(meta).__name__}; a meta.pkl holds a dict.")
    missing = {"vocab_size", "stoi", "itos"} - meta.keys()
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(missing))}; nanoGPT's meta.pkl has vocab_size, stoi "
            "and itos."
        )
    stoi, itos, vocab_size = meta["stoi"], meta["itos"], meta["vocab_size"]
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(stoi, dict) or not isinstance(itos, dict):
        raise CheckpointError(f"{path}: stoi and itos must be dicts.")
    if len(stoi) != len(itos) or vocab_size != len(stoi):
        raise CheckpointError(
            f"{path} contradicts itself: vocab_size {_show(vocab_size)}, {len(stoi)} entries in "
            f"stoi, {len(itos)} in itos."
        )
    for token_id in range(len(stoi)):
        character = itos.get(token_id)
        if not isinstance(character, str):
            raise CheckpointError(
                f"{path}: itos has {_show(character)} for {token_id}; expected a character for "
                f"every number from 0 to {len(stoi) - 1}."
            )
        back = stoi.get(character)
        if type(back) is not int or back != token_id:
            raise CheckpointError(
                f"{path} contradicts itself: itos[{token_id}] is {character!r}, and stoi has "
                f"{_show(back)} for it."
            )
    try:
        return CharacterTokenizer([itos[token_id] for token_id in range(len(itos))])
    except TokenizerError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse_plain_pickle(content: bytes, path: Path) -> Any:
    """Read a pickle of dicts, lists, strings and numbers; `path` is for errors.

    Raises CheckpointError, naming the instruction, for any other. Time and memory are bounded by
    the length of `content`.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for instruction, argument, place in pickletools.genops(content):
            name = instruction.name
            if name in _NUMBERS or name in _STRINGS:
                stack.append(argument)
            elif name in _PUSH_CONSTANT:
                stack.append(_PUSH_CONSTANT[name])
            elif name == "MARK":
                stack.append(_Mark())
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "DICT":
                items = _pop_items(stack)
                stack.append({})
                _set_items(stack[-1], items)
            elif name == "LIST":
                stack.append(_pop_items(stack))
            elif name in ("SETITEM", "SETITEMS"):
                items = _pop_items(stack) if name == "SETITEMS" else _pop(stack, 2)
                _set_items(stack[-1], items)
            elif name in ("APPEND", "APPENDS"):
                items = _pop_items(stack) if name == "APPENDS" else _pop(stack, 1)
                if type(stack[-1]) is not list:
                    raise ValueError("an item is appended to what is no list")
                stack[-1].extend(items)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "STOP":
                (value,) = stack
                return value
            elif name not in _SKIP:
                raise CheckpointError(
                    f"{path} is not plain data: at byte {place} it has the pickle instruction "
                    f"{name}{_named(name, argument, stack)}. It was not executed. Expected a dict "
                    "of numbers, strings, dicts and lists."
                )
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a whole pickle: {_show(error)}.") from error
    raise AssertionError("genops ends with STOP or an error")


def _named(instruction: str, argument: Any, stack: list[Any]) -> str:
    """The object that an instruction would import, as far as it can be told."""
    if instruction == "STACK_GLOBAL" and all(isinstance(name, str) for name in stack[-2:]):
        return f", which asks for {'.'.join(stack[-2:])[:200]}"
    if instruction in ("GLOBAL", "INST") and isinstance(argument, str):
        return f", which asks for {argument.replace(' ', '.')[:200]}"
    return ""


def _pop(stack: list[Any], count: int) -> list[Any]:
    items = stack[-count:]
    if len(items) < count or any(isinstance(item, _Mark) for item in items):
        raise ValueError("the stack runs out")
    del stack[-count:]
    return items


def _pop_items(stack: list[Any]) -> list[Any]:
    items = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if type(target) is not dict or len(keys) != len(values):
        raise ValueError("an item is set in what is no dict, or lacks its value")
    # Only what hashes in constant time: deeply nested keys would overflow the C stack.
    if not all(type(key) in (str, int) for key in keys):
        raise ValueError("a dict's key is neither a string nor a number")
    target.update(zip(keys, values, strict=True))


def _show(value: object) -> str:
    """A value short enough for a sentence; nested and huge ones only by their type."""
    if isinstance(value, Exception):
        return str(value)[:200]
    if isinstance(value, str):
        return repr(value[:40])
    if (
        value is None
        or isinstance(value, (bool, float))
        or (type(value) is int and abs(value) < 2**63)
    ):
        return repr(value)
    return f"a {type(value).__name__}"
