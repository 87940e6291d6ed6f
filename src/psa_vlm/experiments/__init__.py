"""Experiments: each module answers one question with `run(out, scale, seed) -> Page`.

One that reads a trained run takes its folder as a fourth argument, `trained`.
"""

from __future__ import annotations

EXPERIMENTS: dict[str, str] = {
    "ablation": "psa_vlm.experiments.ablation",
    "ratio": "psa_vlm.experiments.ratio",
}
"""Name -> module, which is imported when it is asked for."""
