"""What a user of d2it.ops relies on, whichever backend runs it."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from d2it import ops


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*shape, grains=2, seed=0):
    return torch.randint(0, grains, shape, generator=generator(seed))


# ---- entropy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gray", [-1.0, -0.5, 0.0, 0.31, 1.0])
def test_constant_region_has_the_entropy_of_the_sampled_kernel(gray):
    images = torch.full((1, 1, 16, 16), gray, dtype=torch.float64)
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    p = torch.exp(-0.5 * ((gray - bins) / 0.01) ** 2)
    expected = torch.special.entr(p / p.sum()).sum()
    torch.testing.assert_close(ops.kde_entropy(images, 16)[0, 0, 0], expected, atol=1e-12, rtol=0)
    assert expected.item() == pytest.approx(1.1218 if abs(gray) == 1 else 1.662, abs=1e-3)


def test_literal_entropy_follows_from_the_normalised_one():
    images = torch.rand(2, 3, 32, 16, generator=generator(), dtype=torch.float64) * 2 - 1
    regions = ops.reference.to_gray(images).reshape(2, 2, 1, 256)
    bins = torch.linspace(-1, 1, 64, dtype=torch.float64)
    z = torch.exp(-0.5 * ((regions[..., None] - bins) / 0.02) ** 2).mean(-2).sum(-1)
    normed = ops.kde_entropy(images, 16, num_bins=64, sigma=0.02)
    literal = ops.kde_entropy(images, 16, num_bins=64, sigma=0.02, normalize=False)
    torch.testing.assert_close(literal, z * normed - z * z.log(), atol=1e-10, rtol=0)


def test_uint8_spans_the_value_range():
    levels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    floats = levels.double() / 127.5 - 1
    torch.testing.assert_close(ops.kde_entropy(levels), ops.kde_entropy(floats).float(), atol=1e-4, rtol=0)


def test_encode_grains_is_entropy_then_thresholds():
    images = torch.rand(3, 3, 32, 48, generator=generator()) * 2 - 1
    images[1] *= 0.05
    entropy = ops.kde_entropy(images)
    limits = [float(entropy.median()) - 0.5, float(entropy.median())]
    grains, same = ops.encode_grains(images, limits)
    torch.testing.assert_close(same, entropy)
    assert torch.equal(grains, (entropy > limits[0]).long() + (entropy > limits[1]).long())
    assert torch.equal(grains, ops.grain_map(entropy, torch.tensor(limits)))
    assert grains.dtype == torch.int64
    assert grains.shape == (3, 2, 3)


def test_a_value_equal_to_a_threshold_does_not_exceed_it():
    assert ops.grain_map(torch.tensor([1.0, 2.0, 2.5]), [1.0, 2.0]).tolist() == [0, 1, 2]


def test_entropy_has_a_gradient_where_the_image_asks_for_one():
    images = torch.rand(1, 1, 4, 4, generator=generator(), dtype=torch.float64) * 2 - 1
    images.requires_grad_()
    assert gradcheck(lambda x: ops.kde_entropy(x, 4, sigma=0.2), images)
    ops.kde_entropy(images.float(), 4).backward(torch.tensor([[[0.7]]]))
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"images": torch.zeros(1, 2, 16, 16)}, ValueError, "images must have 1 or 3 channels"),
        ({"images": torch.zeros(1, 3, 17, 16)}, ValueError, "region_size=16 divides"),
        ({"images": torch.zeros(3, 16, 16)}, ValueError, "images must have 4 dimensions"),
        ({"images": torch.zeros(1, 3, 16, 16).long()}, TypeError, "images must be floating point or uint8"),
        ({"images": torch.full((1, 3, 16, 16), 1.01)}, ValueError, "images must be finite and inside"),
        ({"images": torch.full((1, 3, 16, 16), math.nan)}, ValueError, "images must be finite and inside"),
        ({"images": torch.full((1, 3, 16, 16), -math.inf)}, ValueError, "images must be finite and inside"),
        ({"thresholds": [2.0, 1.0]}, ValueError, "thresholds must ascend"),
        ({"thresholds": torch.tensor([1.0, 1.0])}, ValueError, "thresholds must ascend"),
        ({"thresholds": [math.nan]}, ValueError, "thresholds must be numbers"),
        ({"region_size": 0}, ValueError, "region_size must be at least 1"),
        ({"num_bins": 1}, ValueError, "num_bins must be at least 2"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive"),
        ({"value_range": (1.0, -1.0)}, ValueError, "value_range must be finite and ascend"),
    ],
)
def test_bad_input_to_the_entropy_names_the_argument(change, error, match):
    call = {"images": torch.zeros(1, 3, 16, 16), "thresholds": [1.0], "region_size": 16} | change
    with pytest.raises(error, match=match):
        ops.encode_grains(**call)


# ---- neighbour copy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(0, 2, 2), (2, 0, 0), (2, 2, 0), (0, 0, 0)])
def test_neighbor_copy_of_an_empty_grid_is_empty(size, backend):
    batch, h, w = size
    latents = [torch.randn(batch, 3, s * h, s * w, requires_grad=True) for s in (1, 2)]
    out = ops.neighbor_copy(latents, torch.zeros(size, dtype=torch.int64), backend=backend)
    assert out.shape == (batch, 3, 2 * h, 2 * w)
    out.backward(torch.randn_like(out))
    assert all(x.grad.shape == x.shape for x in latents)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4), (2, 6)])
def test_neighbor_copy_takes_every_cell_from_its_grain(scales):
    g = generator(1)
    grains = torch.randint(0, len(scales), (2, 3, 5), generator=g)
    latents = [torch.randn(2, 4, 3 * s, 5 * s, generator=g) for s in scales]
    merged = ops.neighbor_copy(latents, grains)
    finest = scales[-1]
    for b in range(2):
        for y in range(3 * finest):
            for x in range(5 * finest):
                grain = int(grains[b, y // finest, x // finest])
                ratio = finest // scales[grain]
                assert torch.equal(merged[b, :, y, x], latents[grain][b, :, y // ratio, x // ratio])


def test_neighbor_copy_gradient():
    grains = maps(2, 2, 3, grains=3)
    latents = [torch.randn(2, 2, 2 * s, 3 * s, dtype=torch.float64, requires_grad=True) for s in (1, 2, 4)]
    assert gradcheck(lambda *x: ops.neighbor_copy(x, grains), latents)


PAIR = [torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)]


@pytest.mark.parametrize(
    ("latents", "grains", "error", "match"),
    [
        (PAIR, torch.full((1, 2, 2), 2), ValueError, r"grain_map must have values in 0\.\.1"),
        (PAIR, torch.full((1, 2, 2), -1), ValueError, r"grain_map must have values in 0\.\.1"),
        ([torch.zeros(1, 2, 3, 2), PAIR[1]], torch.zeros(1, 2, 2).long(), ValueError, r"latents\[0\] must be"),
        (PAIR[::-1], torch.zeros(1, 2, 2).long(), ValueError, r"latents\[0\] must be"),
        ([PAIR[0].half(), PAIR[1]], torch.zeros(1, 2, 2).long(), TypeError, r"latents\[0\] must have the dtype"),
        ([], torch.zeros(1, 2, 2).long(), TypeError, "latents must be a non-empty"),
        (PAIR, torch.zeros(1, 2, 2), TypeError, "grain_map must be an integer"),
    ],
)
def test_bad_input_to_neighbor_copy_names_the_argument(latents, grains, error, match):
    with pytest.raises(error, match=match):
        ops.neighbor_copy(latents, grains)


# ---- planning and packing -----------------------------------------------------------------------------------------


def slow_plan(grains, cells, window, min_grain, sizes=None):
    """The contract of the row order, as loops."""
    batch, h, w = grains.shape
    height, width = h * cells, w * cells
    index, slots = [], []
    for b in range(batch):
        for wy in range(0, height, window):
            for wx in range(0, width, window):
                row = []
                for y in range(wy, wy + window):
                    for x in range(wx, wx + window):
                        row.append(-1)
                        grain = grains[b, y // cells, x // cells]
                        size = sizes[grain] if sizes else 1
                        if grain >= min_grain and y % size == 0 and x % size == 0:
                            row[-1] = len(index)
                            index.append((b * height + y) * width + x)
                slots.append(row)
    return index, slots


@pytest.mark.parametrize(
    ("shape", "cells", "window", "grains", "min_grain", "sizes"),
    [
        ((2, 2, 2), 2, 4, 2, 1, None),
        ((2, 2, 2), 2, 4, 2, 1, (2, 1)),
        ((3, 4, 6), 2, 4, 3, 2, None),
        ((1, 3, 5), 4, 2, 3, 1, None),
        ((1, 3, 5), 4, 2, 3, 1, (4, 2, 1)),
        ((2, 3, 4), 8, 4, 4, 0, (8, 4, 2, 1)),
        ((2, 1, 2), 8, 8, 3, 1, (8, 2, 1)),
        ((2, 5, 3), 1, 1, 2, 1, None),
        ((2, 3, 3), 3, 9, 2, 0, None),
        ((2, 3, 3), 3, 9, 2, 0, (3, 1)),
    ],
)
@pytest.mark.parametrize("spare", [0, 7])
def test_plan_lays_out_rows_as_the_contract_says(shape, cells, window, grains, min_grain, sizes, spare):
    grain_map = maps(*shape, grains=grains, seed=sum(shape))
    index, slots = slow_plan(grain_map, cells, window, min_grain, sizes)
    plan = ops.plan_tokens(
        grain_map,
        cells_per_region=cells,
        window=window,
        min_grain=min_grain,
        capacity=len(index) + spare,
        code_sizes=sizes,
    )
    assert plan.count.item() == len(index)
    assert plan.index.tolist() == index + [-1] * spare
    assert plan.slots.tolist() == slots
    per_image = shape[1] * shape[2] * cells**2
    assert plan.sample.tolist() == [i // per_image for i in index] + [shape[0] - 1] * spare
    rows = {cell: row for row, cell in enumerate(index)}
    assert plan.inverse.tolist() == [rows.get(cell, -1) for cell in range(shape[0] * per_image)]
    assert all(getattr(plan, f).dtype == torch.int32 for f in ("index", "inverse", "slots", "sample", "count"))


def test_pack_then_unpack_puts_every_token_back():
    plan = ops.plan_tokens(maps(3, 4, 4), capacity=150)
    x = torch.randn(3, 64, 5, generator=generator())
    base = torch.randn(3, 64, 5, generator=generator(1))
    packed = ops.pack_tokens(x, plan)
    assert packed.shape == (150, 5)
    assert not packed[plan.count :].any()
    fine = (plan.inverse >= 0).reshape(3, 64, 1)
    assert torch.equal(ops.unpack_tokens(packed, plan, base), torch.where(fine, x, base))
    assert torch.equal(ops.unpack_tokens(packed, plan), torch.where(fine, x, 0))


def test_pack_and_unpack_gradients():
    plan = ops.plan_tokens(maps(2, 2, 4), capacity=60)
    x = torch.randn(2, 32, 3, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(60, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.pack_tokens(x, plan), x)
    assert gradcheck(lambda p, b: ops.unpack_tokens(p, plan, b), (packed, x))


@pytest.mark.parametrize("batch", [0, 2])
def test_no_fine_token(batch):
    plan = ops.plan_tokens(torch.zeros(batch, 4, 4, dtype=torch.int64), capacity=0)
    x = torch.randn(batch, 64, 3)
    assert plan.count == 0
    assert ops.pack_tokens(x, plan).shape == (0, 3)
    assert torch.equal(ops.unpack_tokens(x.new_zeros(0, 3), plan, x), x)
    qkv = torch.randn(0, 3, 2, 4, requires_grad=True)
    out = ops.window_attention_qkvpacked(qkv, torch.randn(1, 2, 16, 16), slots=plan.slots)
    out.backward(torch.randn_like(out))
    assert out.shape == (0, 2, 4)
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"capacity": 15}, ValueError, "capacity must hold the tokens of the plan, got 15 for 16"),
        ({"capacity": -1}, ValueError, r"capacity must be in 0\.\.2143289344, got -1"),
        ({"capacity": 2**31}, ValueError, r"capacity must be in 0\.\.2143289344"),
        ({"window": 3}, ValueError, "window must divide the grid of 4 x 4 cells, got 3"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"grain_map": torch.full((1, 2, 2), -1)}, ValueError, "grain_map must have no value below 0"),
        ({"code_sizes": (1, 2)}, ValueError, r"code_sizes must be descending divisors of the 2 .* got \(1, 2\)"),
        ({"code_sizes": (3, 1)}, ValueError, "code_sizes must be descending divisors"),
        ({"code_sizes": ()}, ValueError, "code_sizes must be descending divisors"),
        ({"code_sizes": (2, 0)}, ValueError, "code_sizes must be at least 1, got 0"),
        ({"code_sizes": 2}, TypeError, "code_sizes must be a tuple of ints or None, got int"),
        ({"code_sizes": (2,)}, ValueError, "grain_map must have no value above 0, got 1"),
        ({"grain_map": torch.ones(1, 2, 2)}, TypeError, "grain_map must be an integer"),
        ({"grain_map": torch.ones(2, 2).long()}, ValueError, "grain_map must have 3 dimensions"),
    ],
)
def test_bad_input_to_the_plan_names_the_argument(change, error, match):
    call = {"grain_map": torch.ones(1, 2, 2, dtype=torch.int64), "window": 4} | change
    with pytest.raises(error, match=match):
        ops.plan_tokens(**call)


def test_tensors_that_do_not_fit_the_plan_are_named():
    plan = ops.plan_tokens(maps(2, 2, 2), capacity=32)
    with pytest.raises(ValueError, match="x must have the plan's 2 images of 16 cells"):
        ops.pack_tokens(torch.zeros(2, 15, 3), plan)
    with pytest.raises(ValueError, match="packed must have the plan's 32 rows"):
        ops.unpack_tokens(torch.zeros(19, 3), plan)
    with pytest.raises(ValueError, match="base must have shape"):
        ops.unpack_tokens(torch.zeros(32, 3), plan, torch.zeros(2, 16, 4))
    with pytest.raises(TypeError, match="base must have the dtype of packed"):
        ops.unpack_tokens(torch.zeros(32, 3), plan, torch.zeros(2, 16, 3).half())
    with pytest.raises(TypeError, match="plan must be a TokenPlan"):
        ops.pack_tokens(torch.zeros(2, 16, 3), plan.index)


# ---- window attention ---------------------------------------------------------------------------------------------


def textbook(q, k, v, bias=None, mask=None):
    """One window, one head: q, k, v (N, D)."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0), (0, 0, 0, 0)])
def test_windows_without_windows_tokens_heads_or_width_are_empty(shape, backend):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, shape[2], shape[1], shape[1], requires_grad=True)
    out = ops.window_attention(q, k, v, bias, backend=backend)
    assert out.shape == shape
    out.backward(torch.randn_like(out))
    for x in (q, k, v, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize(("wb", "hb"), [(1, 1), (1, 2), (3, 2), (6, 1)])
def test_dense_windows_with_every_shape_of_bias(wb, hb):
    g = generator(2)
    q, k, v = (torch.randn(6, 9, 2, 8, dtype=torch.float64, generator=g) for _ in range(3))
    bias = torch.randn(wb, hb, 9, 9, dtype=torch.float64, generator=g)
    out = ops.window_attention(q, k, v, bias)
    for w in range(6):
        for h in range(2):
            expected = textbook(q[w, :, h], k[w, :, h], v[w, :, h], bias[w % wb, h % hb])
            torch.testing.assert_close(out[w, :, h], expected)
    torch.testing.assert_close(out, ops.window_attention_qkvpacked(torch.stack((q, k, v), 2), bias))


def test_packed_windows_are_dense_windows_of_the_tokens_that_exist():
    g = generator(3)
    plan = ops.plan_tokens(maps(2, 4, 4, seed=5), capacity=110)
    qkv = torch.randn(110, 3, 2, 8, dtype=torch.float64, generator=g)
    bias = torch.randn(1, 2, 16, 16, dtype=torch.float64, generator=g)
    qkv[plan.count :] = math.nan  # rows without a name must not get in
    out = ops.window_attention_qkvpacked(qkv, bias, slots=plan.slots)
    named = torch.zeros(110, dtype=torch.bool)
    for window in plan.slots:
        at = (window >= 0).nonzero()[:, 0]
        rows = window[at].long()
        named[rows] = True
        for h in range(2):
            q, k, v = qkv[rows, :, h].unbind(1)
            torch.testing.assert_close(out[rows, h], textbook(q, k, v, bias[0, h][at][:, at]))
    assert not out[~named].any()


def test_segments_attend_only_within_themselves():
    g = generator(4)
    q, k, v = (torch.randn(4, 6, 1, 4, dtype=torch.float64, generator=g) for _ in range(3))
    ids = torch.tensor([[0, 0, 1, 1, 2, 1], [3, 3, 3, 3, 3, 3]])
    out = ops.window_attention(q, k, v, None, segment_ids=ids)
    for w in range(4):
        mask = ids[w % 2][:, None] == ids[w % 2]
        torch.testing.assert_close(out[w, :, 0], textbook(q[w, :, 0], k[w, :, 0], v[w, :, 0], mask=mask))


def test_window_attention_gradients():
    g = generator(5)
    plan = ops.plan_tokens(maps(1, 2, 4, seed=6), window=2, capacity=30)
    assert 0 < plan.count < 30
    qkv = torch.randn(30, 3, 2, 4, dtype=torch.float64, generator=g, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=g, requires_grad=True)
    assert gradcheck(lambda x, b: ops.window_attention_qkvpacked(x, b, slots=plan.slots), (qkv, bias))
    out = ops.window_attention_qkvpacked(qkv, bias, slots=plan.slots)
    cotangent = torch.randn(30, 2, 4, dtype=torch.float64, generator=g)
    assert not torch.autograd.grad(out, qkv, cotangent)[0][plan.count :].any()


def test_relative_position_bias_reads_the_table_by_offset():
    table = torch.arange(25.0 * 2).reshape(25, 2)
    bias = ops.relative_position_bias(table, 3)
    assert bias.shape == (1, 2, 9, 9)
    for i in range(9):
        for j in range(9):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            assert bias[0, 1, i, j] == table[(dy + 2) * 5 + dx + 2, 1]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"bias": torch.zeros(1, 3, 4, 4)}, ValueError, r"bias must be \(Wb, 1 or 2, 4, 4\), got \(1, 3, 4, 4\)"),
        ({"k": torch.zeros(2, 4, 2, 4)}, ValueError, "k must have the shape of q"),
        ({"v": torch.zeros(2, 4, 2, 8).half()}, TypeError, "v must have the dtype of q"),
        ({"slots": torch.zeros(2, 4).int()}, ValueError, "q must have 3 dimensions"),
        ({"segment_ids": torch.zeros(1, 3).int()}, ValueError, "segment_ids must be"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"backend": "cudnn"}, ValueError, "has no backend 'cudnn'"),
    ],
)
def test_bad_input_to_window_attention_names_the_argument(change, error, match):
    x = torch.zeros(2, 4, 2, 8)
    with pytest.raises(error, match=match):
        ops.window_attention(**({"q": x, "k": x, "v": x, "bias": None} | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(
    ("slots", "match"),
    [
        ([[0, 5], [-1, 1]], "slots must name rows that are there, got 5 of 5"),
        ([[0, 3], [3, -1]], "slots must name a row once, got row 3 twice"),
    ],
)
def test_slots_that_name_no_row_or_one_twice(slots, match, backend, dtype):
    qkv = torch.zeros(5, 3, 2, 8, dtype=dtype)
    slots = torch.tensor(slots, dtype=torch.int32)
    with pytest.raises(ValueError, match=match):
        ops.window_attention_qkvpacked(qkv, None, slots=slots, backend=backend)
    with pytest.raises(ValueError, match=match):
        ops.window_attention(*qkv.unbind(1), None, slots=slots, backend=backend)


@pytest.mark.skipif("triton" not in ops.available_backends("window_attention"), reason="Triton cannot run here")
@pytest.mark.parametrize("n", [4, 96])
def test_triton_takes_a_row_that_is_not_there_for_absent(n):
    """Where the host does not look (a GPU, between two synchronisations), nothing outside of the tensors is touched."""
    from d2it.kernels.window_attention import window_attention_backward, window_attention_forward

    memory = torch.full((3, 40, 1, 16), math.nan)  # rows 20 and on lie behind q, k and v
    memory[:, :20] = torch.randn(3, 20, 1, 16, generator=generator(7))
    q, k, v = memory[:, :20]
    slots = torch.full((2, n), -1, dtype=torch.int32)
    slots[0, :3], slots[1, 1:4] = torch.tensor([4, 2, 0]), torch.tensor([1, 19, 3])
    wrong = slots.clone()
    wrong[0, 3], wrong[1, 0] = 20, 2**31 - 1
    bias = torch.randn(1, 1, n, n, generator=generator(8))

    def run(slots):
        out, lse = window_attention_forward(q, k, v, bias, slots, None, 0.25)
        return out, *window_attention_backward(out, q, k, v, bias, slots, None, out, lse, 0.25, True)

    for got, want in zip(run(wrong), run(slots)):
        assert torch.equal(got, want)


# ---- adaLN --------------------------------------------------------------------------------------------------------


def test_modulation_of_packed_rows_is_that_of_their_images():
    g = generator(6)
    x = torch.randn(3, 7, 8, generator=g)
    branch, (shift, scale) = torch.randn(3, 7, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    sample = torch.arange(3, dtype=torch.int32).repeat_interleave(7)
    dense = ops.adaln_modulate(x, shift, scale)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(dense, normed * (1 + scale[:, None]) + shift[:, None])
    packed = ops.adaln_modulate(x.flatten(0, 1), shift, scale, sample=sample)
    torch.testing.assert_close(packed, dense.flatten(0, 1))
    dense = ops.gated_residual(x, branch, scale)
    torch.testing.assert_close(dense, x + branch * scale[:, None])
    packed = ops.gated_residual(x.flatten(0, 1), branch.flatten(0, 1), scale, sample=sample)
    torch.testing.assert_close(packed, dense.flatten(0, 1))


def test_modulation_gradients():
    x, branch = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shift, scale = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sample = torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32)
    assert gradcheck(lambda *a: ops.adaln_modulate(*a, sample=sample), (x, shift, scale))
    assert gradcheck(lambda *a: ops.gated_residual(*a, sample=sample), (x, branch, scale))


def test_bad_input_to_the_modulation_names_the_argument():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"shift must be \(2, 4\), got \(3, 4\)"):
        ops.adaln_modulate(x, torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="sample must have the 6 rows of x"):
        ops.adaln_modulate(x.reshape(6, 4), x[:, 0], x[:, 0], sample=torch.zeros(5).int())
    with pytest.raises(TypeError, match="sample must be int32 or int64, got torch"):
        ops.adaln_modulate(x.reshape(6, 4), x[:, 0], x[:, 0], sample=torch.zeros(6).short())
    with pytest.raises(ValueError, match="branch must have the shape of x"):
        ops.gated_residual(x, x[:, :2], x[:, 0])


# ---- backends -----------------------------------------------------------------------------------------------------

OPERATORS = [n for n in ops.__all__ if n not in ("TokenPlan", "available_backends", "why_not", "reference")]


@pytest.mark.parametrize("op", OPERATORS)
def test_every_operator_has_its_reference(op):
    assert "reference" in ops.available_backends(op)
    assert callable(getattr(ops.reference, op))
    assert ops.why_not(op, "reference") == []


def test_why_not_says_what_is_in_the_way():
    x = torch.zeros(1, 3, 16, 16)
    assert "has no backend 'tpu'" in ops.why_not("kde_entropy", "tpu", x)[0]
    with pytest.raises(ValueError, match="op must be one of"):
        ops.available_backends("kde")


def test_everything_compiles_into_one_graph():
    def f(images, x, table, weight):
        grains, _ = ops.encode_grains(images, [2.0])
        plan = ops.plan_tokens(grains, window=2)
        packed = ops.pack_tokens(x, plan)
        packed = ops.adaln_modulate(packed, weight, weight, sample=plan.sample)
        qkv = packed.reshape(-1, 3, 2, 4)
        out = ops.window_attention_qkvpacked(qkv, ops.relative_position_bias(table, 2), slots=plan.slots)
        out = ops.gated_residual(packed, out.flatten(1).repeat(1, 3), weight, sample=plan.sample)
        latents = [x.mT.reshape(2, 24, 4, 4)[..., ::2, ::2], x.mT.reshape(2, 24, 4, 4)]
        return ops.unpack_tokens(out, plan, x), ops.neighbor_copy(latents, grains)

    g = generator(7)
    images = torch.rand(2, 3, 32, 32, generator=g) * 2 - 1
    images[:, :, :16] *= 0.001
    x, weight = torch.randn(2, 16, 24, generator=g), torch.randn(2, 24, generator=g)
    table = torch.randn(9, 2, generator=g, requires_grad=True)
    expected = f(images, x, table, weight)
    torch.compiler.reset()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(images, x, table, weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    cotangent = torch.randn(expected[0].shape, generator=g)
    (wanted,) = torch.autograd.grad(expected[0], table, cotangent)
    torch.testing.assert_close(torch.autograd.grad(got[0], table, cotangent)[0], wanted)
