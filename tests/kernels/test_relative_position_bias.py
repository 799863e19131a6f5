import random

import torch

from tests.kernels.harness import Call, KernelSuite, Mutation, Shape

FILE = "kernels/relative_position_bias.py"


class TestRelativePositionBias(KernelSuite):
    op = "relative_position_bias"
    gradients = ("table",)
    # window 1 has one entry; 7 and 11 are primes; 8 fills its block and 9 is one more.
    corners = [
        {"w": 4, "H": 0},
        {"w": 1, "H": 1},
        {"w": 2, "H": 3},
        {"w": 7, "H": 2},
        {"w": 8, "H": 1},
        {"w": 9, "H": 1},
        {"w": 11, "H": 1},
    ]
    gpu_corners = [{"w": 8, "H": 12}, {"w": 16, "H": 16}, {"w": 32, "H": 2}]
    small = {"w": 3, "H": 2}
    mutations = [
        Mutation("wrong bias index", FILE, "o_dy * (2 * WINDOW - 1) + o_dx", "o_dx * (2 * WINDOW - 1) + o_dy"),
        Mutation("wrong diagonal", FILE, "o_query - o_key == x_row", "o_key - o_query == x_row"),
        Mutation("broken mask", FILE, "(o_query < WINDOW) & (o_key < WINDOW)", "(o_query < WINDOW) & (o_key >= 0)"),
        Mutation("write past the end", FILE, "o_pair, b_bias, mask=m_pair", "o_pair, b_bias, mask=o_pair <= PAIRS"),
        Mutation("missing row", FILE, "m_pair = o_pair < PAIRS", "m_pair = o_pair < PAIRS - 1"),
        Mutation(
            "missing rows of the gradient",
            FILE,
            "for x_row in tl.range(0, OFFSETS)",
            "for x_row in tl.range(1, OFFSETS)",
        ),
        Mutation("half precision sum", FILE, "b_sum += b_grad.to(tl.float32)", "b_sum += b_grad.to(tl.float16)"),
    ]

    def random_shape(self, rng: random.Random) -> Shape:
        return {"w": rng.choice((1, 2, 3, 4, 5, 6, 7, 8)), "H": rng.randint(1, 3)}

    def build(self, shape: Shape, dtype: torch.dtype, rng: torch.Generator) -> Call:
        table = torch.randn((2 * shape["w"] - 1) ** 2, shape["H"], generator=rng, dtype=torch.float64)
        return {"table": table.to(dtype), "window": shape["w"]}
