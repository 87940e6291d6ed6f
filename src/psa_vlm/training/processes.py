"""The processes of one training: a single one, or one for each GPU under torchrun or accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from torch import nn


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def device() -> torch.device:
    """Where this process trains: its GPU, or the CPU."""
    found: torch.device = _state().device
    return found


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


def main_first() -> AbstractContextManager[None]:
    """The main process goes through the block before the others."""
    block: AbstractContextManager[None] = _state().main_process_first()
    return block


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def unshard(model: nn.Module) -> None:
    """Give every process whole weights again, after FSDP kept a part of them on each."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
