"""The testbed's base model."""

from __future__ import annotations

import pytest

from psa_vlm.model.backbone import Backbone
from psa_vlm.testbed.premise import base_path


@pytest.fixture(scope="module")
def base() -> Backbone:
    return Backbone.from_pretrained(base_path())
