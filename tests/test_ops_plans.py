"""Token plans: made from masks and ragged windows, as pytrees and files, and made wrongly by hand."""

import dataclasses
import io
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree

from d2it import ops

GRAINS = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]])
BACKENDS = [name for name in ops.available_backends("pack_tokens") if name != "cuda"]


def plan() -> ops.TokenPlan:
    return ops.plan_tokens(GRAINS, window=2, capacity=18)


def test_a_mask_of_whole_regions_is_their_grain_map() -> None:
    mask = GRAINS.repeat_interleave(2, 1).repeat_interleave(2, 2).bool()
    for a, b in zip(_pytree.tree_leaves(ops.plan_from_mask(mask, window=2, capacity=18)), _pytree.tree_leaves(plan())):
        assert torch.equal(a, b)


def test_a_mask_takes_any_cells() -> None:
    mask = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    made = ops.plan_from_mask(mask, window=2)
    assert made.count == mask.sum()
    assert torch.equal((made.inverse >= 0).reshape(3, 6, 4), mask)
    x = torch.randn(3, 24, 5)
    assert torch.equal(ops.unpack_tokens(ops.pack_tokens(x, made), made), torch.where(mask.reshape(3, 24, 1), x, 0))


def test_slots_of_ragged_windows_attend_as_windows_one_by_one() -> None:
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    slots = ops.slots_from_cu_seqlens(offsets, 5)
    assert slots.tolist() == [[0, 1, 2, -1, -1], [-1] * 5, [3, 4, 5, 6, 7], [8, -1, -1, -1, -1]]
    q, k, v = torch.randn(3, 9, 2, 8).unbind()
    out = ops.window_attention(q, k, v, slots=slots)
    for a, b in zip(offsets.tolist(), offsets[1:].tolist()):
        alone = ops.window_attention(*(x[None, a:b] for x in (q, k, v)), backend="reference")[0]
        torch.testing.assert_close(out[a:b], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("offsets", "size", "match"),
    [
        ([0, 3, 2], 4, "cu_seqlens must not"),
        ([-1, 3], 4, "cu_seqlens must not"),
        ([0, 5], 4, "size must hold .* 5 rows"),
    ],
)
def test_wrong_offsets_are_named(offsets: list[int], size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.slots_from_cu_seqlens(torch.tensor(offsets, dtype=torch.int32), size)


def test_a_plan_is_a_pytree_and_a_file() -> None:
    made = plan()
    leaves, spec = _pytree.tree_flatten(made)
    assert len(leaves) == 5
    again = _pytree.tree_unflatten(leaves, _pytree.treespec_loads(_pytree.treespec_dumps(spec)))
    assert (again.capacity, again.window, again.grid) == (made.capacity, made.window, made.grid)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    x = torch.randn(2, 16, 3)
    for other in (again, loaded, made.to("cpu")):
        assert torch.equal(ops.pack_tokens(x, other), ops.pack_tokens(x, made))
    assert made.to("meta").slots.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"index": "plan.index.long()"}, "TypeError: plan.index must be int32"),
        ({"index": "plan.index + 32"}, "ValueError: plan.index must contain values below 32"),
        ({"index": "torch.full_like(plan.index, 2**30)"}, "ValueError: plan.index must contain values below 32"),
        ({"index": "plan.index.flip(0)"}, "ValueError: plan.index must be the inverse"),
        ({"index": "plan.index[:5]"}, "ValueError: plan.index must have shape"),
        ({"index": "plan.index.to('meta')"}, "ValueError: plan.inverse must have the device of plan.index"),
        ({"inverse": "plan.inverse + 18"}, "ValueError: plan.inverse must contain values below 18"),
        ({"inverse": "None"}, "TypeError: plan.inverse must be a tensor"),
        ({"slots": "plan.slots[:1]"}, "ValueError: plan.slots must have shape"),
        ({"capacity": "17"}, "ValueError: plan.index must have shape"),
        ({"capacity": "'18'"}, "TypeError: plan.capacity must be an int"),
        ({"window": "3"}, "ValueError: plan.window must divide"),
        ({"grid": "(2, 16)"}, "TypeError: plan.grid must be"),
        ({"grid": "(2, 4, 8)"}, "ValueError: plan.inverse must have shape"),
    ],
)
def test_a_wrong_plan_is_an_error(change: dict[str, str], match: str, backend: str) -> None:
    names = {"plan": plan(), "torch": torch}
    wrong = dataclasses.replace(plan(), **{name: eval(value, names) for name, value in change.items()})
    for call in (
        lambda: ops.pack_tokens(torch.zeros(2, 16, 3), wrong, backend=backend),
        lambda: ops.unpack_tokens(torch.zeros(18, 3), wrong, backend=backend),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert match in f"{type(caught.value).__name__}: {caught.value}"


CHANGES = ("plan.{}.fill_(2**30)", "plan.{}.numpy()[:] = 2**30")
# One process imports PyTorch and forks one for each call, which a read far outside would end: its line has what was
# printed, and its exit code.
CHANGED_IN_PLACE = """
import os, sys
import torch
from d2it import ops

def use(change, backend):
    plan = ops.plan_tokens(torch.ones(2, 4, 4, dtype=torch.int64))
    exec(change)
    for call in (lambda: ops.pack_tokens(torch.zeros(2, 64, 16), plan, backend=backend),
                 lambda: ops.unpack_tokens(torch.zeros(128, 16), plan, backend=backend)):
        try:
            print(call().abs().max().item(), end=" ")
        except (ValueError, IndexError) as error:
            print(type(error).__name__, end=" ")
    sys.stdout.flush()

for line in sys.stdin.read().splitlines():
    child = os.fork()
    if not child:
        use(*line.split(" | "))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def changed_in_place() -> dict[tuple[str, str], str]:
    """(change, backend) -> what was printed, then the exit code."""
    cases = [(c.format(field), b) for b in BACKENDS for c in CHANGES for field in ("index", "inverse")]
    command = [sys.executable, "-c", CHANGED_IN_PLACE]
    given = "\n".join(" | ".join(case) for case in cases)
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("field", ["index", "inverse"])
def test_a_plan_changed_in_place_reads_nothing_outside(
    changed_in_place: dict[tuple[str, str], str], field: str, change: str, backend: str
) -> None:
    *printed, code = changed_in_place[change.format(field), backend].split()
    assert code == "0"
    assert len(printed) == 2
    assert "ValueError" in printed or "IndexError" in printed
    assert set(printed) <= {"ValueError", "IndexError", "0.0"}


@pytest.mark.parametrize("backend", [b for b in ops.available_backends("window_attention") if b != "cuda"])
@pytest.mark.parametrize("windows", [0, 3])
def test_windows_without_a_token_give_zeros(windows: int, backend: str) -> None:
    qkv = torch.randn(5, 3, 2, 8, requires_grad=True)
    bias = torch.randn(1, 2, 16, 16, requires_grad=True)
    slots = torch.full((windows, 16), -1, dtype=torch.int32)
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory is NaN
    try:
        out = ops.window_attention_qkvpacked(qkv, bias, slots=slots, backend=backend)
        gradients = torch.autograd.grad(out, (qkv, bias), torch.randn(out.shape))
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.shape == (5, 2, 8)
    assert not any(t.count_nonzero() for t in (out, *gradients))
