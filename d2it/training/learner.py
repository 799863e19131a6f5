"""Something trained: a network with its losses, its optimiser and the average of its weights."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from d2it.devices import keep_freed_memory
from d2it.distributed import World
from d2it.models.dit import TransformerConfig
from d2it.models.dvae import DynamicVAEConfig
from d2it.models.precision import why_float32
from d2it.training.adamw import AdamW
from d2it.training.config import LatentStageConfig, StageConfig
from d2it.training.ema import Ema, PowerEma, local, snapshot_folder
from d2it.training.float8 import to_float8
from d2it.training.masters import Masters, linears
from d2it.training.parallel import gradient_sync, spread

if TYPE_CHECKING:
    from d2it.models.base import Model

Batch = dict[str, Any]


def learning_rate(settings: StageConfig, step: int, peak: float | None = None) -> float:
    """Returns the rate of this step: linear warm-up to `peak` (`settings.lr`), then constant or cosine to zero."""
    rate = settings.lr if peak is None else peak
    if step < settings.warmup:
        return rate * (step + 1) / settings.warmup
    if settings.schedule == "cosine":
        share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        return rate * 0.5 * (1 + math.cos(math.pi * share))
    return rate


def why_fp32(settings: StageConfig, world: World, config: TransformerConfig | DynamicVAEConfig) -> str | None:
    """Returns why a stage trains the network of a configuration in float32, or None where in bfloat16 autocast.

    The same on all ranks, whatever their CPUs are; called by all of them.
    """
    if settings.precision != "auto":
        return None if settings.precision == "bf16" else "precision is fp32"
    return next(filter(None, world.gather(why_float32(config, world.device))), None)


def has_masters(settings: StageConfig, device: torch.device, bf16: bool) -> bool:
    """Returns whether a stage holds the blocks' weights in bfloat16, with float32 masters in the optimiser.

    Args:
        settings: of the stage.
        device: where it trains.
        bf16: whether it computes in bfloat16 autocast.
    """
    if settings.weights == "auto":
        # FSDP2 and float8 round weights themselves. On a CPU it would be worth 2 % of a step (docs/scaling.md).
        return bf16 and device.type == "cuda" and settings.parallel == "ddp" and settings.float8 is None
    return settings.weights == "bfloat16"


def snapshot_sigmas(settings: StageConfig) -> list[float]:
    """Returns the widths of the power-function averages that the stage keeps."""
    kept = isinstance(settings, LatentStageConfig) and settings.snapshot_every
    return cast(LatentStageConfig, settings).snapshot_sigmas if kept else []


class Learner:
    """Something trained: a module with its optimiser and the average of its weights.

    Args:
        name: prefix of its figures and of its tensors in a checkpoint.
        losses: the module, `batch -> (loss, logs, batch for the next learner)`. `logs` are 0-dim device tensors;
            nothing in it may wait for the device.
        settings: of the stage.
        world: the ranks.
        bf16: whether it computes in bfloat16 autocast.
        network: the model in `losses`, whose blocks are compiled, recomputed and sharded one by one; None: `losses`
            itself, as one.
        peak: learning rate, where it is not `settings.lr`.
    """

    def __init__(
        self,
        name: str,
        losses: nn.Module,
        settings: StageConfig,
        world: World,
        bf16: bool,
        network: Model | None = None,
        peak: float | None = None,
    ) -> None:
        self.name, self.settings, self.world, self.bf16, self.peak = name, settings, world, bf16, peak
        if world.device.type == "cpu":
            keep_freed_memory()
        self.losses = losses.to(world.device)
        self.network: nn.Module = losses if network is None else network
        self.kind = type(self.network)  # FSDP2 changes the class
        blocks = [] if network is None else network.transformer_blocks()
        if network is not None:
            network.gradient_checkpointing = settings.activation_checkpointing
            if settings.float8 is not None:
                to_float8(blocks, settings.float8, world.device, f"{name}.float8")
            if settings.compile:
                # Left on, it would cut each block's graph at the borders of DDP's buckets.
                torch._dynamo.config.optimize_ddp = False
                network.compile_blocks()
        rounded = linears(blocks) if has_masters(settings, world.device, self.bf16) else []
        self.masters = Masters(rounded, added=world.size > 1 or settings.accumulate > 1)
        with self.masters.in_place():
            self.module = spread(self.losses, self.network, blocks, world, settings.parallel, self.bf16)
            self.parameters = [p for p in self.losses.parameters() if p.requires_grad]
            self.ema = Ema(self.losses, settings.ema)
            self.powers = [PowerEma(self.losses, sigma) for sigma in snapshot_sigmas(settings)]
        self.optimizer = AdamW(
            self.parameters,
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            weights=self.masters.weights,
        )
        self.masters.round()  # DDP has given the masters the first rank's values
        # Steps skipped in all; in a row up to now; in a row at worst since the last report.
        self.guard = torch.zeros(3, device=world.device)

    def backward(self, batch: Batch, last: bool) -> tuple[dict[str, Tensor], Batch]:
        """Adds the gradients of one micro-batch, and reduces them over the ranks with the step's last one."""
        with gradient_sync(self.module, last):
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                loss, logs, batch = self.module(batch)
            (loss / self.settings.accumulate).backward()
        return logs, batch

    @torch.no_grad()
    def evaluate(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Returns the figures of a batch under the averaged weights, from random numbers of its own; trains nothing."""
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        eager = torch.compiler.set_stance("force_eager") if self.settings.compile else contextlib.nullcontext()
        with self.averaged(), eager, torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                return self.losses(batch)[1]

    @contextlib.contextmanager
    def averaged(self, average: Ema | None = None) -> Iterator[None]:
        """Gives the network the averaged weights, in float32, for as long as the context lasts."""
        with self.masters.in_place(), (average or self.ema).applied():
            yield

    def update(self, step: int) -> Tensor:
        """Updates weights and averages, without a host synchronisation; returns the gradient's norm.

        A norm that is not finite skips the update inside the kernel. Gradients are reduced before, so every rank has
        the same norm and takes the same decision.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, step, self.peak)
        norm, bad = self.optimizer.update(step, clip=self.settings.clip, averages=[self.ema, *self.powers])
        self.optimizer.zero_grad(set_to_none=True)
        total, streak, worst = self.guard.unbind()
        streak = (streak + 1) * bad
        self.guard = torch.stack([total + bad, streak, torch.maximum(worst, streak)])
        return norm

    def state(self) -> dict[str, Any]:
        """Returns the tensors under their names in the model, weights in float32: the same for any number of ranks, DDP
        or FSDP2."""
        with self.masters.in_place():
            model, optimizer = get_state_dict(self.losses, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "ema": self.ema.shadow, "guard": self.guard}
        return state | {f"power{i}": average.shadow for i, average in enumerate(self.powers)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned, after a checkpoint was read into it (average and guard: in place)."""
        with self.masters.in_place():
            set_state_dict(
                self.losses, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        self.masters.round()

    @torch.no_grad()
    def not_finite(self) -> str | None:
        """Returns the name of a tensor of weights, average or moments that is not finite; waits for the device."""
        named = {f"the weights {name}": p.detach() for name, p in self.ema.parameters.items()}
        for average in (self.ema, *self.powers):
            named |= {f"{average.title} of {name}": shadow for name, shadow in average.shadow.items()}
        for name, p in self.ema.parameters.items():
            named |= {f"{key} of {name}": t for key, t in self.optimizer.state.get(p, {}).items()}
        mine = {name: local(tensor) for name, tensor in named.items()}
        mine = {name: tensor for name, tensor in mine.items() if tensor.numel()}
        largest = torch.stack([n.float() for n in torch._foreach_norm(list(mine.values()), float("inf"))])
        bad = largest.isfinite().logical_not().tolist()
        return next(itertools.compress(mine, bad), None)

    def snapshot(self, run: str | Path, step: int) -> None:
        """Writes the power-function averages after `step` steps; called on all ranks."""
        for average in self.powers:
            self.share(snapshot_folder(run, self.name, step, average.sigma), average)

    def share(self, folder: Path, average: Ema | None = None) -> None:
        """Writes the network with its averaged weights as safetensors, from rank 0; called on all ranks."""
        with self.averaged(average):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.network, options=options)

            def write() -> None:
                if self.world.first:
                    model = cast("type[Model]", self.kind)(self.network.config)
                    model.load_state_dict(state)
                    model.vae_sha256 = cast("Model", self.network).vae_sha256
                    model.save_pretrained(folder)

            # In here: on a CPU the state is the parameters themselves, which get their own values back afterwards.
            self.world.together(write)
