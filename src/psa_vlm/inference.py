"""The way of a request: encode once, read the concepts, decide, then refuse or answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Turn
from psa_vlm.errors import InputError
from psa_vlm.model import checkpoint, export
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckOutput, SafetyBottleneck
from psa_vlm.model.calibration import FILE, Calibration, Temperatures
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.loading import Attention, Bits
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.model.writing import Listener, Written
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.taxonomy import Taxonomy

if TYPE_CHECKING:
    from peft import PeftModel
    from PIL.Image import Image

Images = Source | Sequence[Source]
NO_IMAGE = "no-image"
"""The rule of a request without an image: nothing to assess, the language model answers."""
MAX_NEW_TOKENS = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What the user gets, and why.

    Attributes:
        text: the answer, or the policy's refusal.
        verdict: None for a request without an image.
        decision: the action and the rule that fired.
    """

    text: str
    verdict: Verdict | None
    decision: Decision

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "text": self.text,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "decision": self.decision.to_dict(),
        }


@dataclass(frozen=True)
class _Request:
    """A request with its images open; `first` is the index of its first image in the batch."""

    images: list[Image]
    conversation: tuple[Turn, ...]
    first: int

    @property
    def text(self) -> str:
        """All that the user and the system said: earlier turns can carry the risky part."""
        return "\n".join(turn.text for turn in self.conversation if turn.role != "assistant")

    @property
    def rows(self) -> range:
        return range(self.first, self.first + len(self.images))


@dataclass(frozen=True)
class Seen:
    """A request that was encoded and assessed, to be decided on and answered.

    Attributes:
        conversation: its turns.
        verdict: None without an image.
        rows: of its images among those of its batch.
        features: the encoded images of its batch; None without any, what went wrong after an error.
    """

    conversation: tuple[Turn, ...]
    verdict: Verdict | None
    rows: range
    features: ImageFeatures | Exception | None

    def override(self, concepts: Mapping[str, str], taxonomy: Taxonomy) -> Seen:
        """The same with the named risk types at the given levels; see `Verdict.override`."""
        if self.verdict is None:
            return self
        return replace(self, verdict=self.verdict.override(concepts, taxonomy))


class PsaVlm:
    """A vision-language model behind its safety bottleneck.

    Attributes:
        backbone: the vision-language model.
        bottleneck: reads the concepts.
        taxonomy: their names.
        policy: used where a call gives none.
        adapter: the LoRA of stage II inside the backbone, None before stage II.
        calibration: makes verdicts carry calibrated probabilities and bands; None goes without.

    Raises:
        PolicyError: the policy does not fit the taxonomy.
        CheckpointError: the calibration was made for another bottleneck or taxonomy.
    """

    def __init__(
        self,
        backbone: Backbone,
        bottleneck: SafetyBottleneck,
        taxonomy: Taxonomy | None = None,
        policy: Policy | None = None,
        adapter: PeftModel | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.backbone = backbone
        self.bottleneck = bottleneck.eval()
        self.taxonomy = taxonomy or Taxonomy.default()
        self.policy = policy or Policy.default()
        self.policy.check(self.taxonomy)
        self.adapter = adapter
        if calibration is not None:
            calibration.check(self.taxonomy, self.bottleneck)
        self.calibration = calibration

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        taxonomy: Taxonomy | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        calibrated: bool = True,
        attention: Attention | None = None,
        bits: Bits | None = None,
    ) -> PsaVlm:
        """Load a run folder, exported or not: see `psa_vlm.model.checkpoint.load` for arguments
        and errors.

        A calibration in it is used, and one that is damaged or of other weights is an error;
        with `calibrated=False` it is not looked at.
        """
        folder = checkpoint.home(Path(folder))
        parts = checkpoint.load(folder, base, taxonomy, dtype, device, attention, bits)
        policy = Policy.from_yaml(folder / "policy.yaml")
        calibration = None
        if calibrated and (folder / FILE).exists():
            calibration = Calibration.load(folder / FILE)
            if calibration.valid_until < date.today():
                _logger.warning("%s: was valid until %s", folder / FILE, calibration.valid_until)
        return cls(
            parts.backbone, parts.bottleneck, parts.taxonomy, policy, parts.adapter, calibration
        )

    def save_pretrained(
        self,
        folder: str | Path,
        extra: Callable[[Path], None] = lambda folder: None,
        merged: bool = False,
    ) -> None:
        """Write a run folder, all of it or nothing: see `psa_vlm.model.checkpoint.save`.

        Args:
            folder: the run folder; replaced as a whole if it exists.
            extra: writes further files into it.
            merged: write a plain checkpoint that holds the run (see `psa_vlm.model.export`). The
                folder must not exist, and `extra` writes into its psa/.

        Raises:
            ConfigError: a merged one is written, and the folder exists.
            CheckpointError: it can't be written, or the calibration is of other weights.
        """
        parts = checkpoint.Parts(self.backbone, self.bottleneck, self.taxonomy, self.adapter)

        if self.calibration is not None:
            self.calibration.check(self.taxonomy, self.bottleneck)

        def with_the_rest(path: Path) -> None:
            self.policy.to_yaml(path / "policy.yaml")
            if self.calibration is not None:
                (path / FILE).write_text(self.calibration.to_json(), encoding="utf-8")
            extra(path)

        write = export.export if merged else checkpoint.save
        write(Path(folder), parts, with_the_rest)

    # --- the verdict -----------------------------------------------------------------------------

    def assess(self, images: Images, text: str) -> Verdict:
        """What is risky about an image (or several, the worst decides) in the light of a text.

        A verdict that can't be computed comes back as a failed one, never as safe.

        Args:
            images: a file, encoded bytes or a picture, or several of them.
            text: what the user asks.

        Raises:
            InputError: an image can't be used, there is none, or the text is empty.
        """
        return self.assess_batch([images], [text])[0]

    @torch.inference_mode()
    def assess_batch(self, images: Sequence[Images], texts: Sequence[str]) -> list[Verdict]:
        """`assess` for many requests in one vision pass."""
        requests = self._requests(images, texts)
        if not all(request.images for request in requests):
            raise InputError("no image to assess: give at least one for each text")
        return self._verdicts(requests, self._encode(requests))

    def _verdicts(
        self, requests: Sequence[_Request], features: ImageFeatures | Exception | None
    ) -> list[Verdict]:
        """Verdicts of requests that all have images; whatever fails in here fails closed."""
        try:
            if isinstance(features, Exception):
                raise features
            if features is None:
                return []
            texts = [request.text for request in requests for _ in request.rows]
            begin = self.bottleneck.config.begin
            h_t, mask = self.backbone.embed_text(texts, begin)  # [B, T, D], [B, T]
            output = self.bottleneck.read(features.maps, h_t, mask)
            images = self._image_verdicts(output, features.maps)
            return [
                Verdict.from_probs(
                    [images[row] for row in request.rows], self.taxonomy, self.calibration
                )
                for request in requests
            ]
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return [Verdict.failed(reason) for _ in requests]

    def verdicts(self, output: BottleneckOutput, maps: Sequence[torch.Tensor]) -> list[Verdict]:
        """Verdicts on B requests of one image each.

        Args:
            output: what the bottleneck said of them.
            maps: the features that it said it of, ``[H, W, Dv]`` each.
        """
        return [
            Verdict.from_probs([image], self.taxonomy, self.calibration)
            for image in self._image_verdicts(output, maps)
        ]

    def _image_verdicts(
        self, output: BottleneckOutput, maps: Sequence[torch.Tensor]
    ) -> list[ImageVerdict]:
        """One verdict for each row, all of them fetched from the device together."""
        queries = self.bottleneck.config.queries
        grids = [tuple(one.shape[:2]) if queries is None else queries for one in maps]
        looked_at = output.attention.float().sum(1)  # [B, Q]; rows of padding are zero
        most = looked_at.amax(1, keepdim=True).clamp_min(torch.finfo(looked_at.dtype).tiny)
        evidence = (looked_at / most).cpu().numpy()  # [B, Q]
        divided = self.calibration.temperatures if self.calibration else Temperatures()
        types = (output.type_logits.double() / divided.type).softmax(-1).tolist()
        levels = (output.level_logits.double() / divided.level).softmax(-1).tolist()
        return [
            ImageVerdict(
                dict(zip(self.taxonomy.types, type_probs, strict=True)),
                dict(zip(self.taxonomy.levels, level_probs, strict=True)),
                where[: math.prod(grid)].reshape(grid),  # [H, W]
            )
            for type_probs, level_probs, where, grid in zip(
                types, levels, evidence, grids, strict=True
            )
        ]

    # --- the reply -------------------------------------------------------------------------------

    def reply(
        self,
        images: Images,
        text: str,
        policy: Policy | None = None,
        concepts: Mapping[str, str] | None = None,
        history: Sequence[Turn] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        language: str | None = None,
    ) -> Reply:
        """Answer, answer with a hint, or refuse, as the policy says.

        Args:
            images: a file, encoded bytes or a picture, several of them, or an empty list.
            text: what the user asks.
            policy: None means the run's own.
            concepts: levels to take instead of the predicted ones, for instance
                `{"illegal_risk": "high"}` (the bottleneck's intervention).
            history: earlier turns, perhaps with one of the system at their head; all but the
                assistant's count for the verdict too.
            max_new_tokens: most tokens of an answer.
            language: of the policy's texts, as in "de"; None means its own.

        Raises:
            InputError: an image can't be used, the text is empty or too long, or a concept has no
                such name or level.
            NoLanguageModel: the backbone is a dual encoder.
        """
        return self.reply_batch(
            [images], [text], policy, concepts, [history], max_new_tokens, language
        )[0]

    @torch.inference_mode()
    def reply_batch(
        self,
        images: Sequence[Images],
        texts: Sequence[str],
        policy: Policy | None = None,
        concepts: Mapping[str, str] | None = None,
        histories: Sequence[Sequence[Turn]] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        language: str | None = None,
    ) -> list[Reply]:
        """`reply` for many requests: one vision pass, one generation for all that are answered."""
        self.backbone.check_writes("reply")
        policy = policy or self.policy
        policy.check(self.taxonomy)
        seen = self.see_batch(images, texts, histories)
        if concepts:
            seen = [one.override(concepts, self.taxonomy) for one in seen]
        decisions = [self.decide(one, policy, language) for one in seen]
        pending = [i for i, decision in enumerate(decisions) if decision.action != "refuse"]
        hints = [decisions[i].hint for i in pending]
        answers = self.answer_batch([seen[i] for i in pending], hints, max_new_tokens)
        texts_ = {i: answer.text for i, answer in zip(pending, answers, strict=True)}
        return [
            Reply(texts_.get(i, decision.refusal or ""), one.verdict, decision)
            for i, (one, decision) in enumerate(zip(seen, decisions, strict=True))
        ]

    # --- its steps -------------------------------------------------------------------------------

    @torch.inference_mode()
    def see_batch(
        self,
        images: Sequence[Images],
        texts: Sequence[str],
        histories: Sequence[Sequence[Turn]] | None = None,
    ) -> list[Seen]:
        """Encode and assess many requests in one vision pass; arguments and errors as `reply`'s.

        What goes wrong in a verdict comes back as a failed one, never as safe.
        """
        requests = self._requests(images, texts, histories)
        features = self._encode(requests)
        verdicts = iter(self._verdicts([one for one in requests if one.images], features))
        return [
            Seen(one.conversation, next(verdicts) if one.images else None, one.rows, features)
            for one in requests
        ]

    def decide(self, seen: Seen, policy: Policy, language: str | None = None) -> Decision:
        """What the policy does with a request; without an image there is nothing to decide."""
        if seen.verdict is None:
            return Decision("allow", NO_IMAGE)
        return policy.decide(seen.verdict, self.taxonomy, language)

    @torch.inference_mode()
    def answer_batch(
        self,
        seen: Sequence[Seen],
        hints: Sequence[str | None],
        max_new_tokens: int = MAX_NEW_TOKENS,
        listener: Listener | None = None,
    ) -> list[Written]:
        """Answers of the language model to requests of one `see_batch`, in one generation.

        Args:
            seen: the requests that are to be answered.
            hints: of their decisions.
            max_new_tokens: most tokens of an answer.
            listener: hears the answers while they are written.

        Raises:
            InputError: a conversation is too long, or the chat template does not take its turns.
        """
        if not seen:
            return []
        features = seen[0].features
        rows = [row for one in seen for row in one.rows]
        chosen = features.take(rows) if isinstance(features, ImageFeatures) and rows else None
        inputs = self.backbone.prompts(
            [one.conversation for one in seen],
            [len(one.rows) for one in seen],
            hints,
            features=chosen,
        )
        return self.backbone.write(inputs, chosen, max_new_tokens, listener)

    # --- input -----------------------------------------------------------------------------------

    def _requests(
        self,
        images: Sequence[Images],
        texts: Sequence[str],
        histories: Sequence[Sequence[Turn]] | None = None,
    ) -> list[_Request]:
        histories = [()] * len(texts) if histories is None else histories
        if not len(images) == len(texts) == len(histories):
            raise InputError(
                f"{len(images)} image lists, {len(texts)} texts and {len(histories)} histories: "
                "give as many of each"
            )
        requests: list[_Request] = []
        first = 0
        for sources, text, history in zip(images, texts, histories, strict=True):
            if not text.strip():
                raise InputError("the text is empty: say what is asked about the image")
            opened = [frame for source in _listed(sources) for frame in open_images(source)]
            requests.append(_Request(opened, (*history, Turn("user", text)), first))
            first += len(opened)
        return requests

    def _encode(self, requests: Sequence[_Request]) -> ImageFeatures | Exception | None:
        """One vision pass over every image of the batch.

        None without images; what goes wrong comes back as it is, for the verdict to fail closed.
        """
        images = [image for request in requests for image in request.images]
        try:
            counts = [len(request.images) for request in requests]
            return self.backbone.encode(images, counts) if images else None
        except Exception as error:
            return error


def _listed(images: Images) -> Sequence[Source]:
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return images
    return [images]
