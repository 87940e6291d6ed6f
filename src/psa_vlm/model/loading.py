"""Checkpoints into memory: safetensors only, no remote code, the language model small if wanted."""

from __future__ import annotations

import re
from importlib.util import find_spec
from os import PathLike
from typing import Any, Literal

import torch
from torch import nn

from psa_vlm.errors import CheckpointError, ConfigError, MissingExtra
from psa_vlm.model.families import encoder_for, spec_for

Attention = Literal["eager", "sdpa", "flash_attention_2"]
Bits = Literal[4, 8]


def load(
    path: str | PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: Attention | None = None,
    bits: Bits | None = None,
) -> tuple[Any, Any]:
    """Model and processor of a checkpoint; see `psa_vlm.model.backbone.Backbone.from_pretrained`.

    Raises:
        CheckpointError: it can't be loaded, is no vision-language model, or its family is unknown.
        ConfigError: `bits` where there is no GPU, or no language model.
        MissingExtra: `bits` without bitsandbytes.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(path)
        _check_family(path, config.model_type)
        writes = encoder_for(config.model_type) is None
        if bits is not None:
            if not writes:
                raise ConfigError(f"bits is {bits}: {path} has no language model; leave bits out")
            options |= _quantised(config, bits, dtype, device)
        processor = AutoProcessor.from_pretrained(path)
        kind: Any = AutoModelForImageTextToText if writes else AutoModel
        model = kind.from_pretrained(
            path, dtype="auto" if dtype is None else dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError) as error:  # some processors need torchvision
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"can't load a vision-language model from {path}: {reason}"
        ) from error
    return model if bits else model.to(device or "cpu"), processor


def _check_family(path: str | PathLike[str], model_type: str) -> None:
    if encoder_for(model_type) is not None:
        return
    try:
        spec_for(model_type)
    except CheckpointError as error:
        from transformers.models.auto import modeling_auto as known

        if model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(
            f"{path}: a model of type {model_type} does not read images and text; give the folder"
            " or hub id of a vision-language model"
        ) from None


def _quantised(
    config: Any, bits: Bits, dtype: torch.dtype | None, device: torch.device | str | None
) -> dict[str, Any]:
    """What `from_pretrained` is told so that the language model alone becomes small."""
    if not torch.cuda.is_available():
        raise ConfigError(f"bits is {bits}: needs a CUDA GPU, and there is none; leave bits out")
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quantize")
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            llm_int8_skip_modules=kept_whole(config),  # read for 4 bits too
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype or config.dtype or torch.bfloat16,
        ),
        "device_map": {"": device or "cuda"},
    }


def kept_whole(config: Any) -> list[str]:
    """The linear layers that are never quantised: all but the language model's own.

    Vision encoder and projector stay as they are, and so the bottleneck sees the same h_o.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    layers = re.compile(spec_for(config.model_type).language_layers)
    linear = (name for name, one in model.named_modules() if isinstance(one, nn.Linear))
    return [name for name in linear if not layers.fullmatch(name)]
