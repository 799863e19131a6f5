"""The correctness suite that every fast backend of an operator goes through; see docs/adding_a_kernel.md.

A test file declares its operator by a subclass of `KernelSuite`: its corner shapes, a generator of
random ones, how arguments are made from a shape, which of them have gradients, and mutations of the kernel
that the suite has to notice. The tests are inherited. Each runs on every fast backend of the machine: C++ on
CPU, Triton on the GPU or, without one, in the interpreter, CUDA.

Error policy: against the float64 reference on the same rounded inputs, the largest error is at most 2x
(forward) or 3x (gradients) that of the reference run in the tensors' own dtype, plus a floor of a few
roundings of the largest value. Every input lies in NaN, every output starts as NaN between guards, every call
runs twice and has to give the same bits, and cotangents are random (a sum is a cotangent that hides errors).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import d2it.ops
from d2it.kernels.common import COMPILE_CASES
from d2it.ops import _register, reference

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
SEEDS = int(os.environ.get("D2IT_FUZZ_SEEDS", "3"))
"""Random shapes per operator, backend and dtype. D2IT_FUZZ_SEEDS=500 for a long fuzz."""

slow_when_interpreted = pytest.mark.slow if INTERPRETED else lambda test: test

LAYOUTS = ("plain", "offset", "pitched", "transposed")
Shape = dict[str, Any]
Call = dict[str, Any]


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    # In the interpreter a bfloat16 dot multiplies raw bits and a store truncates: tested on a GPU only.
    if backend == "triton" and INTERPRETED:
        return torch.float32, torch.float16
    return torch.float32, torch.float16, torch.bfloat16


def fast_backends(op: str) -> list[str]:
    return [name for name in d2it.ops.available_backends(op) if name != "reference"]


def shape_id(shape: Shape) -> str:
    return "-".join(f"{key}{value}".replace(" ", "") for key, value in shape.items()) or "default"


# -------------------------------------------------------------------------------------------------
# Arguments


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` on every tensor inside lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: (found.append(t), t)[1], value)
    return found


def _padding(dtype: torch.dtype) -> float | int:
    # Read past the end, an integer 1 is a row, a grain, an image that exists: a wrong result and not a crash.
    return float("nan") if dtype.is_floating_point else 1


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in memory that is NaN all around.

    plain: dense, the dimensions in the order that they have in `tensor`'s memory, 16-byte aligned; offset: the same,
    starting at an odd element; pitched: gaps in all dimensions but the innermost; transposed: dimensions in reverse
    order in memory, with gaps.
    """
    order = sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))
    if layout in ("plain", "offset"):
        pad = 64 if layout == "plain" else 67
        buffer = torch.full((tensor.numel() + 131,), _padding(tensor.dtype), dtype=tensor.dtype)
        inner = buffer.to(DEVICE)[pad : pad + tensor.numel()].view([tensor.shape[d] for d in order])
    else:
        order = order if layout == "pitched" else list(reversed(range(tensor.ndim)))
        sizes = [tensor.shape[d] + 3 for d in order]
        buffer = torch.full(sizes, _padding(tensor.dtype), dtype=tensor.dtype, device=DEVICE)
        inner = buffer[tuple(slice(1, 1 + tensor.shape[d]) for d in order)]
    return inner.permute([order.index(d) for d in range(tensor.ndim)]).copy_(tensor)


def far_apart(tensor: Tensor) -> Tensor:
    """The same values with the first dimension spread over more than 2^31 elements of untouched memory."""
    if tensor.ndim == 0 or tensor.shape[0] < 2 or tensor.element_size() > 4:
        return tensor.to(DEVICE)
    stride = 2**31 // (tensor.shape[0] - 1) + 1
    inner = torch.empty(tensor.shape[1:], device="meta").stride()
    size = stride * (tensor.shape[0] - 1) + tensor[0].numel()
    buffer = torch.empty(size, dtype=tensor.dtype, device=DEVICE)
    return buffer.as_strided(tensor.shape, (stride, *inner)).copy_(tensor)


@contextlib.contextmanager
def alone_with_large_tensors() -> Iterator[None]:
    """On a GPU, where untouched memory is taken all the same: one process at a time, and it gives the memory back."""
    if DEVICE == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir()) / f"d2it-large-tensors-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except torch.OutOfMemoryError as error:
            pytest.skip(f"needs more memory: {error}")
        finally:
            torch.cuda.empty_cache()


GUARD, PATTERN = 256, 77
ALLOCATORS = [
    *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that is allocated and not filled starts as NaN (integers: their maximum), between guards; an
    element that is written outside of what was allocated is found at the end."""
    guards: list[Tensor] = []

    def guarded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if out.device.type == "meta":
                return out
            size = out.untyped_storage().nbytes() // out.element_size()
            buffer = torch.full((size + 2 * GUARD,), PATTERN, dtype=out.dtype, device=out.device)
            buffer[GUARD : GUARD + size] = out.as_strided((size,), (1,))
            guards.extend((buffer[:GUARD], buffer[GUARD + size :]))
            return buffer.as_strided(out.shape, out.stride(), GUARD)

        return function

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ALLOCATORS:
                patch.setattr(owner, name, guarded(getattr(owner, name)))
            yield
        written = sum((guard != PATTERN).sum().item() for guard in guards)
        assert not written, f"{written} elements written outside of what was allocated"
    finally:
        torch.use_deterministic_algorithms(before)


class Recorder(TorchDispatchMode):
    """Notes every call of a d2it operator that passes: (overload, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "d2it":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change of a kernel file that makes it wrong: `old` occurs once in it and becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    shapes: tuple[Shape, ...] = ()
    """Shapes on which it has to be noticed; the corner shapes where none are given."""


# -------------------------------------------------------------------------------------------------
# The suite


class KernelSuite:
    """Subclass it as `class TestOperator(KernelSuite)` and fill in what follows."""

    op: ClassVar[str]
    """Name in `d2it.ops` and in `d2it.ops.reference`."""
    corners: ClassVar[list[Shape]]
    """Declared shapes: empty batch, no work, all of it, primes, block +- 1, non-square."""
    gpu_corners: ClassVar[list[Shape]] = []
    """More of them, too slow for the interpreter: the shapes that people run."""
    small: ClassVar[Shape]
    """A shape for the tests of the operator's contract: opcheck, gradcheck, compile."""
    gradients: ClassVar[tuple[str, ...]] = ()
    """Arguments whose floating-point tensors have a gradient."""
    mutations: ClassVar[list[Mutation]] = []
    cpp_mutations: ClassVar[tuple[str, Collection[str]]] = ("", ())
    """A file of csrc/ among the module's `SOURCES`, and those of its and its headers' mutations that this suite
    notices."""
    cpp_shapes: ClassVar[list[Shape]] = []
    """Shapes on which it does; the corner shapes where none are given."""
    forward_floor: ClassVar[float] = 1.0
    """Allowed beside 2x the eager error: roundings (eps of the dtype) of the largest value of the result."""
    gradient_floor: ClassVar[float] = 2.0
    """The same beside 3x the eager gradient error."""
    absolute_floor: ClassVar[float] = 0.0
    """The same in the unit of the results, for those whose rounding does not shrink with them."""
    backends: ClassVar[tuple[str, ...]] = ()
    """The backends to test; every fast one of the machine where none is named."""
    half_alone: ClassVar[tuple[str, ...]] = ()
    """Backends that take float16 and bfloat16, and not float32."""

    def __init_subclass__(cls) -> None:
        if not cls.gradients:
            cls.test_reference_gradcheck = None

    @classmethod
    def dtypes(cls, backend: str) -> tuple[torch.dtype, ...]:
        return (torch.float16, torch.bfloat16) if backend in cls.half_alone else dtypes(backend)

    def random_shape(self, rng: random.Random) -> Shape:
        """A random shape; primes and odd sizes are worth more than powers of two."""
        raise TypeError(f"{type(self).__name__} declares no random_shape")

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        """Arguments of the public operator by name, as CPU tensors: the floating-point ones in `dtype`, but
        for those that people give in float32 whatever the dtype is, such as a bias."""
        raise TypeError(f"{type(self).__name__} declares no build")

    def compare_integers(self, got: Tensor, want: Tensor, call: Call) -> None:
        """Integer results are equal; an operator whose integers depend on a rounding states here where they may
        differ."""
        assert torch.equal(got, want), f"{(got != want).sum().item()} of {want.numel()} integers differ"

    # -- one call, checked --------------------------------------------------------------------------

    def check(
        self,
        shape: Shape,
        backend: str,
        dtype: torch.dtype,
        layout: str,
        *,
        seed: int = 0,
        repeats: int = 2,
        place: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """One call, `repeats` times, forward and gradients against the reference; AssertionError if wrong."""
        made = self.build(shape, dtype, torch.Generator().manual_seed(seed))
        call = map_tensors(place or (lambda t: lay_out(t, layout)), made)
        if reasons := d2it.ops.why_not(self.op, backend, **call):
            pytest.skip("; ".join(reasons))

        exact = map_tensors(lambda t: t.double() if t.is_floating_point() else t, made)
        # Gradients arrive in another layout than the arguments: any of theirs, or expanded.
        grad_layout = ("expanded", *LAYOUTS)[(LAYOUTS.index(layout) * 2 + seed) % 5]
        cotangents = self._cotangents(exact, dtype, seed, expanded=grad_layout == "expanded")
        want, want_grads = self._reference(exact, cotangents)
        eager, eager_grads = self._reference(made, cotangents)

        first: list[Tensor] = []
        for _ in range(repeats):
            got, grads = self._fast(call, backend, cotangents, grad_layout)
            assert len(got) == len(want)
            if not first:
                first = [t.clone() for t in got + grads]
                for i, (g, w, e) in enumerate(zip(got, want, eager)):
                    self._compare(f"output {i}", g, w, e, 2.0, self.forward_floor, call)
                assert len(grads) == len(want_grads)
                for i, (g, w, e) in enumerate(zip(grads, want_grads, eager_grads)):
                    self._compare(f"gradient {i}", g, w, e, 3.0, self.gradient_floor, call)
            else:
                for i, (a, b) in enumerate(zip(first, got + grads)):
                    assert torch.equal(a, b), f"a repeat changed bits of result {i}"

    def _leaves(self, call: Call) -> tuple[Call, list[Tensor]]:
        """The call with gradients required, and the tensors that require them."""
        call, leaves = dict(call), []

        def require(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            leaves.append(t.detach().requires_grad_())
            return leaves[-1]

        for name in self.gradients:
            if call.get(name) is not None:
                call[name] = map_tensors(require, call[name])
        return call, leaves

    def _cotangents(self, call: Call, dtype: torch.dtype, seed: int, expanded: bool) -> list[Tensor]:
        """Random ones for every floating-point output; expanded: one slice along the first dimension."""
        if not self.gradients:
            return []
        with torch.no_grad():
            outputs = tensors_in(getattr(reference, self.op)(**map_tensors(lambda t: t.to(DEVICE), call)))
        rng = torch.Generator().manual_seed(seed + 1)
        made = [torch.randn(t.shape, generator=rng).to(dtype) for t in outputs if t.is_floating_point()]
        return [c[:1].expand_as(c) if expanded else c for c in made]

    def _reference(self, call: Call, cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients of the reference on contiguous arguments, on the device under test."""
        placed, leaves = self._leaves(map_tensors(lambda t: t.to(DEVICE), call))
        outputs = tensors_in(getattr(reference, self.op)(**placed))
        grads = self._gradients(outputs, leaves, [c.to(DEVICE) for c in cotangents])
        return [t.detach() for t in outputs], grads

    @staticmethod
    def _gradients(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        if not leaves:
            return []
        floats = [t for t in outputs if t.is_floating_point()]
        cotangents = [c if c.dtype == t.dtype else c.to(t.dtype) for c, t in zip(cotangents, floats)]
        grads = torch.autograd.grad(floats, leaves, cotangents, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves)]

    def _fast(
        self, call: Call, backend: str, cotangents: list[Tensor], layout: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        call, leaves = self._leaves(call)
        with poisoned():
            outputs = tensors_in(getattr(d2it.ops, self.op)(**call, backend=backend))
        expanded = layout == "expanded"
        # In the memory order of the outputs, as autograd mostly hands them on.
        ordered = [torch.empty_like(t, device="cpu") for t in outputs if t.is_floating_point()]
        placed = [
            c[:1].to(DEVICE).expand_as(c) if expanded else lay_out(like.to(c.dtype).copy_(c), layout)
            for c, like in zip(cotangents, ordered)
        ]
        with poisoned():
            grads = self._gradients(outputs, leaves, placed)
        return [t.detach() for t in outputs], grads

    def _compare(
        self, what: str, got: Tensor, want: Tensor, eager: Tensor, factor: float, floor: float, call: Call
    ) -> None:
        assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        if not got.is_floating_point():
            assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
            self.compare_integers(got, want, call)
            return
        assert got.dtype == eager.dtype, f"{what}: {got.dtype}, not {eager.dtype}"
        if not got.numel():
            return
        # Read past an argument or never written: either way NaN.
        bad = (~got.isfinite()).sum().item()
        assert not bad, f"{what}: {bad} of {got.numel()} values are not finite"
        error = (got.double() - want).abs().max().item()
        allowed = factor * (eager.double() - want).abs().max().item()
        allowed += floor * torch.finfo(got.dtype).eps * want.abs().max().item() + self.absolute_floor
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

    # -- the tests ----------------------------------------------------------------------------------

    def test_against_reference(self, backend: str, dtype: torch.dtype, shape: Shape, layout: str) -> None:
        # The interpreter computes in one order, whatever happens: there `test_fuzz` alone repeats.
        self.check(shape, backend, dtype, layout, repeats=1 if backend == "triton" and INTERPRETED else 2)

    def test_fuzz(self, backend: str, dtype: torch.dtype, seed: int) -> None:
        rng = random.Random(f"{self.op}-{seed}")
        shape = self.random_shape(rng)
        try:
            self.check(shape, backend, dtype, rng.choice(LAYOUTS), seed=seed)
        except AssertionError as error:
            raise AssertionError(f"{shape_id(shape)}: {error}") from error

    def test_offsets_beyond_int32(self, backend: str) -> None:
        """Strides that put the last element of each argument past 2^31 elements."""
        with alone_with_large_tensors():
            self.check(self.small, backend, torch.float16, "plain", repeats=1, place=far_apart)

    def test_opcheck(self, backend: str) -> None:
        """torch.library.opcheck of every registered operator that forward and backward call."""
        call = map_tensors(
            lambda t: t.to(DEVICE), self.build(self.small, self.dtypes(backend)[0], torch.Generator().manual_seed(0))
        )
        leaf_call, leaves = self._leaves(call)
        with Recorder() as recorder:
            outputs = tensors_in(getattr(d2it.ops, self.op)(**leaf_call, backend=backend))
            floats = [t for t in outputs if t.is_floating_point()]
            if leaves:
                torch.autograd.grad(floats, leaves, [torch.randn_like(t) for t in floats], allow_unused=True)
        expected = 2 if leaves else 1  # forward, and backward as an operator of its own
        assert len(recorder.calls) >= expected, f"torch.ops.d2it saw {[str(c[0]) for c in recorder.calls]}"
        storages = {t.untyped_storage().data_ptr() for t in leaves}
        for i, (overload, args, kwargs) in enumerate(recorder.calls):
            differentiable = i == 0 and bool(leaves)

            def fresh(t: Tensor, differentiable: bool = differentiable) -> Tensor:
                needs = differentiable and t.untyped_storage().data_ptr() in storages
                return t.detach().clone().requires_grad_(needs)

            torch.library.opcheck(overload, map_tensors(fresh, args), map_tensors(fresh, kwargs))

    def test_reference_gradcheck(self) -> None:
        made = self.build(self.small, torch.float64, torch.Generator().manual_seed(0))
        call, leaves = self._leaves(map_tensors(lambda t: t.double() if t.is_floating_point() else t, made))

        def function(*tensors: Tensor) -> list[Tensor]:
            remaining = iter(tensors)
            placed = dict(call)
            for name in self.gradients:
                if call.get(name) is not None:
                    placed[name] = map_tensors(lambda t: next(remaining) if t.is_floating_point() else t, call[name])
            outputs = tensors_in(getattr(reference, self.op)(**placed))
            return tuple(t for t in outputs if t.is_floating_point())

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    def test_compiles_fullgraph(self, backend: str) -> None:
        """torch.compile(fullgraph=True), forward and backward, gives the eager bits."""
        made = self.build(self.small, self.dtypes(backend)[0], torch.Generator().manual_seed(0))
        call, leaves = self._leaves(map_tensors(lambda t: t.to(DEVICE), made))

        def function(call: Call) -> list[Tensor]:
            return tensors_in(getattr(d2it.ops, self.op)(**call, backend=backend))

        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        want, got = function(call), compiled(call)
        floats = [i for i, t in enumerate(want) if t.is_floating_point()]
        for a, b in zip(want, got):
            assert torch.equal(a, b)
        if leaves:
            cotangents = [torch.randn_like(want[i]) for i in floats]
            grads = [
                torch.autograd.grad([out[i] for i in floats], leaves, cotangents, allow_unused=True)
                for out in (want, got)
            ]
            for a, b in zip(*grads):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)

    if DEVICE == "cuda":

        @pytest.mark.gpu
        def test_cuda_graph(self, backend: str) -> None:
            """Forward and backward never synchronise; captured and replayed on new values, they give the eager bits."""
            first, second = (
                map_tensors(
                    lambda t: t.to(DEVICE),
                    self.build(self.small, torch.bfloat16, torch.Generator().manual_seed(seed)),
                )
                for seed in (0, 1)
            )
            call, leaves = self._leaves(first)

            def step() -> list[Tensor]:
                outputs = tensors_in(getattr(d2it.ops, self.op)(**call, backend=backend))
                floats = [t for t in outputs if t.is_floating_point()]
                grads = torch.autograd.grad(floats, leaves, [t.detach() for t in floats]) if leaves else ()
                return [*outputs, *grads]

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
                torch.cuda.set_sync_debug_mode("error")  # a synchronisation fails here, not by a broken capture
                try:
                    step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            with torch.no_grad():
                for a, b in zip(tensors_in(call), tensors_in(second)):
                    a.copy_(b)
            graph.replay()
            replayed = [t.clone() for t in captured]
            for a, b in zip(replayed, step()):
                assert torch.equal(a, b)

    @slow_when_interpreted
    def test_250_repeats_are_bit_equal(self, backend: str) -> None:
        self.check(self.small, backend, torch.float16, "plain", repeats=250)

    def test_mutation_is_noticed(self, mutation: Mutation, tmp_path: Path) -> None:
        with mutated(mutation, tmp_path):
            for shape in mutation.shapes or self.corners:
                for layout in ("plain", "pitched"):
                    try:
                        self.check(shape, "triton", torch.float32, layout, repeats=1)
                    except AssertionError:
                        return
        raise AssertionError(f"the suite does not notice: {mutation.name}")

    def test_cpp_mutation_is_noticed(self, cpp_mutation: str | None, run: Callable[..., None]) -> None:
        """None: the source as it is, compiled in the same way, is right."""
        run(self.cpp_mutations[0], cpp_mutation)
        with contextlib.nullcontext() if cpp_mutation is None else pytest.raises(AssertionError):
            for dtype in dtypes("cpu"):
                for i, shape in enumerate(self.cpp_shapes or self.corners):
                    for layout in dict.fromkeys(("plain", LAYOUTS[i % 4])):
                        self.check(shape, "cpu", dtype, layout, seed=1)


@contextlib.contextmanager
def mutated(mutation: Mutation, folder: Path) -> Iterator[None]:
    """Within it, operators run the mutated kernel file."""
    path = ROOT / mutation.file
    source = path.read_text()
    assert source.count(mutation.old) == 1, f"{mutation.name}: {mutation.old!r} occurs not once in {path.name}"
    copy = folder / path.name
    copy.write_text(source.replace(mutation.old, mutation.new))
    name = f"mutated_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks a kernel's globals up there
    original = f"d2it.kernels.{path.stem}"
    try:
        spec.loader.exec_module(module)
        with pytest.MonkeyPatch.context() as patch:
            swapped = 0
            for key, target in _register._TARGETS.items():
                home, _, function = target.partition(":")
                if home == original:
                    patch.setitem(_register._IMPLEMENTATIONS, key, getattr(module, function))
                    swapped += 1
            # Or they reach it through another kernel file, which imports its launchers.
            for target in _register._TARGETS.values():
                importlib.import_module(target.partition(":")[0])
            for importer in [sys.modules[key] for key in sys.modules if key.startswith("d2it.kernels.")]:
                for function, launcher in list(vars(importer).items()):
                    home = getattr(
                        getattr(launcher, "fn", launcher), "__module__", None
                    )  # fn: of an interpreted kernel
                    if importer.__name__ != original and home == original:
                        patch.setattr(importer, function, getattr(module, function))
                        swapped += 1
            assert swapped, f"no operator runs {original}"
            yield
    finally:
        sys.modules.pop(name, None)
        COMPILE_CASES.pop(name, None)
