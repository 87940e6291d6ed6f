"""Draw the README's picture: held-out scenes, and what is said before and after alignment.

After `make demo`:
  python examples/before_after.py runs/demo/stage2 docs/images/before-after.png
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from psa_vlm import Backbone, PsaVlm
from psa_vlm.evaluation.evaluate import unaligned
from psa_vlm.testbed.cases import evaluation_samples
from psa_vlm.testbed.premise import base_path

WANTED = (("risky", "illegal_risk"), ("lookalike", "illegal_risk"), ("risky", "privacy"))
"""Cell and risk type of each column; the first such held-out sample is taken, not the best."""


def main(run: Path, out: Path) -> None:
    model = PsaVlm.from_pretrained(run)
    plain = unaligned(Backbone.from_pretrained(base_path()))
    samples = [
        next(s for s in evaluation_samples("compositions", cell, 100, seed=77) if s.type == type_)
        for cell, type_ in WANTED
    ]
    figure, axes = plt.subplots(1, len(samples), figsize=(11, 5.6))
    for axis, sample, (before, _) in zip(axes, samples, plain(samples), strict=True):
        reply = model.reply(sample.images, sample.question)
        assert reply.verdict is not None
        image = reply.verdict.images[0]
        axis.imshow(sample.images[0], interpolation="bicubic")
        axis.axis("off")
        axis.set_title(f"“{sample.question}”", fontsize=10.5, weight="bold")
        sure = f"{image.type_probs[image.type]:.0%}, {image.level_probs[image.level]:.0%}"
        lines = (
            (f"before: {before}", "#a3302a"),
            (f"seen: {image.type.replace('_', ' ')}, level {image.level} ({sure})", "#555555"),
            (f"after: {reply.text}", "#1c6b3a"),
        )
        y = -0.04
        for text, colour in lines:
            wrapped = textwrap.fill(text, 38)
            axis.text(0, y, wrapped, transform=axis.transAxes, va="top", fontsize=11, color=colour)
            y -= 0.075 * (wrapped.count("\n") + 1) + 0.02
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.32, wspace=0.12)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
