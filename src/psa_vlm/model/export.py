"""A run as a plain Hugging Face checkpoint that holds everything, and needs no base model.

Layout of the folder, which loads with plain transformers:
    config.json, *.safetensors      the base model, its LoRA merged in, with the safety tokens' rows
    tokenizer, processor, template  the chat template has the safety tokens before every image
    psa/                            the rest of the run, whose base model is the folder around it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from psa_vlm.errors import CheckpointError
from psa_vlm.model.checkpoint import INSIDE, Parts, atomic_folder, check_free, write
from psa_vlm.model.tokens import plain_template


def export(out: Path, parts: Parts, extra: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a run as a plain checkpoint, all of it or nothing.

    Args:
        out: the folder; it must not exist.
        parts: what to write. Its adapter is merged for good: it is None afterwards.
        extra: writes further files into `out`/psa.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: it can't be written.
    """
    check_free(out)
    if parts.adapter is not None:
        with warnings.catch_warnings():  # it is merged already where a run was loaded
            warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
            parts.backbone.model = parts.adapter.merge_and_unload()
        parts.adapter = None
    model, processor = parts.backbone.model, parts.backbone.processor
    with atomic_folder(out) as folder:
        try:
            model.save_pretrained(folder)
        except ValueError as error:  # of a generation config that transformers finds wanting
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{out}: transformers can't save the model ({reason})") from error
        own = processor.chat_template
        processor.chat_template = plain_template(parts.backbone)
        try:
            processor.save_pretrained(folder)
        finally:
            processor.chat_template = own
        inside = folder / INSIDE
        inside.mkdir()
        write(inside, parts, base=None)
        extra(inside)
