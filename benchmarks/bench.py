"""One measurement: what is run, against what, how it is checked, and the rows that come of it.

- Calls take turns over enough copies of the inputs that none is found in the L2 cache.
- Forward and backward are measured apart: the backward is `torch.autograd.grad` on a graph that is kept.
- Bytes and operations are counted from the shapes by the script, and set against a copy bandwidth and a matrix
  product rate measured in the same run.
- A result is compared with the reference before it is timed; a wrong one gets no speed-up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import machine
import timing
import torch
import torch._functorch.config
from rows import Row, ours
from timing import Timing
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from d2it import ops

# ||result - reference|| / ||reference|| above which a result is wrong; gradients may be twice as far.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Skip(Exception):
    """Raised by a contender that cannot run here; its text is printed in the contender's place."""


Run = Callable[[dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the work costs at least.

    Attributes:
        bytes: every input read once, every output written once.
        flops: two for each multiply-accumulate.
    """

    bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """One measurement: the same inputs through every contender.

    Attributes:
        case: short name, such as "n64-D72-fill0.5-bfloat16".
        shape: what `case` abbreviates; kept with the result.
        dtype: of the inputs.
        inputs: seed -> arguments on the device. Called once for each copy of the inputs.
        contenders: name -> a function that sets the contender up, or raises Skip, and returns what runs it on inputs.
            Ours are named "d2it ..." and come first.
        forward: what a forward pass costs at least.
        backward: what a backward pass costs at least; None measures none.
        gradients: inputs with a gradient; needed for a backward.
        expected: the reference, given the inputs with floating point widened. None: nothing to check, no speed-ups.
        operator: result file that the rows go to, where a script measures several operators; the script's own if empty.
    """

    case: str
    shape: dict[str, Any]
    dtype: torch.dtype
    inputs: Callable[[int], dict[str, Any]]
    contenders: dict[str, Callable[[], Run]]
    forward: Cost
    backward: Cost | None = None
    gradients: tuple[str, ...] = ()
    expected: Run | None = None
    operator: str = ""


def own(op: str, operator: Callable[[dict[str, Any], str], Any]) -> dict[str, Callable[[], Run]]:
    """Our contenders: `operator(inputs, backend)` on every fast backend, or on the reference where there is none."""

    def on(backend: str) -> Run:
        return lambda given: operator(given, backend)

    backends = [name for name in ops.available_backends(op) if name != "reference"]
    return {f"d2it {name}": functools.partial(on, name) for name in backends or ["reference"]}


def rivals(functions: dict[str, Callable[..., Any]], *arguments: str) -> dict[str, Callable[[], Run]]:
    """Each function on these inputs, eager and compiled."""

    def eager(function: Callable[..., Any]) -> Run:
        return lambda given: function(*(given[name] for name in arguments))

    contenders: dict[str, Callable[[], Run]] = {}
    for name, function in functions.items():
        contenders[f"eager {name}"] = functools.partial(eager, function)
        contenders[f"compiled {name}"] = lambda function=function: eager(torch.compile(function))
    return contenders


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def floats(value: Any) -> list[Tensor]:
    """The floating-point tensors anywhere inside a value."""
    return [t for t in _tensors(value) if t.is_floating_point()]


def _require_gradients(inputs: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    leaves = [t for name in names for t in floats(inputs.get(name))]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves


def input_sets(bench: Bench) -> list[dict[str, Any]]:
    """Copies of the inputs, enough that a call finds none of its own in the L2 cache (one on a CPU)."""
    first = bench.inputs(0)
    if machine.device() == "cpu":
        return [first]
    size = max(1, sum(t.nbytes for t in _tensors(first)))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    free = torch.cuda.mem_get_info()[0]
    # Outputs and gradients take as much again, per copy, while a backward is timed.
    count = min(1 + math.ceil(2 * l2 / size), max(1, int(0.4 * free / (4 * size))), 64)
    return [first, *(bench.inputs(seed) for seed in range(1, count))]


def distance(got: list[Tensor], want: list[Tensor], tolerance: float) -> tuple[float, bool]:
    """The largest relative error over the results, and whether all are within the tolerance."""
    worst, correct = 0.0, len(got) == len(want)
    for a, b in zip(got, want):
        if a.shape != b.shape:
            return math.inf, False
        if a.is_floating_point():
            b = b.to(torch.float64)
            error = ((a.to(torch.float64) - b).norm() / b.norm().clamp(min=1e-30)).item()
            worst = max(worst, error if error == error else math.inf)
        elif not torch.equal(a.to(b.dtype), b):
            return math.inf, False
    return worst, correct and worst <= tolerance


@dataclasses.dataclass
class Results:
    """What a contender or the reference gave.

    Attributes:
        outputs: every output.
        gradients: that of every input that has one.
    """

    outputs: list[Tensor]
    gradients: list[Tensor]


def evaluate(run: Run, inputs: dict[str, Any], gradients: tuple[str, ...], cotangents: list[Tensor]) -> Results:
    """Outputs and gradients of one run."""
    leaves = _require_gradients(inputs, gradients)
    outputs = run(inputs)
    grads: tuple[Tensor, ...] = ()
    if leaves:
        of_floats = floats(outputs)
        given = [c.to(t.dtype) for c, t in zip(cotangents, of_floats)]
        grads = torch.autograd.grad(of_floats, leaves, given, allow_unused=True)
    # A lower bound leaves an input out. Its gradient is missing then, which is a wrong result.
    return Results([t.detach() for t in _tensors(outputs)], [grad for grad in grads if grad is not None])


def cotangents_like(outputs: list[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, the same in every call."""
    rng = torch.Generator(device=outputs[0].device).manual_seed(1) if outputs else None
    return [torch.randn(t.shape, generator=rng, device=t.device, dtype=t.dtype) for t in outputs]


def fresh_compiler() -> None:
    """Every case compiles for its own static shapes. A kept graph forbids donated buffers, and what is compiled with
    them would not be found in the compilers' caches."""
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False


def run_bench(bench: Bench, seconds: float | None = None, until: float = math.inf) -> list[Row]:
    """Rows of the result file: one for each contender and direction, or one with the reason why it was skipped.

    `until`: no rival is begun after that time of `time.monotonic()`; compiling one may take a minute.
    """
    rates = timing.machine_rates()
    fresh_compiler()
    sets = input_sets(bench)
    rows: list[Row] = []
    reference: Results | None = None
    directions = ["forward"] + (["backward"] if bench.backward else [])

    timed: list[_Timed] = []
    for name, setup in bench.contenders.items():
        base = {"case": bench.case, "contender": name, "dtype": str(bench.dtype)[6:], "shape": bench.shape}
        if monotonic() > until and not ours(base):
            rows.append({**base, **OUT_OF_TIME})
            continue
        try:
            run = setup()
            warm = run(sets[0])
            cotangents = cotangents_like(floats(warm)) if bench.backward else []
            del warm
            gradients = bench.gradients if bench.backward else ()
            if reference is None and bench.expected is not None:
                wide = tree_map_only(Tensor, widen, {k: _detached(v) for k, v in sets[0].items()})
                reference = evaluate(bench.expected, wide, gradients, cotangents)
            got = evaluate(run, sets[0], gradients, cotangents)
        except Skip as reason:
            rows.append({**base, "skipped": str(reason)})
            continue
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows.append({**base, **OUT_OF_MEMORY})
            continue
        except Exception as error:
            if ours({"contender": name}):
                raise
            # Another release of a rival, or a shape that it does not take, does not end the measurement.
            rows.append({**base, "skipped": f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"})
            continue
        for direction in directions:
            row = {**base, "direction": direction}
            backward = direction == "backward"
            if reference is not None:
                tolerance = TOLERANCE[bench.dtype] * (2 if backward else 1)
                a = got.gradients if backward else got.outputs
                b = reference.gradients if backward else reference.outputs
                row["error"], row["correct"] = distance(a, b, tolerance)
            rows.append(row)
            calls = functools.partial(_direction_calls, direction, run, sets, gradients)
            timed.append(_Timed(row, calls, bench.backward if backward else bench.forward))
        del got
    for one, time, power in _time_all(timed, seconds):
        one.row.update(_figures(time, one.cost, bench.dtype, rates) | power if time else OUT_OF_MEMORY)
    return rows


@dataclasses.dataclass
class _Timed:
    """A row of the results whose time is still to be measured.

    Attributes:
        row: of the results.
        calls: makes the calls that are timed, which do the same work on different memory.
        cost: what a call costs at least.
    """

    row: Row
    calls: Callable[[], list[Callable[[], object]]]
    cost: Cost


OUT_OF_MEMORY = {"skipped": "out of memory"}
OUT_OF_TIME = {"skipped": "out of time"}


def _time_all(timed: list[_Timed], seconds: float | None) -> Iterator[tuple[_Timed, Timing | None, dict[str, float]]]:
    """Each with its time, or None where memory ran out. On a GPU one after the other, with the power drawn; on a CPU in
    turns: its speed drifts, and so all contenders see the same drift."""
    if machine.device() == "cpu":
        for one, time in zip(timed, timing.time_in_turns([one.calls() for one in timed], seconds)):
            yield one, time, {}
        return
    for one in timed:
        try:
            with machine.Power() as power:
                time = timing.time_calls(one.calls(), seconds=seconds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield one, None, {}
        else:
            yield one, time, power.read()


def _detached(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, value)


def widen(tensor: Tensor) -> Tensor:
    """The precision of the reference: float64 on a CPU; on a GPU float32 for halves, whose large sizes then fit."""
    wide = torch.float32 if tensor.is_cuda and tensor.dtype != torch.float32 else torch.float64
    return tensor.detach().to(wide) if tensor.is_floating_point() else tensor


def direction_call(
    direction: str, run: Run, inputs: dict[str, Any], gradients: tuple[str, ...]
) -> Callable[[], object]:
    """What is timed: the forward as in training (with a graph where there are gradients), or the backward alone."""
    leaves = _require_gradients(inputs, gradients)
    if direction == "forward":
        return functools.partial(run, inputs)
    outputs = floats(run(inputs))
    cotangents = cotangents_like(outputs)
    return functools.partial(torch.autograd.grad, outputs, leaves, cotangents, retain_graph=True, allow_unused=True)


def _direction_calls(
    direction: str, run: Run, sets: list[dict[str, Any]], gradients: tuple[str, ...]
) -> list[Callable[[], object]]:
    if machine.device() == "cpu":
        return [direction_call(direction, run, inputs, gradients) for inputs in sets]
    timing.side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(timing.side_stream()):  # where a backward then runs, and may be captured
        return [direction_call(direction, run, inputs, gradients) for inputs in sets]


def _figures(time: Timing, cost: Cost, dtype: torch.dtype, rates: dict[str, Any]) -> dict[str, Any]:
    """The row's numbers. floor_ms: the larger of bytes / copy bandwidth and operations / matrix product rate."""
    gbps = cost.bytes / time.ms / 1e6
    row = {
        "ms": time.ms,
        "ms_q10": time.ms_q10,
        "ms_q90": time.ms_q90,
        "calls": time.calls,
        "how": time.how,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gbps": gbps,
        "copy_share": gbps / rates["copy_gbps"],
    }
    floor = cost.bytes / rates["copy_gbps"] / 1e6
    peak = rates["matmul_tflops"].get(str(dtype)[6:])
    if cost.flops and peak:
        row["tflops"] = cost.flops / time.ms / 1e9
        row["matmul_share"] = row["tflops"] / peak
        floor = max(floor, cost.flops / peak / 1e9)
    row["floor_ms"] = floor
    row["floor_share"] = floor / time.ms
    return row


def warm(bench: Bench) -> None:
    """Runs every contender once, forward and backward, and checks nothing."""
    fresh_compiler()
    for name, setup in bench.contenders.items():
        try:
            direction_call("backward" if bench.backward else "forward", setup(), bench.inputs(0), bench.gradients)()
            machine.synchronize()
        except (Skip, RuntimeError) as reason:  # reported when it is measured
            print(f"{bench.case} {name}: {reason}")
