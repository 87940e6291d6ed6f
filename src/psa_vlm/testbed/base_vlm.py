"""The testbed's base model: a standard LLaVA that was safety-aligned in words only.

Three steps, all on `transformers.Trainer` and resumable: the vision encoder learns to tag what each
patch shows; it goes on with scenes in other palettes, so that an art style matters less; then the
projector and the language model learn to talk about what the frozen encoder sees (with text-only
safety, and with hints in words and beside harmless images). No risky image is ever refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
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
    """A LLaVA of 3.7 M parameters with random weights."""
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
        num_attention_heads=6,
        num_key_value_heads=6,
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
    for layer in model.model.language_model.layers:
        # Equal queries and keys let a word find its like from the first step on; found by training
        # alone, that takes thousands of steps in which questions about an image are guessed.
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.05)
        layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.do_sample = False
    return model


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


class Talker(Task):
    """The language-model loss, and one that gives a projected patch the embedding of its word.

    Where a patch is close to the word for what it shows, "is there a boat" is a comparison that
    the language model can learn once for all things, instead of for each.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Args: what `DialogueBatches` makes."""
        output = self.model(**batch, use_cache=False)
        loss = output.loss
        if words is not None:
            patches = nn.functional.normalize(output.image_hidden_states, dim=-1)  # [B * N, D]
            known = nn.functional.normalize(self.model.get_input_embeddings().weight, dim=-1)
            loss = loss + nn.functional.cross_entropy(10 * patches @ known.T, words.flatten())
        return {"loss": loss}


# --- build ---------------------------------------------------------------------------------------


def build_base(
    out: Path, encoder_steps: int, palette_steps: int, dialogue_steps: int, seed: int = 0
) -> Path:
    """Train the base model from nothing and save it as a plain Hugging Face checkpoint.

    Every step keeps checkpoints under `out/work`; the same call goes on where it was stopped.

    Args:
        out: folder for the checkpoint.
        encoder_steps: batches of 64 scenes for the vision encoder.
        palette_steps: the same with half of the scenes in other palettes.
        dialogue_steps: batches of 24 scenes, or of text alone, with 8 dialogues each.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    work = out / "work"
    tower = model.model.vision_tower
    tagger = PatchTagger(tower)
    lessons = Lessons(encoder_steps, seed, tagging_batch)
    _step(tagger, tagger, lessons, work / "encoder", 1e-3, seed)
    lessons = Lessons(palette_steps, seed + 1, partial(tagging_batch, repaint=0.5))
    _step(tagger, tagger, lessons, work / "palettes", 1e-3, seed)
    tower.requires_grad_(False)
    lessons = Lessons(dialogue_steps, seed + 2, DialogueBatches(processor))
    _step(Talker(model), model, lessons, work / "dialogues", 1.5e-3, seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def _step(
    task: Task, kept: nn.Module, lessons: Lessons, work: Path, rate: float, seed: int
) -> None:
    """Train, or take what an earlier call has trained; `kept` is what later steps build on."""
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
        save_model(kept, str(part))
        part.rename(weights)
    load_model(kept, str(weights))
