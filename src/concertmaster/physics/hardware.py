"""The GPUs that the step-time model knows, and how long a replica takes to get ready on one.

Each constant carries its source; where a vendor gives sparse throughput, half of it stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from concertmaster.core.errors import unknown_name

Interconnect = Literal["nvlink", "pcie"]
"""How the GPUs of one server talk: an NVLink switch between all, or PCIe through the host."""

_MIB = 1024**2

_PCIE_4 = 31.5e9
_PCIE_5 = 63.0e9

PCIE_RATIO = 0.8
"""Share of the PCIe rate that a copy from pinned host memory reaches.

Source: bandwidthTest of the CUDA samples, near 25 GB/s of 31.5 GB/s on PCIe 4.0 x16.
"""

DISK_BYTES_PER_S = 6.0e9
"""Sequential read of one NVMe drive. Source: datasheets of PCIe 4.0 x4 drives, 6 to 7 GB/s."""

NETWORK_BYTES_PER_S = 5.0e9
"""Reading a checkpoint over the network.

Source: ServerlessLLM (arXiv 2401.14351), 130 GB in 26 s.
"""

WAKE_S = 0.3
"""Waking a sleeping engine, weights apart.

Source: vLLM blog on sleep mode (2025-10-26), 0.1 to 0.4 s for small models.
"""

ENGINE_START_S = 35.0
"""Starting an engine, weights apart: compile-cache load, memory profile, CUDA graph capture.

Source: vLLM issue 20264, "init engine took 34.11 seconds" with a filled compile cache.
"""

READINESS = ("running", "sleeping", "host", "disk", "remote")
"""Where the weights of a replica lie, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, as far as step times depend on it.

    Attributes:
        name: Lower-case name, the key in ``GPUS``.
        measured_as: The GPU whose measured kernels stand for this one, scaled.
        hbm_bytes: Memory that the driver reports.
        hbm_bandwidth_bytes_per_s: Peak memory bandwidth.
        dense_bf16_flops: Peak dense bf16 operations per second, accumulated in fp32.
        interconnect: How it reaches the other GPUs of its server.
        pcie_bytes_per_s: Rate of its host link in one direction.
        sms: Streaming multiprocessors.
        sources: Where each constant comes from, by attribute name.
    """

    name: str
    measured_as: Literal["a40", "a100", "h100"]
    hbm_bytes: int
    hbm_bandwidth_bytes_per_s: float
    dense_bf16_flops: float
    interconnect: Interconnect
    pcie_bytes_per_s: float
    sms: int
    sources: Mapping[str, str] = field(compare=False, repr=False)


def _gpu(
    name: str,
    measured_as: Literal["a40", "a100", "h100"],
    figures: tuple[int, float, float, int],
    *,
    interconnect: Interconnect,
    pcie: float,
    specification: str,
    capacity: str,
) -> Gpu:
    """Build one entry from MiB of memory, bytes a second, flops a second and multiprocessors."""
    mib, bandwidth, flops, sms = figures
    lane = "4.0 at 16 GT/s" if pcie == _PCIE_4 else "5.0 at 32 GT/s"
    sources = {
        "hbm_bytes": f"{mib} MiB, {capacity}",
        "hbm_bandwidth_bytes_per_s": specification,
        "dense_bf16_flops": specification,
        "interconnect": specification,
        "pcie_bytes_per_s": f"PCI-SIG: x16 after 128b/130b coding, {lane}",
        "sms": specification,
    }
    return Gpu(
        name=name,
        measured_as=measured_as,
        hbm_bytes=mib * _MIB,
        hbm_bandwidth_bytes_per_s=bandwidth,
        dense_bf16_flops=flops,
        interconnect=interconnect,
        pcie_bytes_per_s=pcie,
        sms=sms,
        sources=MappingProxyType(sources),
    )


_SMI = "as nvidia-smi reports it"
_MODAL = "nvidia-smi, from thundergolfer.com/blog/nvidia-gpu-memory-capacity"

GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            _gpu(
                "a40",
                "a40",
                (46068, 696e9, 149.7e12, 84),
                interconnect="pcie",
                pcie=_PCIE_4,
                specification="NVIDIA A40 datasheet; GA102 whitepaper for the SMs",
                capacity=f"{_SMI} with ECC",
            ),
            _gpu(
                "a100-40g",
                "a100",
                (40960, 1555e9, 312e12, 108),
                interconnect="nvlink",
                pcie=_PCIE_4,
                specification="NVIDIA A100 datasheet, SXM4 40 GB; GA100 whitepaper for the SMs",
                capacity=_MODAL,
            ),
            _gpu(
                "a100-80g",
                "a100",
                (81920, 2039e9, 312e12, 108),
                interconnect="nvlink",
                pcie=_PCIE_4,
                specification="NVIDIA A100 datasheet, SXM4 80 GB; GA100 whitepaper for the SMs",
                capacity=_MODAL,
            ),
            _gpu(
                "h100",
                "h100",
                (81559, 3352e9, 989.4e12, 132),
                interconnect="nvlink",
                pcie=_PCIE_5,
                specification="NVIDIA H100 datasheet, SXM5; GH100 whitepaper for the SMs",
                capacity=_MODAL,
            ),
            _gpu(
                "a6000",
                "a40",
                (49140, 768e9, 154.8e12, 84),
                interconnect="pcie",
                pcie=_PCIE_4,
                specification="NVIDIA RTX A6000 datasheet; GA102 whitepaper for the SMs",
                capacity=f"{_SMI} without ECC",
            ),
            _gpu(
                "l20",
                "a40",
                (46068, 864e9, 119.5e12, 92),
                interconnect="pcie",
                pcie=_PCIE_4,
                specification="NVIDIA L20 datasheet",
                capacity="that of the L40S, the same 48 GB board with ECC",
            ),
            _gpu(
                "l40s",
                "a40",
                (46068, 864e9, 362.05e12, 142),
                interconnect="pcie",
                pcie=_PCIE_4,
                specification="NVIDIA L40S datasheet; AD102 whitepaper for the SMs",
                capacity=_MODAL,
            ),
            _gpu(
                "h20",
                "h100",
                (97871, 4000e9, 148e12, 78),
                interconnect="nvlink",
                pcie=_PCIE_5,
                specification="NVIDIA H20 datasheet, 96 GB; Geekbench listing for the SMs",
                capacity=_SMI,
            ),
            _gpu(
                "h200",
                "h100",
                (143771, 4800e9, 989.4e12, 132),
                interconnect="nvlink",
                pcie=_PCIE_5,
                specification="NVIDIA H200 datasheet, SXM; GH100 whitepaper for the SMs",
                capacity=_MODAL,
            ),
            _gpu(
                "rtx4090",
                "a40",
                (24564, 1008e9, 165.2e12, 128),
                interconnect="pcie",
                pcie=_PCIE_4,
                specification="NVIDIA Ada whitepaper, table of the RTX 4090",
                capacity=_SMI,
            ),
        )
    }
)
"""The GPUs that are known, by lower-case name."""


def gpu(name: str) -> Gpu:
    """Look a GPU up by name, whatever the case.

    >>> gpu("H100").sms
    132
    """
    known = GPUS.get(name.lower())
    if known is None:
        raise unknown_name("", "", "gpu", name, GPUS)
    return known


def ready_s(readiness: str, weights_bytes: float, gpu: Gpu) -> float:
    """Seconds until a replica in this state of readiness can serve its first request.

    A sleeping engine keeps its CUDA graphs and copies its weights back over PCIe; any other
    starts anew. Reading and copying overlap, so the slower one counts.

    Args:
        readiness: ``running``, ``sleeping``, ``host``, ``disk`` or ``remote``.
        weights_bytes: Weights that one GPU loads: the model's, over tensor parallelism.
        gpu: Whose host link the weights cross.

    >>> round(ready_s("sleeping", 16e9, GPUS["a100-80g"]), 1)
    0.9
    """
    if readiness not in READINESS:
        raise unknown_name("", "", "readiness", readiness, READINESS)
    copy_s = weights_bytes / (gpu.pcie_bytes_per_s * PCIE_RATIO)
    disk_s = weights_bytes / DISK_BYTES_PER_S
    network_s = weights_bytes / NETWORK_BYTES_PER_S
    return {
        "running": 0.0,
        "sleeping": WAKE_S + copy_s,
        "host": ENGINE_START_S + copy_s,
        "disk": ENGINE_START_S + max(disk_s, copy_s),
        "remote": ENGINE_START_S + max(network_s, disk_s, copy_s),
    }[readiness]
