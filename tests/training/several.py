"""One of several processes of a training on the CPU, with the environment that torchrun gives it.

Started through `runpy` with the globals `rank`, `world`, `port`, `what`, and what that one needs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def stages(first: Any, second: Any, samples: Any, **rest: Any) -> None:
    """Both stages, one after the other."""
    from psa_vlm.training.stage1 import run_stage1
    from psa_vlm.training.stage2 import run_stage2

    run_stage1(first, samples)
    run_stage2(second, samples)


def sharding(base: Path, samples: Any, world: int, out: Path, **rest: Any) -> None:
    """A step of stage II with the weights in parts on each process, beside one with whole ones."""
    import peft
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from psa_vlm.model.backbone import Backbone
    from psa_vlm.training import language
    from psa_vlm.training.processes import unshard

    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    backbone = Backbone.from_pretrained(base)
    config = peft.LoraConfig(
        r=2, target_modules=backbone.spec.language_layers, init_lora_weights=False
    )
    task = language._Answers(language._with_adapter(backbone, config), backbone)
    rows = language.dialogues(samples)
    batch = language.Collate(backbone)(rows)

    def step() -> tuple[float, dict[str, Any]]:
        task.zero_grad()
        loss = task(**batch)["loss"]
        loss.backward()
        trained = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
        return loss.item(), {
            name: grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
            for name, grad in trained.items()
        }

    loss, gradients = step()
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    layers = [one for one in task.modules() if type(one).__name__ in task._no_split_modules]
    mesh = init_device_mesh("cpu", (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)
    held = sum(p.to_local().numel() for p in task.parameters())
    sharded_loss, sharded = step()
    unshard(task)
    after = dict(task.named_parameters())
    figures = {
        "layers": len(layers),
        "held": held / sum(one.numel() for one in before.values()),
        "losses": [loss, sharded_loss],
        "gradients": max((gradients[name] - sharded[name]).abs().max().item() for name in sharded),
        "largest": max(gradient.abs().max().item() for gradient in gradients.values()),
        "same": all(torch.equal(before[name], after[name]) for name in before),
    }
    out.write_text(json.dumps(figures))
    distributed.destroy_process_group()


given = dict(globals())
os.environ |= {
    "RANK": str(given["rank"]),
    "LOCAL_RANK": str(given["rank"]),
    "WORLD_SIZE": str(given["world"]),
    "LOCAL_WORLD_SIZE": str(given["world"]),
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(given["port"]),
}
given[given["what"]](**given["needs"])
