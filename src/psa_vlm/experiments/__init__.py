"""Experiments: each module answers one question with `run(out, scale, seed) -> Page`.

One that reads a trained run takes its folder as `run`, and where its base model is as `base`.
"""

from __future__ import annotations

EXPERIMENTS: dict[str, str] = {
    "ablation": "psa_vlm.experiments.ablation",
    "exaggerated": "psa_vlm.experiments.exaggerated",
    "modules": "psa_vlm.experiments.modules",
    "ratio": "psa_vlm.experiments.ratio",
    "slices": "psa_vlm.experiments.slices",
}
"""Name -> module, which is imported when it is asked for."""
