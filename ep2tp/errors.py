"""Every error that ep2tp raises on purpose. Each names the file, tensor or setting, its value, and what to do."""


class Ep2tpError(Exception):
    """Base of all errors raised by ep2tp."""


class SettingError(Ep2tpError, ValueError):
    """An environment variable or option has a value that ep2tp does not know."""


class PatchError(Ep2tpError, ValueError):
    """A patch file does not follow the schema, or no patch fits a model."""


class ModelError(Ep2tpError, ValueError):
    """A model's config.json lacks what ep2tp needs, or contradicts itself."""


class NoExpertsError(ModelError):
    """A model's config.json names no routed experts: there is nothing to rewrite."""


class CheckpointError(Ep2tpError, ValueError):
    """A checkpoint's files or tensors do not match its config."""


class OtherConversionError(CheckpointError):
    """An output folder holds another conversion."""


class DifferenceError(CheckpointError):
    """A converted checkpoint is not what it should be; the message names the first tensor or file that differs."""


class LaunchError(Ep2tpError, ValueError):
    """A launch cannot be rewritten to tensor parallelism; the message says which launch can."""


class SeamError(Ep2tpError, RuntimeError):
    """An engine no longer has the shape that a seam expects."""


class GuardError(Ep2tpError, ImportError):
    """Something imported an expert-parallel library while a rewrite keeps it out."""


class SourceError(Ep2tpError, ValueError):
    """A log, trace, server or process cannot be read."""


class OperandError(Ep2tpError, ValueError):
    """The kernel was given a tensor of a shape, dtype or layout that it does not take."""
