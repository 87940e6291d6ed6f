"""How much one request may ask of the service, and how many may wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from psa_vlm.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Each is answered with its own status when it is passed.

    Attributes:
        body: bytes of a request (413).
        image: bytes of one encoded image (400).
        images: pictures of a request, every frame of an animation counts (400).
        pixels: of all pictures of a request together (400).
        characters: of all words of a request (400).
        tokens: of an answer (400).
        requests: that are under way at once, whatever they wait for (429).
        waiting: requests that wait for the model (429).
        seconds: that a request may take until its last word (504), that its body may take to
            come (408), and that a client may take to read what it is sent.
        fetch_seconds: that its remote images may take together (400).
        batch: requests that the model computes together.
        wait_ms: milliseconds that a request waits for others to join its batch.

    Raises:
        ConfigError: a limit is below 1 (or below 0 for `wait_ms`).
    """

    body: int = 32_000_000
    image: int = 10_000_000
    images: int = 16
    pixels: int = 50_000_000
    characters: int = 32_000
    tokens: int = 1024
    requests: int = 128
    waiting: int = 64
    seconds: int = 120
    fetch_seconds: int = 10
    batch: int = 8
    wait_ms: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "wait_ms" else 1
            if getattr(self, field.name) < least:
                raise ConfigError(f"limit {field.name}: must be {least} or more")

    def changed(self, pairs: Sequence[str]) -> Limits:
        """These limits with some changed, as in `["images=4", "tokens=64"]`.

        Raises:
            ConfigError: a limit is not known, or its value is not a whole number.
        """
        known = [field.name for field in fields(self)]
        given: dict[str, int] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in known:
                raise ConfigError(f"limit {pair}: not known; use one of {', '.join(known)}")
            try:
                given[name] = int(value)
            except ValueError:
                raise ConfigError(f"limit {pair}: write a whole number, as in {name}=8") from None
        return replace(self, **given)
