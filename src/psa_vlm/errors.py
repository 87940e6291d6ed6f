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


class NoLanguageModel(InputError):
    """What is asked needs a language model, and the backbone is a dual encoder.

    Args:
        what: is asked, as in "reply".
        kind: model type of the backbone.
    """

    def __init__(self, what: str, kind: str) -> None:
        super().__init__(what, kind)
        self.what = what
        self.kind = kind

    def __str__(self) -> str:
        return (
            f"{self.what} needs a language model, and the backbone ({self.kind}) has none: it"
            " assesses only; use a vision-language model"
        )


class CheckpointError(PsaVlmError):
    """A checkpoint is incomplete, damaged or of another kind."""


class TaxonomyMismatch(CheckpointError):
    """A checkpoint was made with another taxonomy."""


class VerdictError(PsaVlmError):
    """A verdict could not be computed; never to be read as "safe"."""


class RequestError(InputError):
    """A request to the service can't be served as it is.

    Args:
        message: what is wrong, and the fix.
        param: where in the request, as in `messages.0.content`.
        code: for programs, as in `unsupported_parameter`.
        status: of HTTP.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_request",
        status: int = 400,
    ) -> None:
        super().__init__(message, param, code, status)
        self.param = param
        self.code = code
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class Overloaded(PsaVlmError):
    """More requests wait than the service may keep.

    Args:
        retry_after: seconds until it is worth to ask again.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"too many requests are waiting; ask again in {self.retry_after} s"


class AuditError(PsaVlmError):
    """The audit log can't be read or written, or was changed."""


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
