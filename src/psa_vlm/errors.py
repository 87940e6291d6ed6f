"""Every error that psa-vlm raises on purpose: one line that says what, where, and the fix."""

from __future__ import annotations


class PsaVlmError(Exception):
    """Base of them all; the command line ends with its `exit_code`."""

    exit_code = 1


class InputError(PsaVlmError):
    """What the caller gave can't be used."""

    exit_code = 2


class ImageError(InputError):
    """An image is missing, damaged, too large, or no image at all."""


class DataError(InputError):
    """A data set or a label is malformed."""


class PolicyError(InputError):
    """A policy is malformed or does not fit the taxonomy."""


class ConfigError(InputError):
    """A configuration or taxonomy file is malformed."""


class CheckpointError(PsaVlmError):
    """A checkpoint is incomplete, damaged or of another kind."""


class TaxonomyMismatch(CheckpointError):
    """A checkpoint was made with another taxonomy."""


class VerdictError(PsaVlmError):
    """A verdict could not be computed; never to be read as "safe"."""


class MissingExtra(PsaVlmError):
    """An optional package is not installed.

    Args:
        package: the package that was looked for, `plotly`.
        extra: the extra of psa-vlm that brings it, `eval`.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(package, extra)
        self.package = package
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.package} is not installed; run: pip install 'psa-vlm[{self.extra}]'"
