"""The sha256 of a checkpoint's weights, beside whatever else goes on; knows no tensors."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from weights.layout import Layout, read_layout


def hash_weights(layout: Layout) -> str:
    """sha256 over the weight files, in hex."""
    digest = hashlib.sha256()
    for file in layout.files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def start_hashing(directory: Path) -> Future[str]:
    """Hash the weights of a checkpoint in a thread, which lets go of the interpreter's lock.

    The result raises what is wrong with the directory.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="kvik-hash")
    hashing = executor.submit(lambda: hash_weights(read_layout(directory)))
    executor.shutdown(wait=False)
    return hashing
