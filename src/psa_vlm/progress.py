"""Progress bars for whatever takes more than a moment; on stderr, so that stdout stays data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Go through the items behind a labelled bar; none is drawn for no items."""
    from rich.console import Console
    from rich.progress import track as bar

    return iter(bar(items, description=label, console=Console(stderr=True), disable=not len(items)))
