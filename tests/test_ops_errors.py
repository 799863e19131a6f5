"""Whatever is wrong with an argument of an operator is one `ValueError` or `TypeError` that names the argument."""

import math
from typing import Any

import pytest
import torch

from d2it import ops

PLAN = ops.plan_tokens(torch.ones(1, 2, 2, dtype=torch.int64), window=2, capacity=16)
Q = torch.zeros(2, 4, 2, 8)
CALLS: dict[str, dict[str, Any]] = {
    "kde_entropy": {
        "images": torch.zeros(1, 3, 16, 16),
        "region_size": 16,
        "num_bins": 64,
        "value_range": (-1.0, 1.0),
        "sigma": 0.02,
        "normalize": True,
    },
    "grain_map": {"entropy": torch.rand(2, 3), "thresholds": [0.5]},
    "neighbor_copy": {
        "latents": [torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)],
        "grain_map": torch.zeros(1, 2, 2, dtype=torch.int64),
    },
    "plan_tokens": {
        "grain_map": torch.ones(1, 2, 2, dtype=torch.int64),
        "cells_per_region": 2,
        "window": 2,
        "min_grain": 1,
        "capacity": 16,
        "code_sizes": (2, 1),
    },
    "plan_from_mask": {"mask": torch.ones(1, 4, 4, dtype=torch.bool), "window": 2, "capacity": 16},
    "slots_from_cu_seqlens": {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32), "size": 3},
    "pack_tokens": {"x": torch.zeros(1, 16, 3), "plan": PLAN},
    "unpack_tokens": {"packed": torch.zeros(16, 3), "plan": PLAN, "base": torch.zeros(1, 16, 3)},
    "window_attention": {
        "q": Q,
        "k": Q,
        "v": Q,
        "bias": torch.zeros(1, 2, 4, 4),
        "segment_ids": torch.zeros(1, 4, dtype=torch.int64),
        "scale": 0.5,
    },
    "window_attention_qkvpacked": {
        "qkv": torch.zeros(8, 3, 2, 8),
        "bias": torch.zeros(1, 2, 4, 4),
        "slots": torch.arange(8, dtype=torch.int32).reshape(2, 4),
        "segment_ids": torch.zeros(1, 4, dtype=torch.int64),
        "scale": 0.5,
    },
    "relative_position_bias": {"table": torch.zeros(9, 2), "window": 2},
    "adaln_modulate": {
        "x": torch.zeros(4, 8),
        "shift": torch.zeros(2, 8),
        "scale": torch.zeros(2, 8),
        "sample": torch.tensor([0, 0, 1, 1]),
        "eps": 1e-6,
    },
    "gated_residual": {
        "x": torch.zeros(2, 3, 8),
        "branch": torch.zeros(2, 3, 8),
        "gate": torch.zeros(2, 8),
        "bias": torch.zeros(8),
    },
    "gated_residual_modulate": {
        "x": torch.zeros(4, 8),
        "branch": torch.zeros(4, 8),
        "gate": torch.zeros(2, 8),
        "shift": torch.zeros(2, 8),
        "scale": torch.zeros(2, 8),
        "bias": torch.zeros(8),
        "sample": torch.tensor([0, 0, 1, 1]),
        "eps": 1e-6,
    },
}
CALLS["gelu"] = {"x": torch.zeros(2, 3, 8), "bias": torch.zeros(8)}
CALLS["encode_grains"] = CALLS["kde_entropy"] | {"thresholds": [0.5]}
OPTIONAL = {"num_bins", "capacity", "code_sizes", "base", "bias", "segment_ids", "scale", "sample", "slots"}
TENSORS = (torch.Tensor, list, ops.TokenPlan)
NO_BACKEND = {"plan_from_mask", "slots_from_cu_seqlens"}

NOT_TENSORS: dict[str, Any] = {
    "none": None,
    "text": "x",
    "object": object(),
    "list": [1.0],
    "number": 1.5,
    "bool": True,
    "huge": 2**70,
    "plan": PLAN,
}
NOT_INTEGERS: dict[str, Any] = {
    "none": None,
    "text": "2",
    "object": object(),
    "list": [2],
    "float": 2.0,
    "nan": math.nan,
    "bool": True,
    "negative": -1,
    "huge": 2**70,
    "complex": 2j,
    "tensor": torch.tensor(2),
}
NOT_NUMBERS: dict[str, Any] = {
    "none": None,
    "text": "0.5",
    "object": object(),
    "list": [0.5],
    "nan": math.nan,
    "inf": math.inf,
    "minus_inf": -math.inf,
    "bool": True,
    "huge": 2**2000,
    "beyond_float32": 1e39,
    "complex": 0.5j,
    "tensor": torch.tensor(0.5),
    "parameter": torch.tensor(0.5, requires_grad=True),
}
NOT_SEQUENCES: dict[str, Any] = {
    "none": None,
    "text": "ab",
    "object": object(),
    "number": 0.5,
    "texts": ["a", "b"],
    "nones": [None, None],
    "nested": [[0.1], [0.2]],
    "nan": [math.nan, math.nan],
    "complex": [1j, 2j],
    "bools": [False, True],
    "set": {0.5},
}


def wrong_tensors(right: torch.Tensor) -> dict[str, Any]:
    wrong = {
        **NOT_TENSORS,
        "complex": right.to(torch.complex64),
        "sparse": right.to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(2, 3)]),
        "more_dimensions": right[None, None, None],
        "no_dimension": torch.zeros((), dtype=right.dtype),
        "float8": torch.zeros(right.shape).to(torch.float8_e4m3fn),
        "unsigned": torch.zeros(right.shape, dtype=torch.uint16),
    }
    if right.is_floating_point():
        wrong["integers"] = right.long()
    else:
        wrong["floats"] = right.float()
    return wrong


def wrong_values(op: str, name: str, right: Any) -> dict[str, Any]:
    if isinstance(right, torch.Tensor):
        wrong = wrong_tensors(right)
        if name == "entropy":  # of any shape
            wrong = {k: v for k, v in wrong.items() if k not in ("more_dimensions", "no_dimension")}
        elif name != "images" and sum(isinstance(v, TENSORS) for v in CALLS[op].values()) > 1:
            wrong["meta"] = right.to("meta")
    elif isinstance(right, bool):
        wrong = {**NOT_TENSORS, "one": 1}
        del wrong["bool"]
    elif isinstance(right, int):
        wrong = NOT_INTEGERS
    elif isinstance(right, float):
        wrong = dict(NOT_NUMBERS)
        if name in ("sigma", "eps"):
            wrong["negative"] = -1.0
    elif isinstance(right, ops.TokenPlan):
        wrong = {k: v for k, v in NOT_TENSORS.items() if k != "plan"} | {"tensor": PLAN.index}
    elif name == "value_range":
        wrong = {**NOT_SEQUENCES, "one": (0.0,), "three": (0.0, 1.0, 2.0), "equal": (1.0, 1.0), "inf": (0.0, math.inf)}
        wrong["parameter"] = (torch.tensor(0.0, requires_grad=True), 1.0)
    elif name == "thresholds":
        wrong = {**NOT_SEQUENCES, "descending": [2.0, 1.0], "2d": torch.zeros(2, 2), "meta": torch.zeros(1).to("meta")}
        wrong["complex_tensor"] = torch.zeros(1, dtype=torch.complex64)
    elif name == "code_sizes":
        wrong = {
            **NOT_SEQUENCES,
            "empty": (),
            "ascending": (1, 2),
            "no_divisor": (3, 1),
            "zero": (2, 0),
            "tensor": PLAN.index,
        }
    else:
        assert name == "latents"
        wrong = {**NOT_SEQUENCES, "empty": [], "one_missing": [right[0], None], "meta": [right[0], right[1].to("meta")]}
    return {k: v for k, v in wrong.items() if not (k == "none" and name in OPTIONAL)}


BACKENDS = {"text": "tpu", "empty": "", "object": object(), "list": ["cpu"], "number": 1, "bool": True}
CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{kind}")
    for op, call in sorted(CALLS.items())
    for name, wrong in [
        *((name, wrong_values(op, name, right)) for name, right in call.items()),
        *([] if op in NO_BACKEND else [("backend", BACKENDS)]),
    ]
    for kind, value in wrong.items()
]


@pytest.mark.parametrize("op", sorted(CALLS))
def test_the_call_that_is_changed_is_right(op: str) -> None:
    getattr(ops, op)(**CALLS[op])


@pytest.mark.parametrize(("op", "name", "value"), CASES)
def test_a_wrong_argument_is_named(op: str, name: str, value: Any) -> None:
    # An argument that the others are compared with, like `q`, may be named by one of theirs.
    partners = {"q": "k", "x": "plan|branch|shift|gate", "entropy": "thresholds", "grain_map": "latents"}
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(ops, op)(**CALLS[op] | {name: value})
    assert type(caught.value) in (ValueError, TypeError)
    message = str(caught.value)
    assert any(word in message.split(":")[0] for word in (name, *partners.get(name, "").split("|")) if word), message
    assert len(message) < 300


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 450
