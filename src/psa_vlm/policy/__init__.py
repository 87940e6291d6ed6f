"""What the operator wants done for each risk type and level."""

from __future__ import annotations

from psa_vlm.policy.policy import VERDICT_ERROR, Action, Decision, Policy

__all__ = ["VERDICT_ERROR", "Action", "Decision", "Policy"]
