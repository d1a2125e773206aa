"""Test the look-up of peaks by the exact names that torch.cuda.get_device_name returns."""

import pytest

from megatron_interbert.training.peaks import peak_of

NAMES = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 990.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "A100-PCIE-40GB": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA A10": 125.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla T4": 65.0,
    "AMD Instinct MI300X": 1307.4,
    "NVIDIA GeForce RTX 4090": 165.2,
    # Not in the table, though parts of their names are.
    "NVIDIA RTX A1000 Laptop GPU": 0.0,
    "NVIDIA RTX A100": 0.0,
    "NVIDIA T400": 0.0,
    "NVIDIA GeForce RTX 4090 Laptop GPU": 0.0,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0.0,
    "NVIDIA L400": 0.0,
    "": 0.0,
}


@pytest.mark.parametrize("name", NAMES)
def test_peak_of_a_device(name):
    assert peak_of(name) == NAMES[name]
