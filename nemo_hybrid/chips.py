"""What devices can do by their data sheets, and how much of it programs reach.

Rates are those of the SXM and NVL72 forms, dense, per device: NVIDIA's data sheets of H100, H200,
HGX B200, GB200 NVL72 and GB300 NVL72; ``cpu`` is a guess at one core. What is reached of them is
assumed, from figures that others published for an H200 and an H100 (see ``REACHED``), and changes
only with a measurement in ``kernels/benchmarks/results``.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Data-sheet figures of one device: GB are 1e9 bytes, rates per second and direction."""

    memory_gb: float
    matmul_tflops: float
    """bf16."""
    fp32_tflops: float
    """Without matrix units, which would round fp32."""
    memory_gb_s: float
    devices_per_node: int
    link_gb_s: float


DEVICES = {
    "h100": Device(80, 989, 67, 3350, 8, 450),
    "h200": Device(141, 989, 67, 4800, 8, 450),
    "b200": Device(180, 2250, 75, 8000, 8, 900),
    "gb200": Device(186, 2500, 80, 8000, 72, 900),
    "gb300": Device(279, 2500, 80, 8000, 72, 900),
    "cpu": Device(16, 0.05, 0.05, 10, 1, 1),
}

_SHEET = DEVICES["h200"]
BANDWIDTH_REACHED = 4000 / _SHEET.memory_gb_s
"""Of a pass over memory. Copies reach 4.3 of the 4.8 TB/s, passes of other kinds less."""
REACHED = {
    "fp32": 50 / _SHEET.fp32_tflops,
    "fp32 batched": 30 / _SHEET.fp32_tflops,
    "library": 600 / _SHEET.matmul_tflops,
    "grouped": 380 / _SHEET.matmul_tflops,
    "attention": 350 / _SHEET.matmul_tflops,
}
"""Of matrix products, by kind: in fp32, large ones and batches of small ones; in bf16 those of
libraries (cuBLAS reaches 600 to 790 TFLOP/s), our grouped ones (kernels without TMA) and attention
(FlashAttention-2 on an H100: 300 to 400 TFLOP/s at width 128, arXiv 2407.08608)."""
LAUNCH_S = 3e-6
"""Least time of a kernel. The host, which may take longer to ask for it, is not in it."""


class Rates(NamedTuple):
    """What a device is taken to reach."""

    bytes_per_s: float
    flop_per_s: dict[str, float]
    """By kind of matrix product, as in ``REACHED``."""


def rates(device: Device) -> Rates:
    """The same shares of its data sheet on every device."""
    flop_per_s = {
        kind: share * 1e12 * (device.fp32_tflops if "fp32" in kind else device.matmul_tflops)
        for kind, share in REACHED.items()
    }
    return Rates(BANDWIDTH_REACHED * device.memory_gb_s * 1e9, flop_per_s)
