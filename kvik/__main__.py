"""Where `kvik` and `python -m kvik` begin."""

import os
import signal
from pathlib import Path


def main() -> None:
    """Run the command line."""
    _end_when_told_to()
    from engine.config import THREADS_ENVIRONMENT
    from kvik.command_line import app

    for name, value in THREADS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _name_kernel_folder()
    app()


def _end_when_told_to() -> None:
    """Let SIGTERM end us where we are a container's first process, as it does anywhere else.

    Linux keeps from the first process every signal that it has no handler for: a container that is
    stopped before the server listens to signals would be waited for, and killed in the end.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def _name_kernel_folder() -> None:
    """Name the folder for compiled kernels, for this process and those it starts.

    As NUMBA_CACHE_DIR says, or beside the code, or in the user's cache: the first that can be
    written.
    """
    from engine.kernel_folder import BESIDE_THE_CODE, first_writable

    asked = os.environ.get("NUMBA_CACHE_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [*([Path(asked)] if asked else []), BESIDE_THE_CODE]
    if cache.is_absolute():  # a user whom the system does not know has no home
        folders.append(cache / "kvik")
    if (folder := first_writable(folders)) is not None:
        os.environ["NUMBA_CACHE_DIR"] = str(folder)


if __name__ == "__main__":
    main()
