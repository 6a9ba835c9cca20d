"""Where `kvik` and `python -m kvik` begin."""

import os

from kvik.command_line import app


def main() -> None:
    """Run the command line."""
    # Before torch is imported; why, `_worker_environment` in engine/client.py tells.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
