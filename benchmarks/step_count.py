"""What a training step moves and computes, part by part, counted from the configuration: no GPU needed.

    python benchmarks/train_bench.py --count [--model XL] [--batch-size 128] [--gpu H200]

A part is what one kind of kernel does in a step: matrix products, attention, adaLN, GELU, gradients of biases, ... Its
bytes are those of the step as it is, one pass over a tensor for each read and each write; its floor is the least that
any implementation moves whose matrix products are cuBLAS's and whose results are the same. Bytes of our kernels are
those that `kernel_report.py --budget` counts in their machine code. Predicted is the longer of bytes at copy bandwidth
and operations at the rate of their kind (our kernels: also the issue of their instructions), one part after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from kernel_report.gpus import PRODUCTS
from rows import columns
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2it.devices import PEAK_FLOPS
from d2it.models.base import Model
from d2it.models.content import ContentTransformerConfig
from d2it.models.dit import DiTConfig, TransformerConfig
from d2it.models.flops import FineTokens, all_fine, count_macs
from d2it.training.masters import Masters, linears

MOST_OVER_FLOOR = 1.25
"""The goal: how much more than its floor a part may move."""
MFU_GOAL = 0.45
THREE_KERNELS = "Triton's backward is three kernels, which read q, k and v each"


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    Attributes:
        copy: bytes a second, read plus written.
        products: operations a second of the matrix products of a block's layers, in the dtype of the step.
        attention: operations a second of a dense block's attention, forward and backward together.
        float32: operations a second of float32 products without TF32.
        peak: operations a second that MFU is stated against; None where it is not known.
    """

    copy: float
    products: float
    attention: float
    float32: float
    peak: float | None


def assumed_rates(gpu: str, products: float = 580e12) -> Rates:
    """Rates to predict with where there is no GPU.

    Args:
        gpu: "H100" or "H200", whose copy bandwidth the budget of the kernels assumes too.
        products: what cuBLAS reaches in bf16 at shapes of a transformer's layers on such a GPU.
    """
    return Rates(PRODUCTS[gpu].tbps * 1e12, products, 300e12, 50e12, PEAK_FLOPS[gpu])


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the budget counts of one of our operators, at the shape of its goal.

    Attributes:
        values: tokens of that shape, times their channels; what follows is in proportion.
        bytes: between memory and multiprocessors.
        floor: of the operator.
        ms: predicted, from bytes and instructions.
    """

    values: int
    bytes: float
    floor: float
    ms: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        where: "dense blocks", "RefineNet", "optimiser" or "rest".
        name: what it is.
        bytes: moved as the step is.
        floor: the least, see the head of this file.
        flops: operations.
        kind: the rate of these: "products", "attention" or "float32".
        ms: predicted by other counts; None: by bytes and operations.
        why: what lies above the floor.
    """

    where: str
    name: str
    bytes: float = 0.0
    floor: float = 0.0
    flops: float = 0.0
    kind: str = "products"
    ms: float | None = None
    why: str = ""

    def predicted_ms(self, rates: Rates) -> float:
        """Milliseconds."""
        least = max(self.bytes / rates.copy, self.flops / getattr(rates, self.kind)) * 1e3
        return least if self.ms is None else max(self.ms, least)

    @property
    def over_floor(self) -> float:
        """Bytes over the floor; of a part that need not be one, infinity."""
        return self.bytes / self.floor if self.floor else float("inf") if self.bytes else 1.0


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many parameters a network has.

    Attributes:
        total: of them all.
        matrices: weights of the Linears that autocast runs in 16 bits.
        rounded: those of them that the setting `weights` holds in bfloat16, in the blocks.
        conditioning: weights of the modulations and embeddings that stay in float32.
    """

    total: int
    matrices: int
    rounded: int
    conditioning: int

    @classmethod
    def of(cls, network: Model) -> Parameters:
        """Counts those of a network, on any device."""
        total = matrices = conditioning = 0
        for name, p in network.named_parameters():
            total += p.numel()
            if p.ndim == 2 and name.endswith("weight") and "label" not in name and "grain" not in name.split("."):
                if "modulation" in name or "timestep" in name:
                    conditioning += p.numel()
                else:
                    matrices += p.numel()
        rounded = sum(part.weight.numel() for part in linears(network.transformer_blocks()))
        return cls(total, matrices, rounded, conditioning)


def parts(
    config: TransformerConfig,
    batch: int,
    parameters: Parameters,
    fine: FineTokens | None = None,
    kernels: Mapping[str, Kernel] | None = None,
    *,
    itemsize: int = 2,
    weights: str = "bfloat16",
    added: bool = False,
    auto: str = "d2it",
) -> list[Part]:
    """The parts of a step of a content transformer, whose blocks are compiled.

    Args:
        config: of the transformer.
        batch: images.
        parameters: of the network.
        fine: RefineNet's tokens in the batch; None, or a masked model: all cells.
        kernels: what `counted_kernels` returns; None takes our kernels' bytes for their floor.
        itemsize: bytes of a number of the residual stream: 2 under autocast, else 4.
        weights: of the blocks, as the setting of a stage: "bfloat16", as "auto" is on a GPU, has float32 masters;
            "float32" is rounded by autocast.
        added: whether gradients are added up over ranks or micro-batches, which takes float32.
        auto: what attention=auto is in 16 bits: "d2it", where its CUDA C++ is not built a package that is installed,
            else "sdpa".
    """
    dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
    stacks = [("dense blocks", config.depth, batch * config.num_tokens, batch * config.num_tokens**2, "images")]
    if isinstance(config, ContentTransformerConfig):
        if fine is None or config.masked:
            fine = all_fine(config, batch)
        stacks.append(("RefineNet", config.refine_depth, fine.rows, fine.pairs, "packed"))
    found: list[Part] = []
    of_blocks = 0.0
    for where, depth, rows, pairs, kind in stacks:
        a_pass = depth * rows * dim * itemsize  # one read or write of the residual stream, in every block
        macs = depth * rows * (4 * dim**2 + 2 * dim * hidden)
        of_blocks += macs + depth * pairs * 2 * dim
        # Forward, and the gradients of the input and of the weights: each reads two tensors and writes one.
        moved = 3 * a_pass * (4 + 2 + 2 * (1 + hidden / dim)) + 3 * depth * itemsize * (4 * dim**2 + 2 * dim * hidden)
        found.append(Part(where, "matrix products", moved, moved, 6 * macs))
        ours = _kernel_pair(kernels, "window_attention", depth * rows * dim, 11 * a_pass)
        flops = 14 * depth * pairs * dim  # 2 products forward, 5 backward
        if where == "RefineNet":
            found.append(Part(where, "window attention", *ours[:2], flops, "products", ours[2], THREE_KERNELS))
        else:
            moved = (4 + 8) * a_pass
            # In float32 "auto" is "d2it": the step is a CPU's.
            name = ("d2it" if itemsize == 4 else auto) if config.attention == "auto" else config.attention
            of_kernel = kernels if name == "d2it" else None
            ours = _kernel_pair(of_kernel, "window_attention all", depth * rows * dim, moved)
            kind_of = "attention" if of_kernel is None else "products"
            found.append(Part(where, "attention", *ours[:2], flops, kind_of, ours[2], THREE_KERNELS))
            if name == "sdpa":
                why = "PyTorch's attention returns three: none with attention=d2it, or flash_attn"
                found.append(Part(where, "gradients of q, k and v into one", 6 * a_pass, 0.0, why=why))
        passes = 2 * 10 * a_pass  # forward 2 + 2, backward 4 + 2, twice a block
        ours = _kernel_pair(kernels, f"gated_residual_modulate {kind}", 2 * depth * rows * dim, passes)
        found.append(Part(where, "gate, residual, norm, modulate", *ours[:2], ms=ours[2]))
        wide = hidden / dim * a_pass
        # In float32, a CPU's step, the backward writes GELU's output again. The gradients of all biases but qkv's come
        # with GELU's and the gates'.
        ours = _kernel_pair(kernels, "gelu", depth * rows * dim, (5 + (itemsize == 4)) * wide)
        found.append(Part(where, "GELU and its gradient", ours[0], 5 * wide, ms=ours[2]))
        why = "a pass over the gradient of qkv's output for the sum of its rows"
        found.append(Part(where, "gradients of biases", 3 * a_pass, 0.0, why=why))
    matrices, conditioning, total = parameters.matrices, parameters.conditioning, parameters.total
    rounded = parameters.rounded if weights == "bfloat16" and itemsize == 2 else 0
    if itemsize == 2:
        why = "autocast reads float32 weights and writes 16-bit ones; 16-bit gradients become float32"
        if rounded:
            why = "16-bit gradients become float32 to be added up" if added else f"outside the blocks {why}"
        moved = 12.0 * (matrices - rounded) + 6.0 * rounded * added
        found.append(Part("rest", "casts of weights and gradients", moved, 0.0, why=why))
    moved = 12.0 * conditioning
    found.append(Part("rest", "conditioning in float32", moved, moved, 6.0 * batch * conditioning, "float32"))
    macs = count_macs(config, batch, fine).total - of_blocks - batch * conditioning
    moved = 12.0 * batch * config.num_tokens * dim * itemsize
    if fine is not None:
        moved += 8.0 * fine.rows * dim * itemsize  # positions: packed, added, and the gradient back to cells
    found.append(Part("rest", "embeddings, positions, final layers", moved, moved, 6 * max(macs, 0.0)))
    # Read of the gradients for the norm; weights, gradients, two moments and the average read, all but one written. A
    # 16-bit gradient saves two bytes in each pass, its weight costs two.
    floor = 40.0 * total - 2.0 * (parameters.rounded if itemsize == 2 else 0)
    moved = 40.0 * total + (2.0 if added else -2.0) * rounded
    found.append(Part("optimiser", "norm, clipping, AdamW, average", moved, floor))
    return found


def _kernel_pair(
    kernels: Mapping[str, Kernel] | None, name: str, values: int, floor: float
) -> tuple[float, float, float | None]:
    """Bytes, floor and milliseconds of an operator's forward and backward over so many tokens times channels."""
    if kernels is None:
        return floor, floor, None
    pair = [kernels[f"{name} {direction}"] for direction in ("forward", "backward")]
    return (
        sum(each.bytes * values / each.values for each in pair),
        sum(each.floor * values / each.values for each in pair),
        sum(each.ms * values / each.values for each in pair),
    )


CHANNELS = 1152
"""Of XL."""


def counted_kernels(gpu: str, *, cuda: bool = True) -> dict[str, Kernel]:
    """Our kernels of a step of the XL model, counted from their machine code; takes a minute, several with nvcc.

    Args:
        gpu: "H100" or "H200".
        cuda: CUDA C++ where there is nvcc; else Triton's kernels alone.
    """
    from kernel_report import budget_cases
    from kernel_report.budget import count_case, verdicts

    names = {
        "gate-modulate-B256-L256-C1152-images-bfloat16": ("gated_residual_modulate images", 256 * 256),
        "gate-modulate-B256-L512-C1152-packed-bfloat16": ("gated_residual_modulate packed", 256 * 512),
        "B256-L256-C4608-bfloat16": ("gelu", 256 * 256),
        "n256-H16-D72-fill0.5-bfloat16": ("window_attention", budget_cases.CELLS // 2),
        # With the slots and the bias of windows, which an image has not: a little more than it moves.
        "n256-H16-D72-fill1-bfloat16": ("window_attention all", budget_cases.CELLS),
    }
    found: dict[str, Kernel] = {}
    product = PRODUCTS[gpu]
    for case in [*budget_cases.modulation(), *budget_cases.gelu(), *budget_cases.attention()]:
        if case.case not in names or (case.cuda and not cuda):
            continue
        name, rows = names[case.case]
        row = verdicts(case, count_case(case, product.arch), product)[-1]
        # CUDA kernels come after Triton's of the same case, and are chosen where they are built.
        found[f"{name} {case.direction}"] = Kernel(
            rows * CHANNELS, row["bytes"], row["floor_bytes"], row["predicted_ms"]
        )
    return found


def step_flops(config: TransformerConfig, batch: int, fine: FineTokens | None) -> float:
    """Operations of a step, as MFU counts them: six for each multiply-accumulate of a forward pass."""
    return 6.0 * count_macs(config, batch, fine).total


def table(found: Iterable[Part], rates: Rates, flops: float) -> str:
    """The lines that are printed: a part each, then the step."""
    found = list(found)
    lines = [("where", "part", "TFLOP", "GB", "floor GB", "of floor", "predicted ms", "")]
    for part in found:
        over = part.over_floor
        missed = part.bytes > 0 and over > MOST_OVER_FLOOR
        lines.append(
            (
                part.where,
                part.name,
                f"{part.flops / 1e12:.2f}" if part.flops else "",
                f"{part.bytes / 1e9:.1f}",
                f"{part.floor / 1e9:.1f}",
                f"{over:.2f}" if over < float("inf") else "no floor",
                f"{part.predicted_ms(rates):.1f}",
                f"over {MOST_OVER_FLOOR:g}: {part.why}" if missed else "",
            )
        )
    ms = sum(part.predicted_ms(rates) for part in found)
    moved, floor = sum(part.bytes for part in found), sum(part.floor for part in found)
    mfu = f"{flops / ms * 1e3 / rates.peak:.1%} MFU" if rates.peak else ""
    lines.append(
        ("step", "", f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{floor / 1e9:.1f}", f"{moved / floor:.2f}",
         f"{ms:.1f}", mfu)
    )  # fmt: skip
    return columns(lines)


def predicted_ms(found: Iterable[Part], rates: Rates, where: str | None = None) -> float:
    """Milliseconds of a whole step, or of the parts of one place."""
    return sum(part.predicted_ms(rates) for part in found if where in (None, part.where))


def config_of(preset: str, image_size: int) -> TransformerConfig:
    """The configuration of a preset of the content transformer or of the plain DiT."""
    from d2it.models import DiT, DynamicContentTransformer

    kind = DynamicContentTransformer if preset in DynamicContentTransformer.presets else DiT
    config = kind.preset_config(preset, image_size=image_size)
    assert isinstance(config, (ContentTransformerConfig, DiTConfig))
    return config


# ---- what the host does: a launch for every operator that computes

HOST_US = (5.0, 9.0)
"""Host time of an operator of PyTorch, least and most."""
OUR_HOST_US = (3.2, 4.9)
"""Of a launch of ours (`launch_host_time.py`)."""
MOST_LAUNCHES = 4
"""Of one operator of ours."""


_ALLOCATES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach")


class _Computing(TorchDispatchMode):
    """Counts the operators that compute: no views, nothing that only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.pytorch = self.ours = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "d2it":
            self.ours += 1
        elif func.namespace == "aten" and not (func.is_view or name in _ALLOCATES):
            self.pytorch += 1
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Launches:
    """What the host launches for forward and backward of an eager step, whatever the batch.

    Attributes:
        pytorch: operators of PyTorch that compute.
        ours: operators of ours.
    """

    pytorch: int
    ours: int

    @property
    def host_ms(self) -> tuple[float, float]:
        """Milliseconds of the host, least and most."""
        low = self.pytorch * HOST_US[0] + self.ours * OUR_HOST_US[0]
        high = self.pytorch * HOST_US[1] + self.ours * OUR_HOST_US[1] * MOST_LAUNCHES
        return low / 1e3, high / 1e3


def launches(
    config: ContentTransformerConfig, batch: int = 2, weights: str = "bfloat16", *, added: bool = False
) -> Launches:
    """Counts them on fake tensors of a CPU, under bf16 autocast; computes nothing.

    `weights` and `added` as of `parts`.
    """
    from d2it.models import DynamicContentTransformer

    counted = _Computing()
    with FakeTensorMode():
        network = DynamicContentTransformer(config)
        if weights == "bfloat16":
            Masters(linears(network.transformer_blocks()), added=added)
        x = torch.randn(batch, config.in_channels, *config.grid)
        whole = torch.zeros(batch, dtype=torch.int64)
        grain_map = torch.zeros(batch, *config.region_grid, dtype=torch.int64)
        with counted, torch.autocast("cpu", torch.bfloat16):
            out = network(x, whole, whole if config.num_classes else None, grain_map)
        with counted:
            out.backward(torch.empty_like(out))
    return Launches(counted.pytorch, counted.ours)
