"""The whole name of a card decides its peak rate: a slice of it or a card of a similar name has none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mrlhf.parallel import device, peak_rates
from mrlhf.training.run import SupervisedRun

BF16 = {
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989.4,
    "NVIDIA H800 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H20": 148.0,
    "NVIDIA H20-3e": 148.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA GH200 144G HBM3e": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA B300 SXM6 AC": 2250.0,
    "NVIDIA GB300": 2500.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 503.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}
UNKNOWN = (
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA A100-SXM-64GB",  # a customer's, with more multiprocessors
    "NVIDIA A100X",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 5090 D",
    "Tesla V100-SXM2-32GB",
    "NVIDIA R100",
    "H100",
)


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "current", lambda: device.Device("cuda", "nccl"))

    def one(name: str, dtype: str = "bfloat16") -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        return peak_rates.peak_tflops(dtype)

    return one


@pytest.mark.parametrize("name", BF16)
def test_a_known_card(peak, name: str) -> None:
    assert peak(name) == BF16[name]
    assert sum(bool(peak_rates.re.fullmatch(pattern, name)) for pattern in peak_rates._RATES) == 1


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_card_has_no_rate(peak, name: str) -> None:
    assert peak(name) is None


def test_float32_is_held_to_the_units_that_compute_it(peak, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak("NVIDIA H100 80GB HBM3", "float32") == 66.9
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak("NVIDIA H100 80GB HBM3", "float32") == 494.7


@pytest.mark.parametrize("known", [989.4, None])
def test_mfu_is_logged_where_the_rate_is_known(known: float | None) -> None:
    run = SimpleNamespace(
        _lengths=[4, 4],
        _peak_tflops=known,
        layout=SimpleNamespace(dp=2, world=2),
        trainer=SimpleNamespace(spec=SimpleNamespace(flops_per_token=lambda length: 1e12)),
        phase=SimpleNamespace(memory=SimpleNamespace(reserved=0.0)),
    )
    values = SupervisedRun._performance(run, 2.0)  # type: ignore[arg-type]
    assert values["perf/tflops"] == 4.0
    assert values.get("perf/mfu") == (None if known is None else pytest.approx(4.0 / known))


def test_there_is_no_rate_of_a_cpu() -> None:
    assert device.current().is_cuda or peak_rates.peak_tflops("bfloat16") is None
