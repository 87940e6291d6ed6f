"""Limits: what they may be, and how they are changed."""

from __future__ import annotations

import pytest

from psa_vlm.errors import ConfigError
from psa_vlm.serving.limits import Limits


def test_limits_are_changed_by_name() -> None:
    limits = Limits().changed(["images=3", "wait_ms=0"])
    assert (limits.images, limits.wait_ms, limits.body) == (3, 0, Limits().body)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("picture=3", "not known; use one of body"),
        ("images=many", "as in images=8"),
        ("images=0", "limit images: must be 1 or more"),
        ("wait_ms=-1", "must be 0 or more"),
    ],
)
def test_a_limit_that_makes_no_sense_is_an_error(pair: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Limits().changed([pair])
