"""The testbed's base model: a standard LLaVA that was safety-aligned in words only.

Six parts, all on `transformers.Trainer` and resumable. The vision encoder learns to tag what each
patch shows, and goes on with scenes in other palettes, so that an art style matters less. From then
on it is frozen: the projector learns to name patches, and with it the language model learns to look
for what a question names, and then to talk (with text-only safety, and with hints in words and
beside harmless images), at last with more of what is hardest: refusals in words, and looking while
reading a hint. No risky image is ever refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.lessons import (
    FORGED,
    PATCH,
    DialogueBatches,
    Lessons,
    naming_batch,
    tag_sizes,
    tagging_batch,
)
from psa_vlm.testbed.scenes import SIZE
from psa_vlm.testbed.world import world
from psa_vlm.training.config import Schedule
from psa_vlm.training.fit import Task, Work, fit

SPECIAL = ("<pad>", "<unk>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# --- tokenizer, processor, model -----------------------------------------------------------------


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)


def vocabulary() -> list[str]:
    """Every word that the testbed can say or read, in alphabetical order."""
    table, taxonomy, policy = world().table, Taxonomy.default(), Policy.default()
    texts = [
        *_strings(table),
        *(kind.word for kind in world().kinds.values()),
        *(taxonomy.label(name) for name in taxonomy.types),
        *policy.hints.values(),
        FORGED,
    ]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    words: set[str] = set()
    for text in texts:
        for mark in ("x", "bare", "list", "place", "sign", "sort", "number", "type"):
            text = text.replace("{" + mark + "}", " ")
        words.update(word.lower() for word, _ in split.pre_tokenize_str(text))
    return sorted(words)


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer, CLIP image processor at 96 pixels, and the chat template."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", "<image>"],
        padding_side="left",
        model_max_length=1024,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA of 4.2 M parameters with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=96,  # wide and slowly turning, so that words can be compared over a distance
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _find_and_copy(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.do_sample = False
    return model


@torch.no_grad()
def _find_and_copy(model: LlavaForConditionalGeneration) -> None:
    """Random weights with which a word finds its like, takes over what stands there, and says it.

    Queries equal keys, an attention's output turns its values back, and the head repeats the
    embeddings. From weights without such ties the same is learned several times as slowly.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    nn.init.normal_(embeddings.weight, std=0.25)
    model.lm_head.weight.copy_(0.3 * embeddings.weight)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.q_proj.weight, std=0.05)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        nn.init.normal_(attention.v_proj.weight, std=0.03)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)


# --- what is trained -----------------------------------------------------------------------------


class PatchTagger(Task):
    """The vision encoder with a linear head for each tag of a patch."""

    def __init__(self, encoder: CLIPVisionModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in tag_sizes())

    def forward(self, pixel_values: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """Args: pixel_values [B, 3, S, S]; tags [B, N, H] for N patches and H heads."""
        hidden = self.encoder(pixel_values).last_hidden_state[:, 1:]  # [B, N, Dv]
        losses = [
            nn.functional.cross_entropy(head(hidden).flatten(0, 1), tags[..., i].flatten())
            for i, head in enumerate(self.heads)
        ]
        return {"loss": torch.stack(losses).sum()}


class PatchNamer(Task):
    """The projector learns to give a patch the embeddings of the words for what it shows and where.

    "Is there a boat" is then a comparison, which the language model learns once for all things.
    """

    known: Tensor

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower: nn.Module = model.model.vision_tower
        self.projector: nn.Module = model.model.multi_modal_projector
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        known = nn.functional.normalize(embeddings.weight.detach(), dim=-1)  # [V, D]
        self.register_buffer("known", known)

    def forward(self, pixel_values: Tensor, words: Tensor) -> dict[str, Tensor]:
        """Args: pixel_values [B, 3, S, S]; words [B, N, W] token ids, -100 for background."""
        patches = self.projector(self.tower(pixel_values).last_hidden_state[:, 1:])  # [B, N, D]
        logits = 4 * patches @ self.known.T  # [B, N, V]
        logits = logits[:, :, None].expand(-1, -1, words.shape[-1], -1)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 2), words.flatten())}


class Talker(Task):
    """The language-model loss of the whole model."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Args: what `DialogueBatches` makes."""
        return {"loss": self.model(**batch, use_cache=False).loss}


# --- build ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """How many batches each part of the base model's training takes."""

    encoder: int = 1400
    """Of 64 scenes, for the vision encoder."""
    palettes: int = 1000
    """The same, half of the scenes in other palettes."""
    words: int = 150
    """Of 32 scenes, for the projector."""
    looking: int = 700
    """Of 24 scenes with 8 questions each, for projector and language model."""
    dialogues: int = 1000
    """Of 24 scenes, or of text alone, with 8 dialogues each."""
    revision: int = 300
    """The same with more text alone, and more hints beside plain questions, at a lower rate."""


def build_base(out: Path, steps: Steps, seed: int = 0) -> Path:
    """Train the base model from nothing and save it as a plain Hugging Face checkpoint.

    Every part keeps checkpoints under `out/work`; the same call goes on where it was stopped.

    Args:
        out: folder for the checkpoint.
        steps: how long to train.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    work = out / "work"
    tagger, talker = PatchTagger(model.model.vision_tower), Talker(model)
    naming = partial(naming_batch, tokenizer=processor.tokenizer)
    repainting = partial(tagging_batch, repaint=0.5)
    revision = DialogueBatches(processor, images=0.6, plain=0.8, hinted=0.9)
    parts: list[tuple[str, Task, int, Callable[[Random], dict[str, Tensor]], float]] = [
        ("encoder", tagger, steps.encoder, tagging_batch, 1e-3),
        ("palettes", tagger, steps.palettes, repainting, 1e-3),
        ("words", PatchNamer(model), steps.words, naming, 2e-3),
        ("looking", talker, steps.looking, DialogueBatches(processor, looking=True), 1e-3),
        ("dialogues", talker, steps.dialogues, DialogueBatches(processor), 1.2e-3),
        ("revision", talker, steps.revision, revision, 3e-4),
    ]
    for number, (name, task, count, make, rate) in enumerate(parts):
        model.model.vision_tower.requires_grad_(task is tagger)
        _step(task, Lessons(count, seed + number, make), work / name, rate, seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def _step(task: Task, lessons: Lessons, work: Path, rate: float, seed: int) -> None:
    """Train a part, or take what an earlier call has trained."""
    weights = work.with_suffix(".safetensors")
    if not weights.exists():
        schedule = Schedule(
            epochs=1,
            batch_size=1,  # an item is a whole batch
            learning_rate=rate,
            warmup_steps=100,
            weight_decay=0.01,
            log_every=50,
            checkpoint_every=250,
        )
        fit(task, lessons, lambda items: items[0], schedule, Work(work, seed, report_to=()))
        part = weights.with_suffix(".part")
        save_file(task.state_dict(), part)
        part.rename(weights)
    task.load_state_dict(load_file(weights))
