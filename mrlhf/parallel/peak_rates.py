"""Peak rates of GPUs, for perf/mfu: dense, without sparsity, with fp32 accumulation, from the makers' data sheets.

NVIDIA: A100 (nvidia-a100-datasheet-us), A800 (as A100), A30, A40, H100 (h100-datasheet: SXM, PCIe; h100-nvl), H800 (as
H100), H200 (hopper-h200-datasheet), H20 (NVIDIA's product brief), GH200 (grace-hopper-superchip-datasheet), B200,
GB200, B300, GB300 (Blackwell and Blackwell Ultra data sheets: HGX a GPU, NVL72 a GPU), L4, L20, L40, L40S; the
architecture white papers of Ampere GA102 (A6000, RTX 3090), Ada (RTX 6000 Ada, RTX 4090) and RTX Blackwell (RTX 5090,
PRO 6000). AMD: Instinct MI300A, MI300X, MI325X, MI350X, MI355X data sheets. Where a sheet shows rates with sparsity
only, the dense rate is half of it.

A rate depends on the card's form (SXM, PCIe, NVL), so the whole name must be known: a slice of a card (MIG), a laptop's
or a cut-down card of a similar name gets no rate.
"""

from __future__ import annotations

import re

import torch

from mrlhf.parallel import device

# pattern of the whole name -> TFLOP/s of (bf16 and fp16, tf32, fp32 without tensor cores)
_RATES: dict[str, tuple[float, float, float]] = {
    r"NVIDIA A[18]00(-| )(SXM\d?|PCI[Ee])(-(40|80)GB)?|NVIDIA A[18]00 \d+GB (PCI[Ee]|Active)": (312.0, 156.0, 19.5),
    r"NVIDIA A30": (165.0, 82.0, 10.3),
    r"NVIDIA A40": (149.7, 74.8, 37.4),
    r"NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    r"NVIDIA H100( 80GB| 96GB) HBM3|NVIDIA H800|NVIDIA H200|NVIDIA GH200( \w+)?( HBM3e)?": (989.4, 494.7, 66.9),
    r"NVIDIA H[18]00( PCIe| 80GB HBM2e)": (756.0, 378.0, 51.2),
    r"NVIDIA H(100|800|200) NVL": (835.5, 417.5, 60.0),
    r"NVIDIA H20(-3e| \d+GB)?( HBM3e?)?": (148.0, 74.0, 44.0),
    r"NVIDIA B[23]00( SXM6 AC)?": (2250.0, 1100.0, 75.0),
    r"NVIDIA GB[23]00": (2500.0, 1250.0, 80.0),
    r"NVIDIA L4": (121.0, 60.0, 30.3),
    r"NVIDIA L20": (119.5, 59.8, 59.8),
    r"NVIDIA L40": (181.0, 90.5, 90.5),
    r"NVIDIA L40S": (362.0, 183.0, 91.6),
    r"NVIDIA RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"NVIDIA RTX PRO 6000 Blackwell( \w+)* Edition": (503.8, 251.9, 126.0),
    r"NVIDIA GeForce RTX 3090": (71.2, 35.6, 35.6),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    r"NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
    r"AMD Instinct MI300A": (980.6, 490.3, 122.6),
    r"AMD Instinct MI3(00|25)X( OAM)?": (1307.4, 653.7, 163.4),
    r"AMD Instinct MI350X( OAM)?": (2309.6, 0.0, 144.2),
    r"AMD Instinct MI355X( OAM)?": (2516.6, 0.0, 157.3),
}


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def peak_tflops(dtype: str) -> float | None:
    """TFLOP/s that this rank's GPU reaches at most in matrix products of `dtype`; None on CPU and for unknown cards."""
    if not device.current().is_cuda:
        return None
    rates = next((rates for pattern, rates in _RATES.items() if re.fullmatch(pattern, gpu_name())), None)
    if rates is None:
        return None
    kind = 0 if dtype != "float32" else 2 if torch.get_float32_matmul_precision() == "highest" else 1
    return rates[kind] or None
