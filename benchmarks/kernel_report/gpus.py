"""Sizes and rates of GPUs, and how many warps of a kernel one of their multiprocessors holds."""

from __future__ import annotations

import dataclasses

# Per multiprocessor: shared memory, of which a block may take; warps; blocks. Multiprocessors of A100, H100, B200 and
# RTX 5090. 65,536 registers on all four (CUDA C++ Programming Guide, "Compute Capabilities").
ARCHS = {
    "sm_80": {
        "capability": (8, 0), "shared": 164 * 1024, "block_shared": 163 * 1024, "warps": 64, "blocks": 32, "sms": 108,
    },
    "sm_90": {
        "capability": (9, 0), "shared": 228 * 1024, "block_shared": 227 * 1024, "warps": 64, "blocks": 32, "sms": 132,
    },
    "sm_100": {
        "capability": (10, 0), "shared": 228 * 1024, "block_shared": 227 * 1024, "warps": 64, "blocks": 32, "sms": 148,
    },
    "sm_120": {
        "capability": (12, 0), "shared": 100 * 1024, "block_shared": 99 * 1024, "warps": 48, "blocks": 24, "sms": 170,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Product:
    """A GPU that is sold: what its clock, memory and tensor cores reach."""

    arch: str
    ghz: float
    tbps: float
    """Copy bandwidth, bytes read plus bytes written."""
    tflops: float
    """Dense products of 16-bit numbers."""

    def issue_slots(self, ms: float) -> float:
        """Instructions that all multiprocessors issue in this time at one a cycle each."""
        return ARCHS[self.arch]["sms"] * self.ghz * 1e6 * ms


PRODUCTS = {"H100": Product("sm_90", 1.755, 3.0, 790), "H200": Product("sm_90", 1.755, 4.3, 790)}


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Resident warps per multiprocessor / those it can hold, bound by registers, shared memory and block slots."""
    limits, warps = ARCHS[arch], -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256 a warp
    by_registers = (65536 // per_warp) // warps if per_warp else limits["blocks"]
    # Each block also holds 1 KB that the system reserves; allocation is by 128 bytes.
    by_shared = limits["shared"] // (1024 + -(-shared // 128) * 128)
    return min(by_registers, by_shared, limits["blocks"], limits["warps"] // warps) * warps / limits["warps"]
