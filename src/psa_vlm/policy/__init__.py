"""What the operator wants done for each risk type and level."""

from __future__ import annotations

from psa_vlm.policy.files import Source
from psa_vlm.policy.policy import VERDICT_ERROR, Decision, Policy
from psa_vlm.policy.schema import Action

__all__ = ["VERDICT_ERROR", "Action", "Decision", "Policy", "Source"]
