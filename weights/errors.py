"""What can go wrong with checkpoints, as types; each carries a sentence for people.

CheckpointError     a checkpoint that cannot be used, or written
└── HubError        a name that did not become a directory
"""


class CheckpointError(Exception):
    """A checkpoint that cannot be used, or written; the message names the file and the remedy."""


class HubError(CheckpointError):
    """A name that did not become a directory."""
