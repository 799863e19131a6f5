"""AdamW over a list of tensors (Loshchilov and Hutter 2019, Algorithm 2): the norm of the gradients, then one pass.

Bytes: the norm reads the gradients. The update reads parameters, gradients, both moments and every average of the
parameters, and writes all of these but the gradients; a float32 parameter that is the master of a bfloat16 weight is
rounded to it in the same pass. Nothing is copied into one piece: a table on the device says where each tensor lies, as
its distance in elements from the first of its group in its list, and a program works on one block of one tensor. Sums
are taken block by block and added up in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2it.kernels.common import CompileCase, cdiv, compile_cases

BLOCK = 4096  # bytes of one program, in the widest dtype: 128 threads with two 16-byte loads of each tensor in flight


@triton.jit
def _block(table, owners, tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns this program's tensor, its place there, and which of its elements exist.

    ALIGNED: what all sizes and places are multiples of; 0: nothing is known of them.
    """
    i_tensor = tl.load(owners + tl.program_id(0))
    b_size, b_first = tl.load(table + i_tensor), tl.load(table + tensors + i_tensor)
    if ALIGNED:
        b_size = tl.multiple_of(b_size, ALIGNED)
    o_x = (tl.program_id(0) - b_first) * BLOCK + tl.arange(0, BLOCK)
    return i_tensor, o_x, o_x < b_size


@triton.jit
def _place(table, tensors, i_list: tl.constexpr, i_tensor, ALIGNED: tl.constexpr):
    """Where a tensor begins, in elements from the first one of its group in that list."""
    b_place = tl.load(table + (i_list + 2) * tensors + i_tensor)
    return tl.multiple_of(b_place, ALIGNED) if ALIGNED else b_place


@triton.jit
def square_sum_kernel(out, x, table, owners, tensors, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """out[program] = the sum of the squares of its block."""
    i_tensor, o_x, m_x = _block(table, owners, tensors, ALIGNED, BLOCK)
    b_x = tl.load(x + _place(table, tensors, 0, i_tensor, ALIGNED) + o_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(b_x * b_x))


@triton.jit
def _one_minus_power(b_log):
    """1 - exp(b_log) for b_log <= 0, to float32's rounding also near 0."""
    b_series = 1.0 + b_log * 0.125
    for i in tl.static_range(6):
        b_series = 1.0 + b_log / (7.0 - i) * b_series
    return tl.where(b_log > -0.4, -b_log * b_series, 1.0 - tl.exp(b_log))


@triton.jit
def adamw_kernel(
    parameters,
    weights,
    gradients,
    means,
    squares,
    steps,
    averages,
    shares,
    factor,
    found_inf,
    table,
    owners,
    tensors,
    lr,
    kept,
    mean_weight,
    beta2,
    square_weight,
    log_beta1,
    log_beta2,
    eps,
    AVERAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a block of one tensor. kept = 1 - lr * weight_decay. The steps are counted already.

    Where found_inf is not zero only the averages change. Weights in float32 are the parameters themselves.
    """
    i_tensor, o_x, m_x = _block(table, owners, tensors, ALIGNED, BLOCK)
    m_updated = m_x & (tl.zeros((BLOCK,), tl.float32) == tl.load(found_inf))
    p_parameter = parameters + _place(table, tensors, 0, i_tensor, ALIGNED) + o_x
    p_gradient = gradients + _place(table, tensors, 2, i_tensor, ALIGNED) + o_x
    p_mean = means + _place(table, tensors, 3, i_tensor, ALIGNED) + o_x
    p_square = squares + _place(table, tensors, 4, i_tensor, ALIGNED) + o_x
    b_step = tl.load(steps + tl.load(table + 7 * tensors + i_tensor))
    b_parameter = tl.load(p_parameter, mask=m_x)
    b_gradient = tl.load(p_gradient, mask=m_updated, other=0.0).to(tl.float32)
    b_mean = tl.load(p_mean, mask=m_updated, other=0.0)
    b_square = tl.load(p_square, mask=m_updated, other=0.0)
    if factor is not None:
        b_gradient *= tl.load(factor)
    b_mean += mean_weight * (b_gradient - b_mean)
    b_square = b_square * beta2 + square_weight * b_gradient * b_gradient
    b_size = lr / _one_minus_power(b_step * log_beta1)
    b_root = tl.sqrt(_one_minus_power(b_step * log_beta2))
    b_moved = b_parameter * kept - tl.div_rn(b_size * b_mean, tl.sqrt_rn(b_square) / b_root + eps)
    b_parameter = tl.where(m_updated, b_moved, b_parameter)
    tl.store(p_mean, b_mean, mask=m_updated)
    tl.store(p_square, b_square, mask=m_updated)
    tl.store(p_parameter, b_parameter, mask=m_updated)
    if weights.dtype.element_ty != parameters.dtype.element_ty:
        p_weight = weights + _place(table, tensors, 1, i_tensor, ALIGNED) + o_x
        tl.store(p_weight, b_parameter.to(weights.dtype.element_ty), mask=m_updated)
    for i in tl.static_range(AVERAGES):
        p_average = averages[i] + _place(table, tensors, 6 + i, i_tensor, ALIGNED) + o_x
        b_average = tl.load(p_average, mask=m_x)
        tl.store(p_average, b_average + shares[i] * (b_parameter - b_average), mask=m_x)


class Group(NamedTuple):
    """What one launch needs to know of the tensors that it takes.

    Attributes:
        first: of the tensors, its index in every list.
        programs: blocks of all tensors.
        owners: (programs,) int32, the tensor of each block.
        table: (2 + lists, tensors) int64: elements, first block, and place in every list of each tensor.
        block: elements of a program.
        aligned: elements that are 16 bytes in the widest dtype, where all tensors lie at 16 bytes and are a multiple of
            16 bytes in every dtype; else 0.
    """

    first: int
    programs: int
    owners: Tensor
    table: Tensor
    block: int
    aligned: int


_KEPT: dict[tuple[object, ...], list[Group]] = {}
_MOST_KEPT = 16


def _groups(*lists: Sequence[Tensor]) -> list[Group]:
    """Sorts tensors by their alignment and the dtypes of their index; kept until one lies elsewhere.

    Those of one index are equal in shape and layout.
    """
    pointers = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    kinds = [tuple(tensor.dtype for tensor in tensors) for tensors in zip(*lists)]
    sizes = [tensor.numel() for tensor in lists[0]]
    key = (lists[0][0].get_device(), *sizes, *kinds, *(pointer for row in pointers for pointer in row))
    groups = _KEPT.get(key)
    if groups is None:
        if len(_KEPT) >= _MOST_KEPT:
            _KEPT.clear()
        of_kind: dict[tuple[Any, ...], list[int]] = {}
        for i, size in enumerate(sizes):
            if size:
                whole = not any(size * dtype.itemsize % 16 for dtype in kinds[i])
                whole = whole and not any(row[i] % 16 for row in pointers)
                of_kind.setdefault((whole, *kinds[i]), []).append(i)
        groups = _KEPT[key] = [_group(chosen, lists, kind[0]) for kind, chosen in of_kind.items()]
    return groups


def _group(chosen: list[int], lists: Sequence[Sequence[Tensor]], whole: bool) -> Group:
    widest = max(tensors[chosen[0]].element_size() for tensors in lists)
    sizes, block = [lists[0][i].numel() for i in chosen], BLOCK // widest
    blocks = [cdiv(size, block) for size in sizes]
    begins = [0]
    for count in blocks:
        begins.append(begins[-1] + count)
    places = []
    for tensors in lists:
        first = tensors[chosen[0]]
        places.append([(tensors[i].data_ptr() - first.data_ptr()) // first.element_size() for i in chosen])
    table = torch.tensor([sizes, begins[:-1], *places])
    owners = torch.repeat_interleave(torch.arange(len(chosen), dtype=torch.int32), torch.tensor(blocks))
    device = lists[0][0].device
    if device.type == "cuda":  # from pinned memory, so that the host does not wait
        table, owners = (each.pin_memory().to(device, non_blocking=True) for each in (table, owners))
    return Group(chosen[0], begins[-1], owners, table, block, 16 // widest if whole else 0)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Dense tensors, float32 or bfloat16 -> the sum of all their squares, 0-dim float64."""
    groups = _groups(tensors)
    sums = tensors[0].new_empty(sum(group.programs for group in groups), dtype=torch.float32)
    begin = 0
    with torch.cuda.device_of(sums):
        for group in groups:
            _launch_square_sum(sums[begin : begin + group.programs], tensors[group.first], group)
            begin += group.programs
    return sums.sum(dtype=torch.float64)


def _launch_square_sum(out: Tensor, first: Tensor, group: Group) -> None:
    flags = {"ALIGNED": group.aligned, "BLOCK": group.block, "num_warps": 4}
    square_sum_kernel[(group.programs,)](out, first, group.table, group.owners, group.table.shape[1], **flags)


def adamw(
    lists: Sequence[Sequence[Tensor]],
    factor: Tensor | None,
    found_inf: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    shares: Sequence[float],
) -> None:
    """Updates dense tensors in place, those of one index laid out alike; see `d2it.training.adamw`.

    Args:
        lists: parameters, weights (the parameters themselves, or what they are rounded to in bfloat16), gradients
            (float32 or bfloat16), means, squares, steps (0-dim), and a list for every average.
        factor: 0-dim, of the gradients; None is 1.
        found_inf: 0-dim; where it is not zero, only the averages change.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        shares: what the new parameters weigh in each average.
    """
    torch._foreach_add_(list(lists[5]), [1.0 - found_inf] * len(lists[5]))
    numbers = _numbers(lr, betas, eps, weight_decay)
    with torch.cuda.device_of(found_inf):
        for group in _groups(*lists):
            first = tuple(each[group.first] for each in lists)
            _launch_adamw(first, tuple(map(float, shares)), factor, found_inf, numbers, group)


def _numbers(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> tuple[float, ...]:
    """What the kernel takes of the settings, rounded to float32 once."""
    beta1, beta2 = betas
    logs = (math.log(max(beta, 1e-300)) for beta in betas)
    return lr, 1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, *logs, eps


def _launch_adamw(
    first: tuple[Tensor, ...],
    shares: tuple[float, ...],
    factor: Tensor | None,
    found_inf: Tensor,
    numbers: tuple[float, ...],
    group: Group,
) -> None:
    """`first`: of every list, those of the averages last."""
    adamw_kernel[(group.programs,)](
        *first[:6],
        first[6:],
        shares,
        factor,
        found_inf,
        group.table,
        group.owners,
        group.table.shape[1],
        *numbers,
        AVERAGES=len(shares),
        ALIGNED=group.aligned,
        BLOCK=group.block,
        num_warps=4,
    )


def launches(
    size: int, averages: int, weights: torch.dtype = torch.float32
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The launches for one tensor without memory: of the norm, and of the update.

    Args:
        size: elements.
        averages: of the parameters.
        weights: dtype of the weights and their gradients.
    """
    x, scalar = torch.empty(size, device="meta"), torch.empty((), device="meta")
    weight = x if weights == x.dtype else torch.empty(size, dtype=weights, device="meta")
    lists = [x, weight, weight, x, x, scalar] + [x] * averages
    (of_norm,), (of_update,) = _groups([weight]), _groups(*([each] for each in lists))
    sums = torch.empty(of_norm.programs, device="meta")
    numbers = _numbers(1e-4, (0.9, 0.999), 1e-8, 0.0)
    update = partial(_launch_adamw, tuple(lists), (1e-4,) * averages, scalar, scalar, numbers, of_update)
    return partial(_launch_square_sum, sums, weight, of_norm), update


@compile_cases
def _compile_cases() -> Iterator[CompileCase]:
    for weights in (torch.float32, torch.bfloat16):
        for size in (2**20, 2**20 + 1):
            for averages in (1, 3):
                norm, update = launches(size, averages, weights)
                if averages == 1:
                    yield f"N{size}-{str(weights)[6:]}", norm
                yield f"N{size}-{str(weights)[6:]}-averages{averages}", update
