"""A run as a plain Hugging Face checkpoint that holds everything, and needs no base model.

Layout of the folder, which loads with plain transformers:
    config.json, *.safetensors      the base model, its LoRA merged in, with the safety tokens' rows
    tokenizer, processor, template  the chat template has the safety tokens before every image
    psa/                            the rest of the run, whose base model is the folder around it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from psa_vlm.errors import CheckpointError
from psa_vlm.model.checkpoint import INSIDE, Parts, atomic_folder, check_free, write
from psa_vlm.model.probe import is_adapter, is_quantised
from psa_vlm.model.tokens import plain_template


def export(out: Path, parts: Parts, extra: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a run as a plain checkpoint, all of it or nothing.

    Args:
        out: the folder; it must not exist.
        parts: what to write; an adapter that was not merged is afterwards.
        extra: writes further files into `out`/psa.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: it can't be written, or the language model is quantised.
        NoLanguageModel: the backbone is a dual encoder.
    """
    check_free(out)
    parts.backbone.check_writes("an export")
    if is_quantised(parts.backbone.model):
        raise CheckpointError(f"{out}: the language model is quantised; load the run without bits")
    if parts.adapter is not None:
        with warnings.catch_warnings():  # where a run was loaded it is merged already
            warnings.filterwarnings("ignore", "All adapters are already merged", UserWarning)
            parts.adapter.merge_adapter()
    model, processor = parts.backbone.model, parts.backbone.processor
    state = {  # without what the adapter put around the merged weights
        name.replace(".base_layer.", "."): weight
        for name, weight in model.state_dict().items()
        if not is_adapter(name)
    }
    with atomic_folder(out) as folder:
        try:
            model.save_pretrained(folder, state_dict=state)
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
        write(inside, replace(parts, adapter=None), base=None)
        extra(inside)
