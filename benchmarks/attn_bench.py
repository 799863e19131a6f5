"""Window attention with a learnable bias, on packed windows, beside its alternatives.

python benchmarks/attn_bench.py [--only 'n64-*'] [--model D2iT-XL]

Every contender takes packed rows and slots and returns packed rows: a rival first copies the rows into whole windows
and afterwards out of them, except at fill 1, where the rows already are the windows. A model that keeps all cells and
masks them takes the rivals' times at fill 1, whatever its fill.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
import torch.nn.functional as F
from bench import Bench, Cost, Run, Skip, own
from torch import Tensor

from d2it import ops

MODELS = {"D2iT-S": (6, 64), "D2iT-B": (12, 64), "D2iT-L": (16, 64), "D2iT-XL": (16, 72)}


def inputs(n: int, heads: int, width: int, fill: float, cells: int, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """qkv (T, 3, H, D), bias (1, H, n, n), slots (W, n); regions of 2 x 2 cells are fine at random, at `fill`."""
    device = machine.device()
    rng = torch.Generator(device).manual_seed(seed)
    side = int(n**0.5)
    grid = max(32, side)
    images = cells // grid**2
    regions = images * (grid // 2) ** 2
    fine = torch.rand(regions, generator=rng, device=device).argsort() < round(fill * regions)
    grain_map = fine.to(torch.int64).reshape(images, grid // 2, grid // 2)
    rows = 4 * round(fill * regions)
    plan = ops.plan_tokens(grain_map, window=side, capacity=rows, backend="reference")

    cells_of_rows = (plan.slots >= 0).flatten().nonzero().flatten()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    return {
        "qkv": normal(rows, 3, heads, width).to(dtype),
        "bias": normal(1, heads, n, n),
        "slots": plan.slots,
        # For the rivals, made beforehand: where each row lies in the windows, its window and its position there, and a
        # mask of what exists.
        "cells": cells_of_rows,
        "window": cells_of_rows // n,
        "position": cells_of_rows % n,
        "mask": torch.where(plan.slots >= 0, 0.0, -torch.inf).to(dtype)[:, None, None, :] if fill < 1 else None,
    }


def ours(given: dict[str, Any], backend: str) -> Tensor:
    return ops.window_attention_qkvpacked(given["qkv"], given["bias"], slots=given["slots"], backend=backend)


def on_windows(attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Run:
    """`attend(q, k, v (W, H, N, D), bias or bias + mask)` -> (W, H, N, D), from rows to rows."""

    def run(given: dict[str, Any]) -> Tensor:
        qkv, slots, mask = given["qkv"], given["slots"], given["mask"]
        windows, n = slots.shape
        bias = given["bias"].to(qkv.dtype)
        if mask is None:
            whole = qkv.reshape(windows, n, *qkv.shape[1:])
        else:
            padded = torch.cat((qkv, qkv.new_zeros(1, *qkv.shape[1:])))
            index = torch.where(slots >= 0, slots, qkv.shape[0]).flatten()
            whole = padded.index_select(0, index).reshape(windows, n, *qkv.shape[1:])
            # A window without tokens attends everywhere: its result is dropped, and must not be NaN.
            mask = torch.where((slots >= 0).any(1)[:, None, None, None], mask, 0.0)
            bias = bias + mask
        q, k, v = whole.permute(2, 0, 3, 1, 4)  # (W, H, N, D) each
        out = attend(q, k, v, bias).transpose(1, 2)
        if mask is None:
            return out.reshape(-1, *qkv.shape[2:])
        return out.reshape(windows * n, *qkv.shape[2:]).index_select(0, given["cells"])

    return run


def attend_eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores + bias).softmax(dim=-1) @ v


def eager() -> Run:
    return on_windows(attend_eager)


def compiled() -> Run:
    return torch.compile(on_windows(attend_eager), fullgraph=True)


def sdpa() -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    allowed = [SDPBackend.EFFICIENT_ATTENTION] if machine.device() == "cuda" else [SDPBackend.FLASH_ATTENTION]

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with sdpa_kernel([*allowed, SDPBackend.MATH], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:3], k.shape[2]))

    return on_windows(attend)


def flex() -> Run:
    """Every window is a batch entry; slots without a token are scored away."""
    if machine.device() == "cpu":
        raise Skip("FlexAttention has no backward on CPU")
    from torch.nn.attention.flex_attention import flex_attention

    def run(given: dict[str, Any]) -> Tensor:
        slots, bias = given["slots"], given["bias"]

        def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
            def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return torch.where(slots[b, j] >= 0, s + bias[0, h, i, j], -1e30)

            return flex_attention(q, k, v, score_mod=score)

        return on_windows(attend)(given)

    return torch.compile(run, fullgraph=True)


BLOCK = 128  # of FlexAttention's masks


def flex_stacked() -> Run:
    """All rows are one sequence, in which a block mask, made beforehand, keeps the windows apart."""
    if machine.device() == "cpu":
        raise Skip("FlexAttention has no backward on CPU")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attend = torch.compile(flex_attention, fullgraph=True)
    masks: dict[int, BlockMask] = {}

    def mask(window: Tensor) -> BlockMask:
        def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return window[i] == window[j]

        # Rows follow the windows, so the blocks of keys that a block of queries meets are a run: from that of its first
        # window's first row to that of its last window's last row.
        rows = window.shape[0]
        firsts = torch.arange(0, rows, BLOCK, device=window.device)
        lasts = (firsts + BLOCK).clamp(max=rows) - 1
        low = torch.searchsorted(window, window[firsts]) // BLOCK
        high = (torch.searchsorted(window, window[lasts], right=True) - 1) // BLOCK
        # Entries past each row's number are not looked at; every block is there once.
        blocks = torch.arange(firsts.shape[0], device=window.device)
        indices = ((low[:, None] + blocks) % blocks.shape[0]).to(torch.int32)
        numbers = (high - low + 1).to(torch.int32)
        return BlockMask.from_kv_blocks(
            numbers[None, None], indices[None, None], BLOCK_SIZE=BLOCK, mask_mod=same, seq_lengths=(rows, rows)
        )

    def run(given: dict[str, Any]) -> Tensor:
        bias, window, position = given["bias"], given["window"], given["position"]
        key = window.data_ptr()
        if key not in masks:
            masks[key] = mask(window)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + bias[0, h, position[i], position[j]]

        q, k, v = given["qkv"].permute(1, 2, 0, 3)[:, None]  # (1, H, T, D) each
        return attend(q, k, v, score_mod=score, block_mask=masks[key])[0].transpose(0, 1)

    return run


def xformers() -> Run:
    if importlib.util.find_spec("xformers") is None:
        raise Skip("xformers is not installed")
    if machine.device() == "cpu":
        raise Skip("xformers has no operator on CPU")
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        whole = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).contiguous()
        return memory_efficient_attention(q, k, v, attn_bias=whole).transpose(1, 2)

    return on_windows(attend)


def require(package: str, name: str) -> None:
    """Skips the contender unless there is a GPU and the package is installed."""
    if machine.device() == "cpu":
        raise Skip(f"{name} has no operator on CPU")
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        raise Skip(f"{name} is not installed")


def cuequivariance() -> Run:
    """One batch entry whose rows are the windows: the bias is common to them, and so is its gradient's sum."""
    require("cuequivariance_ops_torch", "cuEquivariance")
    from cuequivariance_torch import triangle_attention

    def run(given: dict[str, Any]) -> Tensor:
        slots = given["slots"]
        exists = slots >= 0
        # A window without tokens attends everywhere: its result is dropped.
        seen = (exists | ~exists.any(1, keepdim=True))[None, :, None, None, :] if given["mask"] is not None else None

        def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
            return triangle_attention(q[None], k[None], v[None], given["bias"][None], seen)[0]

        return on_windows(attend)(given)

    return run


def on_full_windows(attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], name: str) -> Run:
    """As `on_windows`, for what takes a bias common to the windows and no mask beside it."""

    def run(given: dict[str, Any]) -> Tensor:
        if given["mask"] is not None:
            raise Skip(f"{name} takes no mask beside a bias of all windows")
        return on_windows(attend)(given)

    return run


def flash_window_attention() -> Run:
    require("flash_swin_attn", "Flash Window Attention")
    from flash_swin_attn import flash_swin_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        return flash_swin_attn_func(q, k, v, bias[0], q.shape[-1] ** -0.5)

    return on_full_windows(attend, "Flash Window Attention")


def cudnn_attention() -> Run:
    """cuDNN through its own front end, which PyTorch's operator lacks: with the gradient of the bias."""
    require("cudnn", "cuDNN's front end")
    import cudnn

    kinds = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
    graphs: dict[tuple, Any] = {}

    def plan(graph: Any) -> None:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()

    def execute(graph: Any, tensors: dict[Any, Tensor], device: torch.device) -> None:
        graph.execute(tensors, torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device))

    def like(tensor: Any, x: Tensor) -> Any:
        return tensor.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))

    def new_graph(dtype: torch.dtype) -> Any:
        single = cudnn.data_type.FLOAT
        return cudnn.pygraph(io_data_type=kinds[dtype], intermediate_data_type=single, compute_data_type=single)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            out = torch.empty(q.transpose(1, 2).shape, dtype=q.dtype, device=q.device).transpose(1, 2)
            stats = q.new_empty((*q.shape[:3], 1), dtype=torch.float32)
            given = (q, k, v, bias)
            key = ("forward", *((x.shape, x.stride(), x.dtype) for x in given))
            if key not in graphs:
                graph = new_graph(q.dtype)
                names = [graph.tensor_like(x) for x in given]
                scale = q.shape[-1] ** -0.5
                results = graph.sdpa(
                    q=names[0], k=names[1], v=names[2], bias=names[3], attn_scale=scale, generate_stats=True
                )
                like(results[0], out)
                like(results[1], stats).set_data_type(cudnn.data_type.FLOAT)
                plan(graph)
                graphs[key] = graph, [*names, *results]
            graph, names = graphs[key]
            execute(graph, dict(zip(names, (*given, out, stats))), q.device)
            ctx.save_for_backward(*given, out, stats)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            given = *ctx.saved_tensors, grad
            q, _k, _v, bias, out, _stats, _ = given
            grads = [torch.empty_like(out) for _ in range(3)]
            dbias = torch.zeros_like(bias)
            key = ("backward", *((x.shape, x.stride(), x.dtype) for x in given))
            if key not in graphs:
                graph = new_graph(q.dtype)
                names = [graph.tensor_like(x) for x in (*given, dbias)]
                nq, nk, nv, nbias, nout, nstats, ngrad, ndbias = names
                results = graph.sdpa_backward(
                    q=nq, k=nk, v=nv, o=nout, dO=ngrad, stats=nstats, bias=nbias, dBias=ndbias,
                    attn_scale=q.shape[-1] ** -0.5, use_deterministic_algorithm=True,
                )  # fmt: skip
                for name, x in zip(results, grads):
                    like(name, x)
                plan(graph)
                graphs[key] = graph, [*names, *results]
            graph, names = graphs[key]
            execute(graph, dict(zip(names, (*given, dbias, *grads))), q.device)
            return *grads, dbias

    return on_full_windows(Attention.apply, "cuDNN")


def ends(given: dict[str, Any]) -> Tensor:
    """Where each window's rows begin, and where the last's end: (W + 1,) int32."""
    counts = (given["slots"] >= 0).sum(1, dtype=torch.int32)
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def flash_attn() -> Run:
    require("flash_attn", "flash-attn")
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return lambda given: flash_attn_varlen_qkvpacked_func(given["qkv"], ends(given), given["slots"].shape[1])


def flash_attn_4() -> Run:
    require("flash_attn.cute", "FlashAttention 4")
    from flash_attn.cute import flash_attn_varlen_func

    def run(given: dict[str, Any]) -> Tensor:
        bounds, n = ends(given), given["slots"].shape[1]
        out = flash_attn_varlen_func(
            *given["qkv"].unbind(1), cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=n, max_seqlen_k=n
        )
        return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp as well

    return run


def natten() -> Run:
    require("natten", "NATTEN")
    from natten.functional import attention

    def run(given: dict[str, Any]) -> Tensor:
        bounds, n = ends(given), given["slots"].shape[1]
        return attention(
            *(x[None].contiguous() for x in given["qkv"].unbind(1)),
            cumulative_seqlen_Q=bounds, cumulative_seqlen_KV=bounds, max_seqlen_Q=n, max_seqlen_KV=n,
        )[0]  # fmt: skip

    return run


def flag_gems() -> Run:
    """Whole windows; its backward takes no mask, and has no gradient for one."""
    require("flag_gems", "FlagGems")
    from flag_gems.ops import scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(*(x.contiguous() for x in (q, k, v)))

    return on_windows(attend)


CONTENDERS: dict[str, Callable[[], Run]] = {
    "eager": eager,
    "compiled": compiled,
    "SDPA with a mask": sdpa,
    "FlexAttention, a batch of windows": flex,
    "FlexAttention, windows stacked": flex_stacked,
    "xformers": xformers,
    "cuEquivariance": cuequivariance,
    "cuDNN": cudnn_attention,
    "Flash Window Attention": flash_window_attention,
    "flash-attn (no bias: a lower bound, not the operator)": flash_attn,
    "FlashAttention 4 (no bias: a lower bound, not the operator)": flash_attn_4,
    "NATTEN (no bias: a lower bound, not the operator)": natten,
    "FlagGems (no bias: a lower bound, not the operator)": flag_gems,
}


def expected(given: dict[str, Any]) -> Tensor:
    return ops.reference.window_attention_qkvpacked(given["qkv"], given["bias"], slots=given["slots"])


def costs(n: int, heads: int, width: int, fill: float, cells: int, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Forward: read q, k, v, write the output; 2 products. Backward: read q, k, v and the output's gradient, write
    theirs; 5 products. The bias and its gradient are read and written once. FLOP of the pairs that exist."""
    rows = round(fill * cells)
    row = heads * width * dtype.itemsize
    bias = heads * n * n * 4
    pairs = rows * fill * n * heads * width
    return Cost(4 * rows * row + bias, round(4 * pairs)), Cost(7 * rows * row + 2 * bias, round(10 * pairs))


def benches(models: tuple[str, ...] = ()) -> Iterator[Bench]:
    gpu = machine.device() == "cuda"
    cells = 262_144 if gpu else 2_048
    shapes = [(n, 16 if gpu else 4, width) for width in (72, 64) for n in (256, 64, 16)]
    if models:
        shapes = [(256, *MODELS[name]) for name in models]
    # What the goals look at first: a run that is cut short has measured it.
    for fills in ((0.5, 1.0), (0.25,)):
        for (n, heads, width), fill in itertools.product(shapes, fills):
            dtype = torch.bfloat16 if gpu else torch.float32
            forward, backward = costs(n, heads, width, fill, cells, dtype)
            yield Bench(
                case=f"n{n}-H{heads}-D{width}-fill{fill:g}-{str(dtype)[6:]}",
                shape={"n": n, "H": heads, "D": width, "fill": fill, "cells": cells},
                dtype=dtype,
                inputs=partial(inputs, n, heads, width, fill, cells, dtype),
                contenders=own("window_attention_qkvpacked", ours) | CONTENDERS,
                forward=forward,
                backward=backward,
                gradients=("qkv", "bias"),
                expected=expected,
            )


if __name__ == "__main__":
    parser = command.arguments(__doc__)
    parser.add_argument("--model", action="append", default=[], choices=MODELS, help="the shapes of a preset")
    args = parser.parse_args()
    raise SystemExit(command.main(__doc__, "window_attention", partial(benches, tuple(args.model)), args))
