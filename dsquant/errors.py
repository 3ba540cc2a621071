"""Errors that a user can act on: each message names what is wrong, where, and the fix."""


class DsquantError(Exception):
    """Signal a problem the user can fix; command-line entries print its message without a traceback."""


class ConfigError(DsquantError):
    """Signal a recipe, override or ds_config that cannot be run as written."""


class DataError(DsquantError):
    """Signal missing, truncated or unreadable training or evaluation data."""


class CheckpointError(DsquantError):
    """Signal a checkpoint that is missing, incomplete, or of another model."""


class ShardError(DsquantError):
    """Signal a DeepSpeed layout that sharded quantization cannot map."""


class TrainingError(DsquantError):
    """Signal a run that cannot go on, such as a non-finite loss."""


class ExportError(DsquantError):
    """Signal a packed file that cannot be written, read or run."""


class BuildError(DsquantError):
    """Signal native code that cannot be compiled or loaded on this machine."""
