"""Time to the first token and to the whole reply: the plain model, ours, the authors' two passes.

    python benchmarks/inference.py                         # the testbed, on the CPU
    python benchmarks/inference.py --shape llava-1.5-7b    # random weights, on a CUDA machine

Each is given an encoded image in memory and a harmless question, and returns words:

plain       the Hugging Face model, used as its model card says: processor, generate, decode.
ours        `PsaVlm.reply`; the verdict is safe, so that the language model answers.
two passes  the authors' flow rebuilt from its description (arXiv 2411.11543): one pass encodes the
            image and classifies it beside the text padded to 1024 positions, of which the head
            reads the first; then a second pass encodes the image again and generates. To be
            generous the image is opened, scaled and normalised once for both passes, and the
            classifier computes in the model's own precision.
refused     `PsaVlm.reply` under a policy that refuses.

All share one set of weights. No answer ends early: the end of text has no weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common import SHAPES, SIZES, Ratio, Shape, arguments, device_for, interleaved, report, twin
from psa_vlm import Backbone, Policy, PsaVlm, SafetyBottleneck, Taxonomy, Turn
from psa_vlm.model.bottleneck import BottleneckConfig
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.testbed.cases import evaluation_samples
from psa_vlm.training.config import ConceptsConfig, Stage1Config

TOKENS = 32
PADDED = 1024


class Plain:
    """The model as plain transformers offers it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    def reply(self, image: bytes, text: str, tokens: int) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        inputs = self.processor(images=picture, text=prompt, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answer: str = self.processor.batch_decode(new, skip_special_tokens=True)[0]
        return answer.strip()


class TwoPasses:
    """The authors' flow: classify with one vision pass, generate with another."""

    def __init__(self, backbone: Backbone, bottleneck: SafetyBottleneck) -> None:
        self.backbone = backbone
        self.model, self.processor = backbone.model, copy.deepcopy(backbone.processor)
        self.tokenizer = self.processor.tokenizer
        self.bottleneck = bottleneck.to(backbone.device, self.model.dtype).eval()
        self.taxonomy, self.policy = Taxonomy.default(), Policy.default()

    @torch.no_grad()
    def classify(self, pixels: Tensor, text: str) -> str | None:
        """The hint for an image ``[1, 3, height, width]`` beside a text; None if it is safe."""
        config = self.model.config
        hidden = self.model.get_encoder(modality="image")(pixels, output_hidden_states=True)
        h_o = hidden.hidden_states[config.vision_feature_layer][:, 1:]  # [1, N, Dv]
        padded = self.tokenizer(
            f"{self.tokenizer.bos_token}{text}",
            add_special_tokens=False,
            padding="max_length",
            padding_side="right",
            max_length=PADDED,
            truncation=True,
            return_tensors="pt",
        ).to(self.backbone.device)
        h_t = self.model.get_input_embeddings()(padded["input_ids"])  # [1, PADDED, D]
        output = self.bottleneck(h_o, h_t, padded["attention_mask"])
        level = self.taxonomy.levels[int(output.level_logits.argmax())]
        type_ = self.taxonomy.types[int(output.type_logits.argmax())]
        if level == self.taxonomy.safe_level or type_ == self.taxonomy.clean:
            return None
        return self.policy.hints[level].format(type=self.taxonomy.label(type_))

    def reply(self, image: bytes, text: str, tokens: int) -> str:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        hint = self.classify(pixels, text)
        words = text if hint is None else f"{text}\n{hint}"
        content = [{"type": "image"}, {"type": "text", "text": words}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        mark = self.processor.image_token
        inputs = self.tokenizer(
            prompt.replace(mark, mark * self.backbone.image_tokens),
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.model.device)
        ids = self.model.generate(
            **inputs, pixel_values=pixels, max_new_tokens=tokens, do_sample=False
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answer: str = self.processor.batch_decode(new, skip_special_tokens=True)[0]
        return answer.strip()


def bottleneck_for(backbone: Backbone, config: ConceptsConfig, **changes: Any) -> SafetyBottleneck:
    """Random weights of the configured size that find every request safe."""
    sizes = config.model_dump(include=set(SIZES))
    bottleneck = SafetyBottleneck(
        BottleneckConfig(backbone.vision_width, backbone.text_width, **sizes, **changes)
    )
    with torch.no_grad():
        bottleneck.head.to_level.bias[0] = 100.0
    return bottleneck.to(backbone.device)


def build(
    shape: Shape, device: torch.device, config: Stage1Config
) -> tuple[Plain, PsaVlm, TwoPasses]:
    """The three rivals, on the same weights."""
    torch.manual_seed(0)
    model, processor = shape.base(device)
    backbone = Backbone(twin(model), copy.deepcopy(processor))
    add_safety_tokens(backbone, config.tokens.count)
    ours = PsaVlm(backbone, bottleneck_for(backbone, config.concepts))
    first = bottleneck_for(backbone, config.concepts, pooling="first")
    return Plain(model, processor), ours, TwoPasses(backbone, first)


def refusing() -> Policy:
    """The default policy, but the highest level is refused."""
    rules = {"*": {"low": "hint", "medium": "hint", "high": "refuse"}}
    return Policy.model_validate(Policy.default().model_dump() | {"name": "strict", "rules": rules})


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count (30)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (3)")
    options = parser.parse_args(argv)
    device = device_for(parser, options)
    shape = SHAPES[options.shape]
    plain, ours, two = build(shape, device, shape.config(*options.set))
    (sample,) = evaluation_samples("compositions", "harmless", 1, 0)
    stream = io.BytesIO()
    shape.write(sample.images[0], stream)
    image, strict, numbers = stream.getvalue(), refusing(), count()

    def question() -> str:
        return f"{sample.question} ({next(numbers)})"  # never the same: ours remembers texts

    def allowed(tokens: int) -> None:
        reply = ours.reply(image, question(), max_new_tokens=tokens)
        assert reply.decision.action == "allow", reply.decision

    def refused() -> None:
        reply = ours.reply(image, question(), strict, {"illegal_risk": "high"})
        assert reply.decision.action == "refuse", reply.decision

    (seen,) = ours.see_batch([image], [question()])
    (written,) = ours.answer_batch([seen], [None], TOKENS)
    assert written.tokens == TOKENS, written  # else the ratios compare other lengths
    calls: dict[str, Callable[[], object]] = {}
    for what, tokens in (("first token", 1), (f"{TOKENS} tokens", TOKENS)):
        calls[f"plain, {what}"] = lambda n=tokens: plain.reply(image, question(), n)
        calls[f"ours, {what}"] = lambda n=tokens: allowed(n)
        calls[f"two passes, {what}"] = lambda n=tokens: two.reply(image, question(), n)
    calls["ours, refused"] = refused
    seconds = interleaved(calls, options.repeats, options.warmup, device)
    real = options.shape != "testbed"
    whole = f"{TOKENS} tokens"
    ratios = [
        Ratio("ours, first token", "plain, first token", at_most=1.03 if real else 1.15),
        Ratio("two passes, first token", "ours, first token", at_least=1.05 if real else None),
        Ratio(f"ours, {whole}", f"plain, {whole}", at_most=1.03 if real else None),
        Ratio(f"two passes, {whole}", f"ours, {whole}"),
        Ratio("ours, refused", f"plain, {whole}", at_most=0.3),
    ]
    prompt = ours.backbone.prompts([[Turn("user", question())]], [1])["input_ids"]
    facts = {
        "dtype": str(ours.backbone.dtype),
        "image_tokens": ours.backbone.image_tokens,
        "safety_tokens": len(ours.backbone.safety_token_ids),
        "prompt_tokens": prompt.shape[1],
    }
    report("inference", options, device, seconds, ratios, facts)


if __name__ == "__main__":
    main()
