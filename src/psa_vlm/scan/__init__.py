"""Assess millions of images: what to read, who assesses it, and a result that can be resumed."""

from importlib.util import find_spec

from psa_vlm.errors import MissingExtra

TEXT = "What is this?"
"""Asked about each image where nothing else is said: a question that asks for nothing risky."""
BATCH = 32
"""Images in one pass of the model."""
ROWS = 256
"""Image files in one file of the result; a kill costs each actor so many at most."""


def check_extra() -> None:
    """See that what a scan needs is installed.

    Raises:
        MissingExtra: a package of the extra `scan` is not.
    """
    for package in ("ray", "pyarrow", "fsspec"):
        if find_spec(package) is None:
            raise MissingExtra(package, "scan")
