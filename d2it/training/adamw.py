"""AdamW that clips, skips, updates and averages in one pass over the weights, after one over the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from d2it.kernels.common import INTERPRET
from d2it.ops import _native
from d2it.ops._dispatch import HAS_TRITON
from d2it.training.ema import Ema, local

PREFERENCE = {"cuda": "triton", "cpu": "cpu"}
"""The backend of parameters on a device, where it can take them; PyTorch's elsewhere."""


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter 2019, Algorithm 2) with everything else of a step in its pass.

    The norm reads every gradient once. The update then reads weights, gradients, moments and averages once and writes
    them once, all but the gradients; clipping and the decision to skip are read on the device. In C++ on a CPU, in
    Triton on a GPU, by PyTorch's own kernels one after the other elsewhere. State, `state_dict` and arithmetic are
    those of torch.optim.AdamW(fused=True), so that checkpoints of either load into the other.

    A network may compute with bfloat16 weights whose float32 masters are trained: a gradient is then the weight's, in
    bfloat16, or the master's own, and the pass that updates a master rounds it to its weight.

    Args:
        parameters: what is trained; all on one device, or DTensors of one mesh.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        weights: the bfloat16 weight of each parameter that is a master, of its shape and strides.
        backend: "cpu", "triton", "torch", or None to choose.

    Raises:
        ValueError: a backend that cannot take these parameters, or a weight that is not its master's in bfloat16.

    Example:
        >>> import torch
        >>> from d2it.training.adamw import AdamW
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = AdamW([weight], lr=0.1)
        >>> weight.grad = torch.tensor([30.0, 40.0])
        >>> norm, skipped = optimizer.update(clip=1.0)
        >>> norm, skipped, weight.data
        (tensor(50.), tensor(0.), tensor([ 0.9000, -1.1000]))
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        weights: Mapping[Tensor, Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        trained = [local(p.detach()) for group in self.param_groups for p in group["params"]]
        if backend is None:
            backend = PREFERENCE.get(trained[0].device.type, "torch")
            backend = "torch" if why_not(backend, trained) else backend
        elif reasons := why_not(backend, trained):
            raise ValueError(f"backend={backend!r} cannot run AdamW: {'; '.join(reasons)}")
        self.backend = backend
        self.weights: dict[Tensor, Tensor] = dict(weights or {})
        for master, weight in self.weights.items():
            if weight.dtype != torch.bfloat16 or (weight.shape, weight.stride()) != (master.shape, master.stride()):
                raise ValueError(
                    f"weights must be bfloat16 and laid out as their masters, {tuple(master.shape)} at strides "
                    f"{master.stride()}, got {str(weight.dtype)[6:]} {tuple(weight.shape)} at {weight.stride()}"
                )
            master.grad_dtype = None  # it takes that of its weight, as it is
        self.register_load_state_dict_post_hook(_lay_out_moments)

    @torch.no_grad()
    def update(
        self, step: int = 0, *, clip: float | None = None, averages: Sequence[Ema] = ()
    ) -> tuple[Tensor, Tensor]:
        """Updates parameters, their weights, moments and averages, without a host synchronisation.

        Args:
            step: of the averages.
            clip: the norm that the update clips gradients to; None: no clipping.
            averages: of all parameters, in their order.

        Returns:
            The norm of all gradients, 0-dim, and 1.0 where it is not finite, else 0.0: weights and moments are then
            unchanged, and the averages take the weights as they are.
        """
        trained = [p for group in self.param_groups for p in group["params"]]
        for master, weight in self.weights.items():
            if weight.grad is not None:
                master.grad = weight.grad.to(master.dtype) if self.backend == "torch" else weight.grad
        if self.backend == "torch":
            gradients = [p.grad for p in trained if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if clip is not None:
                torch.nn.utils.clip_grads_with_norm_(trained, clip, norm, foreach=True)
            self.found_inf = found_inf = 1.0 - norm.isfinite().float()
            self.step()
            if self.weights:
                torch._foreach_copy_(list(self.weights.values()), list(self.weights))
            for average in averages:
                average.update(step)
            return norm, found_inf
        mine = {p: like(local(p.grad), local(p)) for p in trained if p.grad is not None}
        norm = _norm(self.backend, list(mine.values()), next(p.grad for p in mine))
        found_inf = 1.0 - norm.isfinite().float()
        # As torch.nn.utils.clip_grads_with_norm_ has it.
        factor = None if clip is None else torch.clamp(clip / (norm + 1e-6), max=1.0)
        shadows = [dict(zip(trained, average.shadow.values())) for average in averages]
        shares = [average.share(step) for average in averages]
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[], [], [], [], [], []]
            parameters, weights, gradients, means, squares, steps = lists
            self._init_group(group, parameters, [], means, squares, [], steps)
            if parameters:
                weights[:] = [self.weights.get(p, p) for p in parameters]
                gradients[:] = [mine[p] for p in parameters]
                lists.extend([shadow[p] for p in parameters] for shadow in shadows)
                numbers = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                of_rank = [[local(tensor) for tensor in tensors] for tensors in lists]
                _run(self.backend, of_rank, factor, found_inf, **numbers, shares=shares)
        still = [p for p in trained if p not in mine]
        for shadow, share in zip(shadows, shares):
            if still:
                torch._foreach_lerp_([local(shadow[p]) for p in still], [local(p) for p in still], share)
        return norm, found_inf

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, as torch.optim.AdamW does; those of weights also where it zeroes them."""
        super().zero_grad(set_to_none)
        for weight in self.weights.values():
            weight.grad = None


def why_not(backend: str, parameters: Sequence[Tensor]) -> list[str]:
    """Returns why `backend` ("cpu", "triton", "torch") cannot update these parameters; empty if it can."""
    if backend == "torch":
        return []
    if backend not in PREFERENCE.values():
        return [f"AdamW has no backend {backend!r}; it has cpu, torch, triton"]
    reasons = []
    devices = {"cpu": ("cpu",), "triton": ("cuda", "cpu", "meta") if INTERPRET else ("cuda",)}[backend]
    if backend == "cpu":
        reasons += _native.why_not("adamw", "cpu")
    elif not HAS_TRITON:
        reasons.append("Triton is not installed")
    for p in parameters:
        if p.device.type not in devices:
            reasons.append(f"it does not run on {p.device.type}")
        elif p.dtype != torch.float32:
            reasons.append(f"it updates float32, not {str(p.dtype)[6:]}")
        elif not is_dense(p):
            reasons.append("its tensors are contiguous or channels-last")
        else:
            continue
        break
    return reasons


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements lie side by side in one of PyTorch's memory formats."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def like(tensor: Tensor, layout: Tensor) -> Tensor:
    """Returns the tensor with the strides of `layout`: itself where it has them, else a copy."""
    return tensor if tensor.stride() == layout.stride() else torch.empty_like(layout).copy_(tensor)


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Moments of a file may have other strides than their parameters."""
    for p, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if not isinstance(p, DTensor):
                state[name] = like(state[name], p)


def _norm(backend: str, gradients: list[Tensor], first: Tensor) -> Tensor:
    """The norm of all gradients, over all ranks where the `first` is a DTensor."""
    if backend == "triton":
        from d2it.kernels import adamw

        squares = adamw.square_sum(gradients)
    else:
        squares = torch.empty((), dtype=torch.float64)
        torch.ops.d2it_C.square_sum(gradients, squares)
    if isinstance(first, DTensor):
        squares = DTensor.from_local(squares, first.device_mesh, [Partial()]).full_tensor()
    return squares.sqrt().float()


def _run(backend: str, lists: list[list[Tensor]], factor: Tensor | None, found_inf: Tensor, **numbers: Any) -> None:
    """Updates parameters and weights by gradients, means, squares, steps and averages, which are the lists."""
    if backend == "triton":
        from d2it.kernels import adamw

        adamw.adamw(lists, factor, found_inf, **numbers)
    else:
        betas = numbers.pop("betas")
        flat = [tensor for average in lists[6:] for tensor in average]
        values = (numbers["lr"], *betas, numbers["eps"], numbers["weight_decay"], numbers["shares"])
        torch.ops.d2it_C.adamw(*lists[:6], flat, factor, found_inf, *values)
