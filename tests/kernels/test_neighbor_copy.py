import random

import pytest
import torch

from d2it.ops import reference
from tests import cuda_on_cpu
from tests.kernels.harness import DEVICE, Call, KernelSuite, Shape, fast_backends

CPP_MUTATIONS = {
    "wrong row": ("const T* in = latent.at(b, c, «top / ratio», 0)", "top / 2"),
    "grain ignored": ("const T mine = mask<T>(«grains[x] == grain»)", "true"),
    "fine where coarse": ("mask<Pair<T>>(«grains[x] == static_cast<Pair<T>>(finest)»)", "true"),
    "grain overlooked": ("bits |= 1u << «in[x]»", "0"),
    "stale map": ("if («b == image») return;", "image >= 0"),
    "wrong pixel": ("latent.at(b, 0, y / latent.ratio, «x * cells»)", "x"),
    "missing row of the gradient": (
        "for (int64_t j = «0»; j < ratio; ++j) {\n      for (int64_t i = 0; i < ratio",
        "1",
    ),
    "column left out of the gradient": ("return left(«pair >> 8 * sizeof(T)»)", "pair"),
    "gradient of every grain": ("bits_as(sum, T{}) & mask<uint32_t>(«grains[x] == grain»)", "true"),
    "gradient not cleared": ("if («grains[x / cells] != i») {", "false"),
}
CUDA_MUTATIONS = {
    "wrong repeat": ("out[i] = in[«i >> kShift»]", "i % (kCount >> kShift)"),
    "wrong word": ("if («grain[2] == i») value[u].z", "grain[1] == i"),
    "wrong region": ("y >> region_shift, «(x + w * kPerWord)» >> region_shift", "x"),
    "missing channels": ("if («c < channels») d2it::put(", "c < channels - 1"),
    "wrong pixel": ("«(i >> shift)» * latent.column", "i"),
    "missing row of the gradient": ("for (int l = «0»; l < kRatio; ++l)", "1"),
    "wrong grain of the gradient": ("if («grain[x * kRatio / kRegion] != i»)", "grain[0] != i"),
    "gradient of one column": ("load(cell + l * grad.row + «m * grad.column», in)", "0"),
    "gradient not zeroed": ("    if («grain != i») {", "false"),
}


SOURCES = cuda_on_cpu.Sources({"neighbor_copy.cpp": CPP_MUTATIONS, "neighbor_copy_cuda.cu": CUDA_MUTATIONS})


class TestNeighborCopy(KernelSuite):
    op = "neighbor_copy"
    gradients = ("latents",)
    cpp_mutations = "neighbor_copy.cpp", CPP_MUTATIONS
    # scales: cells of each grain along a side of a region. Vectors of 16 bytes are 4 or 8 columns, or as many
    # channels: widths and channels are multiples of them, one more, one less, and prime.
    corners = [
        {"B": 0, "C": 4, "h": 2, "w": 2, "scales": (1, 2)},
        {"B": 2, "C": 0, "h": 2, "w": 2, "scales": (1, 2)},
        {"B": 1, "C": 1, "h": 1, "w": 1, "scales": (1,)},
        {"B": 2, "C": 3, "h": 2, "w": 4, "scales": (1, 1)},
        {"B": 2, "C": 8, "h": 3, "w": 8, "scales": (1, 2)},
        {"B": 2, "C": 16, "h": 5, "w": 7, "scales": (1, 2)},
        {"B": 1, "C": 37, "h": 3, "w": 4, "scales": (1, 2, 4)},
        {"B": 2, "C": 8, "h": 1, "w": 2, "scales": (1, 2, 4, 8)},
        {"B": 1, "C": 5, "h": 2, "w": 3, "scales": (1, 3, 6)},
        {"B": 3, "C": 4, "h": 2, "w": 4, "scales": (2, 4), "fill": 0.0},
        {"B": 3, "C": 4, "h": 2, "w": 4, "scales": (1, 2), "fill": 1.0},
        {"B": 2, "C": 24, "h": 4, "w": 4, "scales": (1, 2), "channels_last": True},
        {"B": 1, "C": 8, "h": 2, "w": 3, "scales": (1, 2, 4), "channels_last": True},
        {"B": 1, "C": 16, "h": 1, "w": 2, "scales": (1, 2, 4, 8), "channels_last": True},
        {"B": 2, "C": 4, "h": 3, "w": 2, "scales": (1, 2), "channels_last": True},
    ]
    gpu_corners = [
        {"B": 30, "C": 256, "h": 16, "w": 16, "scales": (1, 2)},
        {"B": 256, "C": 4, "h": 16, "w": 16, "scales": (1, 2)},
        {"B": 8, "C": 256, "h": 8, "w": 8, "scales": (1, 2, 4), "channels_last": True},
    ]
    small = {"B": 2, "C": 4, "h": 2, "w": 4, "scales": (1, 2)}

    def random_shape(self, rng: random.Random) -> Shape:
        return {
            "B": rng.randint(1, 3),
            "C": rng.choice((1, 2, 3, 4, 8, 11, 16, 32)),
            "h": rng.randint(1, 5),
            "w": rng.choice((1, 2, 3, 4, 5, 8)),
            "scales": rng.choice(((1,), (1, 2), (1, 4), (1, 3), (2, 2), (1, 2, 4), (1, 2, 8), (1, 2, 4, 8))),
            "channels_last": rng.random() < 0.5,
        }

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        layout = torch.channels_last if shape.get("channels_last") else torch.contiguous_format
        latents = [
            torch.randn(shape["B"], shape["C"], shape["h"] * s, shape["w"] * s, generator=rng, dtype=torch.float64)
            .to(dtype)
            .contiguous(memory_format=layout)
            for s in shape["scales"]
        ]
        size = (shape["B"], shape["h"], shape["w"])
        if "fill" in shape:
            grains = (torch.rand(size, generator=rng) < shape["fill"]).long()
        else:
            grains = torch.randint(0, len(latents), size, generator=rng)
        return {"latents": latents, "grain_map": grains}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_vectors(self, backend, dtype):
        """Latents and gradients dense and aligned, where whole vectors move."""
        for shape in self.corners:
            self.check(shape, backend, dtype, "plain", seed=1)


EMULATED = cuda_on_cpu.COMPILER and DEVICE == "cpu" and "cpu" in fast_backends("neighbor_copy")


def far(shape, order, place, dtype):
    """An unwritten tensor, its dimensions in memory in this order, whose order[place] spans more than 2^31 elements: of
    the memory only its elements are ever touched."""
    strides, step = [0] * len(shape), 1
    for d in reversed(order):
        apart = 2**31 // max(shape[d] - 1, 1) // 64 * 64 + 64
        strides[d] = max(step, apart) if d == order[place] else step
        step = strides[d] * shape[d]
    last = sum((n - 1) * stride for n, stride in zip(shape, strides))
    return torch.empty(last + 1, dtype=dtype).as_strided(shape, strides)


@pytest.mark.skipif(not EMULATED, reason="needs a C++ compiler, and memory that is only promised")
@pytest.mark.parametrize("file", ["neighbor_copy.cpp", "neighbor_copy_cuda.cu"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("width", [4, 3])
def test_more_elements_than_int32_counts(file, order, place, width):
    """Arguments and results, forward and backward; a width of 3 takes the kernels for odd sizes."""
    SOURCES[file].mutate(None)
    rng = torch.Generator().manual_seed(width)
    batch, channels, height, dtype = 2 - place, 8, 2, torch.float16
    grains = torch.randint(0, 2, (batch, height, width), generator=rng)

    def empty(scale):
        return far((batch, channels, height * scale, width * scale), order, place, dtype)

    latents = [empty(s) for s in (1, 2)]
    for latent in latents:
        latent.copy_(torch.randn(latent.shape, generator=rng))
    out = empty(2)
    assert SOURCES[file].ops.neighbor_copy(latents, grains, out)
    assert torch.equal(out, reference.neighbor_copy(latents, grains))
    leaves = [x.float().contiguous().requires_grad_() for x in latents]
    want = torch.autograd.grad(reference.neighbor_copy(leaves, grains), leaves, out.float())
    grads = [empty(s) for s in (1, 2)]
    SOURCES[file].ops.neighbor_copy_backward(out, grains, grads)
    for got, expected in zip(grads, want):
        assert torch.equal(got, expected.half())


@pytest.mark.skipif(
    not EMULATED, reason="needs a C++ compiler and the CPU operators; a GPU runs the kernels themselves"
)
class TestNeighborCopyCudaSource(TestNeighborCopy):
    cpp_mutations = "", ()

    @pytest.fixture(autouse=True)
    def _run_cuda_source(self, run):
        run("neighbor_copy_cuda.cu")

    def test_a_grain_that_does_not_exist_is_asserted(self):
        call = self.build(self.small, torch.float32, torch.Generator().manual_seed(0))
        call["grain_map"][1, 1, 3] = 2
        with pytest.raises(RuntimeError, match="grain_map must name one of the grains"):
            SOURCES["neighbor_copy_cuda.cu"].ops.neighbor_copy(*call.values(), torch.empty_like(call["latents"][-1]))

    @pytest.mark.parametrize("name", CUDA_MUTATIONS)
    def test_mutation_is_noticed(self, name, run):
        run("neighbor_copy_cuda.cu", name)
        with pytest.raises(AssertionError):
            self.test_vectors("cpu", torch.float32)
