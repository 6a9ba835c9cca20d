"""Where `kvik` and `python -m kvik` begin."""

import os

from kvik.command_line import app


def main() -> None:
    """Run the command line."""
    from engine.config import THREADS_ENVIRONMENT

    for name, value in THREADS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    app()


if __name__ == "__main__":
    main()
