"""PSA-VLM: a readable safety bottleneck for vision-language models.

Importing the package is cheap: each name below loads what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from psa_vlm import errors

if TYPE_CHECKING:
    from psa_vlm.data.sample import Sample, Turn
    from psa_vlm.inference import PsaVlm, Reply
    from psa_vlm.model.backbone import Backbone
    from psa_vlm.model.bottleneck import SafetyBottleneck
    from psa_vlm.model.verdict import Verdict
    from psa_vlm.policy.policy import Decision, Policy
    from psa_vlm.taxonomy import Taxonomy

__version__ = "0.1.0.dev0"

__all__ = [
    "Backbone",
    "Decision",
    "Policy",
    "PsaVlm",
    "Reply",
    "SafetyBottleneck",
    "Sample",
    "Taxonomy",
    "Turn",
    "Verdict",
    "__version__",
    "errors",
]

_HOMES = {
    "Backbone": "psa_vlm.model.backbone",
    "Decision": "psa_vlm.policy.policy",
    "Policy": "psa_vlm.policy.policy",
    "PsaVlm": "psa_vlm.inference",
    "Reply": "psa_vlm.inference",
    "SafetyBottleneck": "psa_vlm.model.bottleneck",
    "Sample": "psa_vlm.data.sample",
    "Taxonomy": "psa_vlm.taxonomy",
    "Turn": "psa_vlm.data.sample",
    "Verdict": "psa_vlm.model.verdict",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
