"""The errors that users meet: each message names the value and what was expected."""


class ShapeError(ValueError):
    """A tensor does not have the shape, dtype or device that the operation needs."""


class ChainError(ValueError):
    """A pattern or chain does not exist or does not compose."""


class BackendError(RuntimeError):
    """The requested backend is unknown or cannot compute this problem here."""


class CheckpointError(RuntimeError):
    """A checkpoint is unreadable, truncated, or belongs to another structure."""


class DataError(RuntimeError):
    """A data set is absent or unreadable."""


class ConfigError(ValueError):
    """A configuration value is unknown or contradicts another one."""
