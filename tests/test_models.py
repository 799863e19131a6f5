"""The transformers: sizes, packed against masked, labels, precision, compilation, weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode

from d2it import ops
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, layers


def randomize(model, seed=0, std=0.1):
    """Weights with every path open: the zero-initialised gates would hide most of a model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)
    return model


def content_inputs(model, batch=2, seed=0, dtype=torch.float32, fine=0.5):
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_channels, *config.grid, generator=generator, dtype=dtype)
    t = torch.randint(1000, (batch,), generator=generator)
    y = torch.randint(max(config.num_classes, 1), (batch,), generator=generator)
    draw = torch.rand(batch, *config.region_grid, generator=generator)
    grains = torch.where(draw < fine, torch.randint(1, config.num_grains, draw.shape, generator=generator), 0)
    return x, t, y, grains


CONTENT = {
    "two-grains": {"image_size": 64},
    "wide": {"image_size": (64, 96), "relative_bias": "matrix"},
    "three-grains": {"image_size": (64, 128), "downsampling": (8, 16, 32)},
    "three-grains-patch2": {"image_size": 64, "downsampling": (4, 8, 16), "patch_size": 2, "relative_bias": "none"},
    "finest-only": {"image_size": 64, "downsampling": (8, 16, 32), "min_grain": 2},
    "codes-of-two-grains": {"image_size": 64, "min_grain": 0},
    "unequal-factors": {"image_size": (32, 64), "downsampling": (4, 8, 32), "window": 8},
    "four-grains": {"image_size": (64, 128), "downsampling": (4, 8, 16, 32), "relative_bias": "matrix"},
    "windows-across-codes": {"image_size": 96, "downsampling": (8, 16, 32), "window": 3},
}


def make_content(**settings):
    settings = {"dim": 32, "heads": 2, "depth": 2, "refine_depth": 2, "num_classes": 5, **settings}
    return randomize(DynamicContentTransformer.from_preset("tiny", **settings))


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [("D2iT-B", 136, 0.005), ("D2iT-L", 467, 0.005), ("D2iT-XL", 687, 0.005), ("DiT-S", 33, 0.02)],
)
def test_parameters_of_the_paper(name, millions, tolerance):
    cls = DynamicGrainTransformer if name == "DiT-S" else DynamicContentTransformer
    with torch.device("meta"):
        model = cls.from_preset(name)
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=tolerance)


@pytest.mark.parametrize("name", list(DynamicContentTransformer.presets))
def test_presets_keep_dits_ratio(name):
    config = DynamicContentTransformer.preset_config(name)
    assert config.depth / config.refine_depth == pytest.approx(5, abs=0.5)
    assert config.dim % (4 * config.heads) == 0


def test_positions_are_dits():
    h, w, dim = 3, 5, 16
    expected = torch.zeros(h * w, dim)
    for row in range(h):
        for column in range(w):
            for i in range(dim // 4):
                rate = 10000 ** (-i / (dim // 4))
                for part, place in enumerate((column, row)):
                    angle = torch.tensor(place * rate, dtype=torch.float64)
                    expected[row * w + column, part * dim // 2 + i] = angle.sin()
                    expected[row * w + column, part * dim // 2 + dim // 4 + i] = angle.cos()
    torch.testing.assert_close(layers.sincos_positions((h, w), dim), expected)


# ---- packed and masked ----------------------------------------------------------------------------------------------


def gradients(model, inputs, cotangent, **options):
    model.zero_grad(set_to_none=True)
    x = inputs[0].clone().requires_grad_()
    out = model(x, *inputs[1:], **options)
    out.backward(cotangent)
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("settings", CONTENT.values(), ids=CONTENT)
def test_packed_equals_masked(settings):
    model = make_content(**settings).double()
    inputs = content_inputs(model, dtype=torch.float64)
    cotangent = torch.randn(2, model.config.out_channels, *model.config.grid, dtype=torch.float64)
    packed, packed_grads = gradients(model, inputs, cotangent)
    model.config.masked = True
    masked, masked_grads = gradients(model, inputs, cotangent)
    torch.testing.assert_close(packed, masked)
    assert packed_grads.keys() == masked_grads.keys()
    for name, grad in packed_grads.items():
        assert grad is not None, name
        torch.testing.assert_close(grad, masked_grads[name], msg=lambda m, name=name: f"{name}: {m}")
    # Nothing was compared between zeros: every parameter but the grain embeddings of absent grains has a gradient.
    silent = {n for n, g in packed_grads.items() if not g.any()}
    assert silent <= {"refine.grain.weight"}


def test_two_grains_are_one_token_a_cell_bit_for_bit():
    """The first cells of codes of one cell are all cells: the general way gives what two grains do without it."""
    model = make_content(image_size=64)
    inputs = content_inputs(model)
    assert not model.config.refines_codes
    grains, plan = inputs[3], model.make_plan(inputs[3], capacity=100)
    of_codes = ops.plan_tokens(grains, window=4, capacity=100, code_sizes=(2, 1))
    for name in ("index", "inverse", "slots", "sample", "count"):
        assert torch.equal(getattr(plan, name), getattr(of_codes, name))
    with torch.no_grad():
        expected = model(*inputs)
        type(model.config).refines_codes, kept = True, type(model.config).refines_codes
        try:
            general = model(*inputs)
        finally:
            type(model.config).refines_codes = kept
    assert torch.equal(general, expected)


def test_a_code_is_one_token():
    """Its features are the state's value and the mean of the rough noise; its correction goes to all of its cells."""
    model = make_content(image_size=64, downsampling=(8, 16, 32), depth=1)
    x, t, y, _ = content_inputs(model)
    grains = torch.tensor([[[0, 1], [2, 1]], [[2, 0], [1, 2]]])
    x = x.repeat_interleave(4, 2)[:, :, :8].repeat_interleave(4, 3)[..., :8]  # one value a region
    seen = []
    model.refine.register_forward_hook(lambda module, args, out: seen.append((args[0], args[1], out)))
    rough = []
    model.multi_grained.register_forward_hook(lambda module, args, out: rough.append(out))
    with torch.no_grad():
        out = model(x, t, y, grains, capacity=4 * 4 + 3 * 16 - 4)
    (features, positions, correction), rough = seen[0], rough[0]
    assert model.config.region_tokens(grains).tolist() == [[[0, 4], [16, 4]], [[16, 0], [4, 16]]]
    plan = model.make_plan(grains, capacity=len(features))
    assert plan.count == len(features) == 60
    out = out.permute(0, 2, 3, 1)
    for row, cell in enumerate(plan.index.tolist()):
        b, i, j = cell // 64, cell // 8 % 8, cell % 8
        size = (4, 2, 1)[grains[b, i // 4, j // 4]]
        code = (b, slice(i, i + size), slice(j, j + size))
        torch.testing.assert_close(features[row, :8], rough[code].mean(dim=(0, 1)))
        assert torch.equal(features[row, 8:12], x[b, :, i, j])
        assert features[row, 12:].tolist() == [float(g == grains[b, i // 4, j // 4]) for g in range(3)]
        assert torch.equal(positions[row], model.refine.positions[i * 8 + j])
        assert torch.equal(out[code], rough[code] + correction[row])
    coarse = (grains == 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(out[coarse], rough[coarse])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factors", [(8, 16), (8, 16, 32)])
def test_images_above_refine_until_are_not_refined(masked, factors):
    """`refine_until` holds image by image: t / T below it is refined, at and above it the rough noise stays."""
    model = make_content(image_size=64, downsampling=factors, masked=masked)
    x, _, y, grains = content_inputs(model, batch=4, fine=1.0)
    t = torch.tensor([0, 299, 300, 999])
    with torch.no_grad():
        full = model(x, t, y, grains)
        rough = model(x, t, y, grains, refine=False)
        model.config.refine_until = 0.3
        half = model(x, t, y, grains)
    torch.testing.assert_close(half[:2], full[:2])
    assert torch.equal(half[2:], rough[2:])
    assert all((full[i] != rough[i]).any() for i in range(4))
    _, grads = gradients(model, (x, torch.full((4,), 300), y, grains), torch.randn_like(full))
    for name, grad in grads.items():
        assert grad is not None, f"{name} has no gradient: a rank without fine tokens would hang the others"
        assert not (name.startswith("refine.") and grad.any())


def test_refinenet_changes_fine_cells_only():
    model = make_content(image_size=64)
    x, t, y, grains = content_inputs(model)
    with torch.no_grad():
        rough = model(x, t, y, torch.zeros_like(grains))
        out = model(x, t, y, grains)
        torch.nn.init.zeros_(model.grain.weight)  # the maps differ in the trunk by this embedding alone
        rough, out = model(x, t, y, torch.zeros_like(grains)), model(x, t, y, grains)
    fine = grains.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None] == 1
    changed = (out != rough).any(dim=1, keepdim=True)
    assert torch.equal(changed, fine)


def test_windows_do_not_see_each_other():
    model = make_content(image_size=64, depth=1)
    x, t, y, grains = content_inputs(model, fine=1.0)
    # The trunk sees everything; RefineNet's correction of a window must not see another window's latents.
    noise = torch.randn(2, *model.config.grid, model.config.out_channels)
    features = torch.cat([noise, x.permute(0, 2, 3, 1), noise.new_ones(2, *model.config.grid, 2)], dim=-1)
    plan = model.make_plan(grains)
    with torch.no_grad():
        before = model._refine_packed(features, noise, t, y, grains, plan)
        features[:, :4, :4, 8:12] += 1.0
        after = model._refine_packed(features, noise, t, y, grains, plan)
    changed = (before != after).any(dim=-1)
    assert changed[:, :4, :4].all()
    assert not changed[:, 4:].any()
    assert not changed[:, :4, 4:].any()


@pytest.mark.parametrize("capacity", [None, 0, 7])
def test_all_coarse_runs_refinenet(capacity):
    model = make_content(image_size=64)
    x, t, y, grains = content_inputs(model, fine=0.0)
    assert not grains.any()
    _, grads = gradients(model, (x, t, y, grains), torch.randn(2, 8, 8, 8), capacity=capacity)
    for name, grad in grads.items():
        assert grad is not None, f"{name} has no gradient: a rank without fine tokens would hang the others"
        assert grad.isfinite().all()
        if name.startswith("refine."):
            assert not grad.any()


def test_plan_and_capacity_do_not_change_the_result():
    model = make_content(image_size=64)
    inputs = content_inputs(model)
    rows = int((inputs[3] >= 1).sum()) * 4
    with torch.no_grad():
        out = model(*inputs)
        for other in (
            model(*inputs, model.make_plan(inputs[3])),
            model(*inputs, capacity=rows),
            model(*inputs, capacity=rows + 13),
        ):
            torch.testing.assert_close(out, other)
    with pytest.raises(ValueError, match="capacity"):
        model(*inputs, capacity=rows - 1)


def test_zero_initialised_correction_and_output():
    model = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=5)
    assert not model(*content_inputs(model)).any()


def test_forward_reads_no_value_on_the_host(monkeypatch):
    """Fake tensors have no values: whatever needs one (a synchronisation on a GPU) raises."""
    # The operators check the values of CPU tensors at once, those of a GPU on the GPU.
    monkeypatch.setattr("d2it.ops._check.values", lambda *args: None)
    with FakeTensorMode():
        model = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=5)
        batch, cells, rows = 3, 64, 100
        i32 = {"dtype": torch.int32}
        plan = ops.TokenPlan(
            index=torch.zeros(rows, **i32),
            inverse=torch.zeros(batch * cells, **i32),
            slots=torch.zeros(batch * 4, 16, **i32),
            sample=torch.zeros(rows, **i32),
            count=torch.zeros((), **i32),
            capacity=rows,
            window=4,
            grid=(batch, 8, 8),
        )
        x = torch.randn(batch, 4, 8, 8)
        y = torch.zeros(batch, dtype=torch.long)
        out = model(x, torch.zeros(batch), y, torch.zeros(batch, 4, 4, dtype=torch.long), plan, force_drop_ids=y.bool())
        out.backward(torch.randn_like(out))
        assert out.shape == (batch, 8, 8, 8)


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_null_label_and_dropout():
    model = make_content(image_size=64)
    x, t, y, grains = content_inputs(model, batch=3)
    drop = torch.tensor([True, False, True])
    null = torch.where(drop, 5, y)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y, grains, force_drop_ids=drop), model(x, t, null, grains))
        assert not torch.allclose(model(x, t, y, grains), model(x, t, null, grains))
    mask = model.label_dropout_mask(20_000, generator=torch.Generator().manual_seed(1))
    assert mask.float().mean() == pytest.approx(0.1, abs=0.01)
    again = model.label_dropout_mask(20_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mask, again)


@pytest.mark.parametrize("classes", [None, 0])
def test_unconditional(classes):
    model = make_content(image_size=64, num_classes=classes)
    x, t, y, grains = content_inputs(model)
    assert not any("label" in name for name in model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, None, grains), model(x, t, y, grains))


# ---- precision, memory, compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["content", "masked", "dit", "grain"])
def test_autocast_follows_float32(kind):
    if kind == "dit":
        model = randomize(DiT.from_preset("tiny", image_size=64, num_classes=5), std=0.05)
        inputs = content_inputs(make_content(image_size=64))[:3]
    elif kind == "grain":
        model = randomize(DynamicGrainTransformer.from_preset("tiny", grid=(4, 6), num_classes=5), std=0.05)
        inputs = (torch.randn(2, 1, 4, 6), torch.tensor([3, 700]), torch.tensor([0, 4]))
    else:
        model = randomize(make_content(image_size=64, masked=kind == "masked"), std=0.05)
        inputs = content_inputs(model)
    exact = model(*inputs)
    dtypes = []
    block = model.transformer_blocks()[0]
    block.modulation.register_forward_hook(lambda m, i, o: dtypes.append(o[0].dtype))
    block.register_forward_hook(lambda m, i, o: dtypes.extend(x.dtype for x in o))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs)
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (out.float() - exact).std() < 0.03 * exact.std()
    out.float().backward(torch.randn_like(exact))
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_changes_no_gradient():
    model = make_content(image_size=64)
    inputs = content_inputs(model)
    cotangent = torch.randn(2, 8, 8, 8)
    _, plain = gradients(model, inputs, cotangent)
    calls = []
    model.transformer_blocks()[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = True
    _, recomputed = gradients(model, inputs, cotangent)
    assert len(calls) == 2
    for name, grad in plain.items():
        torch.testing.assert_close(grad, recomputed[name])


@pytest.mark.parametrize("bias", ["matrix", "table"])
def test_blocks_compile_without_a_graph_break(bias):
    model = make_content(image_size=64, relative_bias=bias)
    inputs = content_inputs(model)
    cotangent = torch.randn(2, 8, 8, 8)
    expected, expected_grads = gradients(model, inputs, cotangent)
    names = set(model.state_dict())
    model.compile_blocks(backend="aot_eager")
    assert set(model.state_dict()) == names
    out, grads = gradients(model, inputs, cotangent)
    torch.testing.assert_close(out, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=2e-5, rtol=1e-4)


# ---- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 3}, "window must divide the latent grid 8 x 8, got 3"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"depth": 2.5}, "depth must be a whole number of at least 1, got 2.5"),
        ({"image_size": 72}, "image_size must be a multiple of 16"),
        ({"downsampling": (16, 8)}, "downsampling must ascend"),
        ({"downsampling": 8}, "downsampling must be a list of whole numbers above 0, got 8"),
        ({"patch_size": 3}, "patch_size must divide"),
        ({"min_grain": 2}, "min_grain must be in 0"),
        ({"refine_until": 1.5}, "refine_until must be a share in 0 ... 1, got 1.5"),
        ({"refine_until": float("nan")}, "refine_until must be a share"),
        ({"refine_until": "half"}, "refine_until must be a share in 0 ... 1, got 'half'"),
        ({"refine_until": 0.5, "min_grain": 0}, "refine_until must be 1 where RefineNet corrects the coarsest grain"),
        ({"relative_bias": "swin"}, "relative_bias must be"),
        ({"heads": 5}, "heads must divide"),
        ({"attention": "magic"}, "attention must be one of"),
        ({"attention": "flash_attn"}, "flash_attn, which is not installed"),
        ({"colour": 1}, "no setting colour"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicContentTransformer.from_preset("tiny", **{"image_size": 64, **settings})


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of D2iT-S.*got 'D2iT-XXL'"):
        DynamicContentTransformer.from_preset("D2iT-XXL")


def test_inputs_that_do_not_fit():
    model = make_content(image_size=64)
    x, t, y, grains = content_inputs(model)
    for args, message in [
        ((x[:, :3], t, y, grains), r"x must be \(B, 4, 8, 8\)"),
        ((x, t[:1], y, grains), r"t must be \(2,\)"),
        ((x, t, None, grains), "y must be"),
        ((x, t, y, None), "grain_map must be"),
        ((x, t, y, grains[:, :2]), "grain_map must be"),
        ((x, t, y, grains, model.make_plan(grains[:1])), r"plan must be for cells \(2, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(*args)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        DynamicContentTransformer.from_preset("tiny", image_size=(64, 96), num_classes=3),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 6), num_classes=None),
        DiT.from_preset("tiny", image_size=64),
    ],
    ids=lambda m: type(m).__name__,
)
def test_save_and_load(tmp_path, model):
    randomize(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    own, read = (dict((*m.named_parameters(), *m.named_buffers())) for m in (model, loaded))
    assert own.keys() == read.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, read[name]), name
        assert tensor.requires_grad == read[name].requires_grad
    model.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in type(model).from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    model.float()


def test_weights_of_another_model(tmp_path):
    model = DiT.from_preset("tiny", image_size=64)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DiT, not a DynamicGrainTransformer"):
        DynamicGrainTransformer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another shape.*\(trunk"):
        DiT.from_pretrained(tmp_path, dim=64)
    with pytest.raises(ValueError, match="missing"):
        DiT.from_pretrained(tmp_path, depth=7)
    with pytest.raises(ValueError, match="of another model"):
        DiT.from_pretrained(tmp_path, depth=5)
    with pytest.raises(ValueError, match="there is no folder"):
        DiT.from_pretrained(tmp_path / "absent")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 10)
    with pytest.raises(ValueError, match="cannot be read"):
        DiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "DiT"}))
    with pytest.raises(ValueError, match="not the configuration"):
        DiT.from_pretrained(tmp_path)
