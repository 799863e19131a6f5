"""How a model is distributed over the ranks: DDP, or fully sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from d2it.distributed import World
from d2it.models.layers import Modulation


def spread(
    losses: nn.Module, network: nn.Module, blocks: list[nn.Module], world: World, parallel: str, bf16: bool
) -> nn.Module:
    """Returns the losses ready for this world: as they are, in DDP, or with their parts fully sharded (FSDP2).

    Args:
        losses: what is trained.
        network: the model in it.
        blocks: of the network, sharded one by one.
        world: the ranks.
        parallel: "ddp" or "fsdp".
        bf16: whether FSDP2 gathers bf16 copies for the blocks.

    FSDP2 keeps the float32 master weights sharded; the blocks gather bf16 copies, and gradients are reduced in
    float32. The modulations and what lies outside the blocks (embedders, final layers) stay float32: their rounding
    would reach every token.
    """
    if parallel == "fsdp":
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in blocks:
            for part in block.modules():
                if isinstance(part, Modulation):
                    fully_shard(part, mesh=mesh)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh)
        for part in losses.children() if losses is not network else ():
            if part is not network and list(part.parameters()):  # such as REPA's projector
                fully_shard(part, mesh=mesh)
        return losses
    if world.size == 1:
        return losses
    ids = [world.device.index] if world.device.type == "cuda" else None
    # Buffers never change in training. torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    quiet: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(losses, device_ids=ids, gradient_as_bucket_view=True, **quiet)


@contextlib.contextmanager
def gradient_sync(losses: nn.Module, now: bool) -> Iterator[None]:
    """Reduces the gradients of the backward in this context over the ranks if `now`, or leaves them for later."""
    for part in (losses, *losses.children()):
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now)
    if isinstance(losses, DistributedDataParallel) and not now:
        with losses.no_sync():
            yield
    else:
        yield
