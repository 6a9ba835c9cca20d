"""What can go wrong while training, as types; each carries a sentence for people.

TrainingError
├── ConfigError     a key, a value or a preset that cannot be used
├── DataError       text, shards or a data directory that cannot be used
├── RunError        a run directory that cannot be begun, resumed or saved to
└── DivergedError   the loss stopped being a number
"""


class TrainingError(Exception):
    """Base of everything this room raises on account of users, files and numbers."""


class ConfigError(TrainingError):
    """A key, a value or a preset that cannot be used."""


class DataError(TrainingError):
    """Text, shards or a data directory that cannot be used."""


class RunError(TrainingError):
    """A run directory that cannot be begun, resumed or saved to."""


class DivergedError(TrainingError):
    """The loss or its gradient was not finite for several steps in a row."""
