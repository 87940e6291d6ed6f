"""Reads the parameters of the authors' research code into our modules.

Their names: ``safety_query_tokens`` (tokens 1), ``safety_query_tokens_2`` (tokens 2, which belong
to the language model's side), ``safe_mm_projector.*`` (the C-Abstractor) and ``safe_part.*`` (the
head). Every size is read from the tensors; only the number of heads and the query grid leave no
trace in them.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psa_vlm.errors import CheckpointError
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck

TOKENS_1 = "safety_query_tokens"
TOKENS_2 = "safety_query_tokens_2"
PICKLED = (".bin", ".pt", ".pth")
"""Endings of torch's own format, of which tensors alone are read."""

_OURS = re.compile(rf"(?:.*\.)?({TOKENS_1}|{TOKENS_2}|(?:safe_mm_projector|safe_part)\..+)")
_logger = logging.getLogger(__name__)
# Theirs count blocks from b1, and MLP layers in steps of two with the activation between.
_RENAMES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (TOKENS_1, lambda m: "tokens"),
    (
        r"safe_mm_projector\.proj\.net\.([02])\.b([1-9]\d*)\.(.+)",
        lambda m: f"projector.stage{1 + int(m[1]) // 2}.{int(m[2]) - 1}.{_block(m[3])}",
    ),
    (
        r"safe_mm_projector\.proj\.readout\.(\d*[02468])\.(.+)",
        lambda m: f"projector.readout.{int(m[1]) // 2}.{m[2]}",
    ),
    (r"safe_part\.cross_attention\.(.+)", lambda m: f"head.attention.{m[1]}"),
    (r"safe_part\.safety_head\.(.+)", lambda m: f"head.to_level.{m[1]}"),
    (r"safe_part\.other_head\.(.+)", lambda m: f"head.to_type.{m[1]}"),
)


def read(path: Path) -> dict[str, Tensor]:
    """The safety modules' tensors of a checkpoint file, under the authors' names.

    What stands before a name ("model.safe_part...") goes; tensors of other modules are left out,
    with a warning that counts them.

    Args:
        path: safetensors; or .bin, .pt or .pth, of which nothing but tensors is unpickled.

    Raises:
        CheckpointError: it can't be read, or holds no tensor of theirs.
    """
    try:
        state: Any = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix in PICKLED
            else load_file(path)
        )
        held = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    except (OSError, EOFError, SafetensorError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: can't be read as tensors ({reason})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is damaged, or holds more than tensors, and nothing else is unpickled; save"
            " its state dict as safetensors"
        ) from error
    ours = {match[1]: held[key] for key in held if (match := _OURS.fullmatch(key))}
    if not ours:
        raise CheckpointError(
            f"{path}: holds none of the authors' safety modules ({TOKENS_1}, {TOKENS_2},"
            " safe_mm_projector, safe_part)"
        )
    if others := [key for key in held if not _OURS.fullmatch(key)]:
        _logger.warning(
            "%s: left out %d tensors of other modules (%s, ...); if they were trained, the base"
            " model must hold them",
            *(path, len(others), others[0]),
        )
    return ours


def load(
    state: Mapping[str, Tensor], *, heads: int = 8, queries: tuple[int, int] | None = None
) -> SafetyBottleneck:
    """Build a :class:`SafetyBottleneck` with ``pooling="first"`` from the authors' state.

    Args:
        state: tensors under the authors' names.
        heads: attention heads, which their tensors do not tell.
        queries: grid of the safety features (rows, columns); None keeps the image's grid.

    Raises:
        CheckpointError: names every key that is unknown, missing or of another shape.
    """
    ours = {_rename(key): tensor for key, tensor in state.items() if key != TOKENS_2}
    try:
        config = BottleneckConfig(
            vision_width=ours["projector.stage1.0.conv1.conv.weight"].shape[1],
            hidden=ours["projector.stage1.0.conv1.conv.weight"].shape[0],
            text_width=ours["tokens"].shape[-1],
            tokens=ours["tokens"].shape[-2],
            levels=ours["head.to_level.weight"].shape[0],
            types=ours["head.to_type.weight"].shape[0],
            depth=_count(ours, r"projector\.stage1\.(\d+)\."),
            readout_depth=_count(ours, r"projector\.readout\.(\d+)\."),
            heads=heads,
            pooling="first",
            queries=queries,
        )
    except KeyError as error:
        raise CheckpointError(
            f"official checkpoint has no tensor for {error.args[0]}: pass the authors' safety "
            f"modules (tokens, safe_mm_projector, safe_part), not {sorted(state)[:3]}..."
        ) from None
    with torch.random.fork_rng(devices=[]):  # the initial values are all overwritten
        bottleneck = SafetyBottleneck(config)
    _check(bottleneck.state_dict(), ours, {_rename(key): key for key in state})
    bottleneck.load_state_dict(ours)
    return bottleneck.eval()


def official_prompt_tokens(state: Mapping[str, Tensor]) -> Tensor:
    """Safety tokens (2) ``[K, D]``: the embedding rows that stand before the image in the prompt.

    Raises:
        CheckpointError: if the state holds none.
    """
    if TOKENS_2 not in state:
        raise CheckpointError(f"official checkpoint has no {TOKENS_2}, the safety tokens (2)")
    return state[TOKENS_2].flatten(0, -2)


def _rename(key: str) -> str:
    """Our name for the authors' key; an unknown key comes back marked, so that it fits nowhere."""
    for pattern, ours in _RENAMES:
        if match := re.fullmatch(pattern, key):
            return ours(match)
    return f"unknown {key}"


def _block(name: str) -> str:
    return name.replace(".bn.", ".norm.").replace("downsample.", "shortcut.")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})


def _check(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], names: Mapping[str, str]
) -> None:
    problems = [f"unknown {names[key]}" for key in given if key not in wanted]
    problems += [f"missing {key}" for key in wanted if key not in given]
    problems += [
        f"{names[key]} has shape {list(given[key].shape)}, expected {list(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if problems:
        raise CheckpointError(f"official checkpoint does not fit: {'; '.join(problems)}")
