"""What connects GPUs of one machine, and how long they take to exchange something over it.

Sources: bandwidths of NVLink are those of NVIDIA's data sheets of A100 SXM (600 GB/s), H100 and H200 SXM (900 GB/s) and
B200 (1.8 TB/s), which add up both directions. L4 and RTX 4090 have none: PCI Express 4.0 has 16 lanes of 16 GT/s, of
whose 130 bits 128 are data. Latencies are those with which NCCL chooses its algorithms (``src/graph/tuning.cc`` of NCCL
2.18 to 2.22: ``baseLat`` and ``hwLat`` of rings).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What connects each GPU with all others of its machine."""

    name: str
    #: bytes per second, in one direction
    bandwidth: float
    #: seconds of each step of a ring by NCCL's protocols for small messages (LL) and for large ones (Simple)
    small_step: float
    large_step: float


_NVLINK = {"small_step": 0.6e-6, "large_step": 3.4e-6}
_NVLINK_4 = Link(name="NVLink 4", bandwidth=450e9, **_NVLINK)
_PCIE_4 = Link(name="PCIe 4.0 x16", bandwidth=16e9 * 16 / 8 * 128 / 130, small_step=1.0e-6, large_step=5.7e-6)
#: by the GPU's name (`config.devices`)
LINKS: dict[str, Link] = {
    "a100-40g": Link(name="NVLink 3", bandwidth=300e9, **_NVLINK),
    "a100-80g": Link(name="NVLink 3", bandwidth=300e9, **_NVLINK),
    "l4": _PCIE_4,
    "rtx4090": _PCIE_4,
    "h100": _NVLINK_4,
    "h200": _NVLINK_4,
    "b200": Link(name="NVLink 5", bandwidth=900e9, **_NVLINK),
}

#: bytes per second from the host's memory, in one direction: 16 lanes of PCI Express 4.0, or 5.0 of twice the rate
HOST_BANDWIDTH: dict[str, float] = {
    **dict.fromkeys(("a100-40g", "a100-80g", "l4", "rtx4090"), _PCIE_4.bandwidth),
    **dict.fromkeys(("h100", "h200", "b200"), 2 * _PCIE_4.bandwidth),
}

#: seconds that a launch takes with either protocol, and the share of the bandwidth that small messages have
_SMALL_BASE, _LARGE_BASE = 6.6e-6, 8.4e-6
_SMALL_SHARE = 1 / 4


def exchange_seconds(kind: str, size: int, devices: int, link: Link) -> float:
    """How long a collective takes at least, as NCCL itself estimates it for a ring on one machine.

    ``base + steps * latency + sent / bandwidth``, by the better one of two protocols: one that sends small messages
    with their flags, soon and at a quarter of the bandwidth, and one for large ones. `n` devices take ``2 (n - 1)``
    steps for an all-reduce, in which each sends ``2 (n - 1) / n`` of the array, and ``n - 1`` steps with
    ``(n - 1) / n`` of it for an all-gather, a reduce-scatter or an all-to-all (NCCL tests, ``doc/PERFORMANCE.md``).
    Switches that add up (NVLS) make it faster than that, devices that wait for each other slower.

    Args:
        kind: one of `parallel.collectives.KINDS`.
        size: bytes that the collective gives each device.
        devices: that take part.
    """
    if devices < 2:
        return 0.0
    steps, sent = devices - 1, size * (devices - 1) / devices
    if kind == "all-reduce":
        steps, sent = 2 * steps, 2 * sent
    elif kind == "reduce-scatter":  # each gets its part of what it sends
        sent *= devices
    elif kind == "collective-permute":
        steps, sent = 1, size
    small = _SMALL_BASE + steps * link.small_step + sent / (link.bandwidth * _SMALL_SHARE)
    large = _LARGE_BASE + steps * link.large_step + sent / link.bandwidth
    return min(small, large)
