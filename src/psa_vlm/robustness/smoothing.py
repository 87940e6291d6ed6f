"""A certificate for the head by randomised smoothing (Cohen et al. 2019, arXiv:1902.02918).

What is certified, in these words exactly:

- The *smoothed head* calls a request risky if the run's policy acts on it for more than half of all
  images that are the user's plus Gaussian noise of standard deviation sigma on every value.
- For each risky request: with probability 1 - alpha over the draws, every image within the radius
  (L2, of values in 0 to 1) is called risky by the smoothed head as well.

It is not a certificate of the run as it is deployed, which looks at each image once and without
noise; nor of the answer. A radius is small beside the usual bound on each value: eps moves an image
of n values by up to eps * sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation.risk_control import scipy
from psa_vlm.evaluation.scorers import Interval, wilson
from psa_vlm.inference import PsaVlm
from psa_vlm.model.pixels import pictures_of, tensor_of
from psa_vlm.progress import track
from psa_vlm.robustness.victim import picture_of
from psa_vlm.training.features import image_key

ALPHA = 0.001
"""Chance that a single certificate is wrong."""
BATCH = 64


@dataclass(frozen=True)
class Smoothing:
    """How a head is smoothed."""

    sigma: float = 0.12
    """Standard deviation of the noise, of values in 0 to 1."""
    draws: int = 1000
    """Noisy copies of each image."""
    seed: int = 0
    """Of the noise."""

    @property
    def farthest(self) -> float:
        """The largest radius that so many draws can certify."""
        return radius(self.draws, self.draws, self.sigma)


@dataclass(frozen=True)
class Certificate:
    """What was certified.

    Attributes:
        how: the smoothing.
        radii: of each risky request, None where the smoothed head does not surely call it risky.
        harmless: share of harmless requests that the smoothed head lets pass.
    """

    how: Smoothing
    radii: list[float | None]
    harmless: Interval | None

    def at(self, least: float) -> Interval | None:
        """Share of risky requests that are certified to a radius of at least so much."""
        return wilson([one is not None and one >= least for one in self.radii])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        steps = [round(self.how.farthest * i / 5, 4) for i in range(6)]
        found = {step: self.at(step) for step in steps}
        return {
            "sigma": self.how.sigma,
            "draws": self.how.draws,
            "alpha": ALPHA,
            "farthest": self.how.farthest,
            "radii": self.radii,
            "certified": [
                {"radius": step, **vars(share)} for step, share in found.items() if share
            ],
            "harmless_allowed": self.harmless and vars(self.harmless),
        }


def radius(risky: int, draws: int, sigma: float) -> float:
    """Certified L2 radius where `risky` of the draws were called risky; 0 or less is none.

    The share is bounded from below by Clopper and Pearson at `ALPHA`.
    """
    stats = scipy("stats")
    share = float(stats.beta.ppf(ALPHA, risky, draws - risky + 1)) if risky else 0.0
    return sigma * float(stats.norm.ppf(share)) if share > 0 else -math.inf


def certify(
    model: PsaVlm,
    risky: Sequence[Sample],
    harmless: Sequence[Sample],
    how: Smoothing,
    folder: Path,
) -> Certificate:
    """Smooth the head on these requests, one image each.

    Args:
        model: the run.
        risky: requests to be certified.
        harmless: requests that tell what smoothing costs.
        how: the smoothing.
        folder: where noisy encodings are kept, so that another head or policy costs no vision pass.
    """
    radii = []
    for sample in track(risky, f"smoothing, sigma {how.sigma:g}"):
        found = radius(_acted_on(model, sample, how, folder), how.draws, how.sigma)
        radii.append(found if found > 0 else None)
    passed = [
        _acted_on(model, sample, how, folder) * 2 < how.draws
        for sample in track(harmless, "smoothing, harmless")
    ]
    return Certificate(how, radii, wilson(passed))


@torch.no_grad()
def _acted_on(model: PsaVlm, sample: Sample, how: Smoothing, folder: Path) -> int:
    """For how many of the noisy images the policy acts on the request."""
    maps = noisy_encodings(model, sample, how, folder).float()  # [draws, H, W, Dv]
    begin = model.bottleneck.config.begin
    h_t, mask = model.backbone.embed_text([sample.question], begin)  # [1, T, D], [1, T]
    count = 0
    for part in maps.to(h_t.device).split(BATCH):
        output = model.bottleneck.read(
            list(part), h_t.expand(len(part), -1, -1), mask.expand(len(part), -1)
        )
        verdicts = model.verdicts(output, list(part))
        count += sum(
            model.policy.decide(verdict, model.taxonomy).action != "allow" for verdict in verdicts
        )
    return count


@torch.no_grad()
def noisy_encodings(model: PsaVlm, sample: Sample, how: Smoothing, folder: Path) -> Tensor:
    """h_o of noisy copies of a sample's image ``[draws, H, W, Dv]``, kept on disk as float16.

    The same image and smoothing give the same noise.
    """
    picture = picture_of(sample)
    key = image_key(picture)
    path = folder / f"{key[:16]}-{how.sigma:g}-{how.draws}-{how.seed}.safetensors"
    if path.exists():
        return load_file(path)["h_o"]
    draw = torch.Generator().manual_seed(int(key[:12], 16) ^ how.seed)
    clean = tensor_of([picture])  # [1, 3, H, W]
    maps: list[Tensor] = []
    for start in range(0, how.draws, BATCH):
        count = min(BATCH, how.draws - start)
        noise = torch.randn((count, *clean.shape[1:]), generator=draw) * how.sigma * 255
        maps += model.backbone.encode(pictures_of(clean + noise)).maps
    encoded = torch.stack(maps).half().cpu()
    folder.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    save_file({"h_o": encoded}, writing)
    writing.replace(path)
    return encoded
