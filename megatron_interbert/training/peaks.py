"""Look up a device's dense 16-bit peak throughput by the exact name that torch reports.

The figures are from the vendors' datasheets. Names are compared whole, since boards with the same
chip differ widely (an H100 PCIe has three quarters of the SXM's peak, an L40S twice an L40's).
"""

import re

import torch

# Name without the vendor -> TFLOP/s. `|` separates spellings, `*` matches a memory size.
PEAK_TFLOPS = {
    "GB200|GB300": 2500.0,
    "B200|B300 SXM6 AC": 2250.0,
    "GH200 *|GH200 120GB|GH200 480GB": 990.0,
    "H200|H100 80GB HBM3|H100 * HBM2e|H800": 989.0,
    "H200 NVL|H100 NVL": 835.5,
    "H100 PCIe|H800 PCIe": 756.0,
    "H20": 148.0,
    "A100-SXM4-*|A100-SXM-*|A100-PCIE-*|A100 * PCIe|A800-SXM4-*|A800 * PCIe": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100-SXM2-*|V100-SXM3-*": 125.0,
    "V100-PCIE-*": 112.0,
    "T4": 65.0,
    "GeForce RTX 4090": 165.2,
    "MI300X|MI325X": 1307.4,
    "MI250X|MI250X / MI250": 191.5,  # of one of its two dies: torch sees two devices
}
MAKERS = r"(NVIDIA|Tesla|AMD|Instinct)\s+"


def peak_of(name: str) -> float:
    """Return the peak in TFLOP/s of a device name (`NVIDIA H100 80GB HBM3`); 0 if unknown."""
    bare = re.sub(f"^({MAKERS})+", "", name.strip())
    for names, peak in PEAK_TFLOPS.items():
        for pattern in names.split("|"):
            if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+ ?GB"), bare):
                return peak

    return 0.0


def peak_tflops(device: torch.device, given: float) -> float:
    """Return a device's peak in TFLOP/s: as given, else by its name; 0 if unknown (no MFU)."""
    if given or device.type != "cuda":
        return given
    return peak_of(torch.cuda.get_device_name(device))
