"""From a name such as openai-community/gpt2 to a local directory; does not look into its files."""

import difflib
import os
import re
import shlex
from pathlib import Path
from typing import NoReturn

from weights.errors import HubError

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "characters.json",
)
# Never pickles: *.bin and *.pt stay where they are.
_WANTED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
)
_PICKLES = re.compile(r"(pytorch_model.*\.bin|.*\.pt|.*\.pth|.*\.pkl)")
_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?", re.ASCII)


def resolve(
    model: str, *, endpoint: str | None = None, cache_directory: Path | None = None
) -> Path:
    """Turn a directory, `owner/name` or `owner/name@revision` into a local directory.

    A directory is returned as it is, and the network left alone. A name is downloaded from the
    Hugging Face hub, or found in its cache: safetensors, configuration and tokenizer, no pickles.

    Args:
        model: what the user wrote.
        endpoint: the hub's address; None leaves it to huggingface_hub.
        cache_directory: where downloads are kept; None leaves it to huggingface_hub.

    Raises:
        HubError: there is no such directory or name, or it cannot be had now.
    """
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except PermissionError as error:  # a directory on the way is closed to us
        raise HubError(f"{model} cannot be read: {error.strerror}.") from error
    if is_file:
        raise HubError(
            f"{model} is a file, and a model is a directory with config.json and "
            f"model.safetensors. To turn a checkpoint file into one: kvik convert "
            f"{shlex.quote(model)} DIRECTORY"
        )
    name = _NAME.fullmatch(model)
    # owner/name beside a directory called owner is a path with a typo far more often than a name.
    if name is None or path.parent.is_dir():
        _refuse_path(model, path)
    return _download(name["repository"], name["revision"], endpoint, cache_directory)


def name_of(model: str) -> str:
    """What people call a model that `resolve` finds: its directory's name, or that on the hub.

    A link has its own name, `best` and not that of the step it leads to, which changes; and what
    is downloaded lies in a directory that is called by a number.
    """
    path = Path(os.path.abspath(Path(model).expanduser()))
    return path.name if path.is_dir() else model


def _refuse_path(model: str, path: Path) -> NoReturn:
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(existing).parts[0]
    directories = [entry.name for entry in existing.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(missing, directories, n=1)
    hint = f" Did you mean {existing / near[0]}?" if near else ""
    raise HubError(
        f"There is no directory {model}: {existing} exists and holds no directory "
        f"{missing}.{hint} A model on the Hugging Face hub is named owner/name, such as "
        "openai-community/gpt2."
    )


def _download(
    repository: str, revision: str | None, endpoint: str | None, cache_directory: Path | None
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise HubError(
            f"There is no directory {repository}, and downloading a model by its name needs "
            "huggingface_hub, which is not installed: pip install 'kvik[hub]'"
        ) from error
    model = repository if revision is None else f"{repository}@{revision}"
    hub = endpoint or "the Hugging Face hub"
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_directory,
                endpoint=endpoint,
                allow_patterns=list(_WANTED_FILES),
                ignore_patterns=["*/*"],  # a pattern's * crosses folders
            )
        )
        if not any(directory.glob("*.safetensors")):
            files = huggingface_hub.HfApi(endpoint=endpoint).list_repo_files(
                repository, revision=revision
            )
            _refuse_without_safetensors(model, repository, files)
    except errors.HFValidationError as error:
        raise HubError(f"{model} is neither a directory nor a name on the hub: {error}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{model} is gated: its owners grant access one by one. Ask for it on the model's page "
            "on the hub, then log in with: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no directory {repository} here and no model of that name on {hub} that you "
            "may see. Check the spelling; if the model is private, log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} is on {hub}, but has no revision {revision}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"There is no directory {repository} here, it was not downloaded before, and {hub} "
            f"cannot be reached ({_reason(error)}). Try again when it can, or name a local "
            "directory."
        ) from error
    # The base class of everything HTTP is httpx's or its successor's, by huggingface_hub's version.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise HubError(
            f"{model} cannot be downloaded: {_first_line(error)}. What has arrived is kept; try "
            "again."
        ) from error
    except ValueError as error:
        raise HubError(
            f"{hub} gave an answer about {model} that is not a hub's ({_first_line(error)}). Is "
            "there a proxy or a login page between?"
        ) from error
    return directory


def _refuse_without_safetensors(model: str, repository: str, files: list[str]) -> NoReturn:
    pickles = [file for file in files if _PICKLES.fullmatch(file)]
    if not pickles:
        raise HubError(
            f"{model} has no *.safetensors file and is no model to serve. It holds "
            f"{', '.join(sorted(files)[:10]) or 'nothing'}."
        )
    directory = repository.split("/")[1]
    raise HubError(
        f"{model} has its weights only as {', '.join(pickles)}: pickles can run code when they are "
        "read, so they are never downloaded. To convert it, which reads it without running "
        f"anything: hf download {repository} --local-dir {directory}, then kvik convert "
        f"{directory} {directory}-safetensors"
    )


def _reason(error: BaseException) -> str:
    """The cause in one line: huggingface_hub wraps it in a paragraph of advice."""
    return _first_line(error.__cause__ if error.__cause__ is not None else error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
