"""Peak speed of devices, for the model FLOP utilisation (MFU).

Dense bfloat16, per device as JAX counts them, from the vendors' data sheets; none of
them was measured here. A device that is not listed has no MFU rather than a guess.
"""

import re

_TPU = "https://cloud.google.com/tpu/docs/system-architecture-tpu-vm"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

# (pattern of `device.device_kind`, FLOP/s, source); the first that fits counts.
# H100 NVL and H200 NVL cards are slower than the SXM modules and not listed; v7x is
# left out because JAX shows one chip as two devices.
PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"TPU v4$", 275e12, _TPU),
    (r"TPU (v5 lite|v5e)", 197e12, _TPU),
    (r"TPU (v5p|v5)$", 459e12, _TPU),
    (r"TPU (v6 lite|v6e)", 918e12, _TPU),
    (r"A100", 312e12, _NVIDIA + "a100"),
    (r"H100 PCIe", 756e12, _NVIDIA + "h100"),
    (r"H100(?!.*NVL)", 989e12, _NVIDIA + "h100"),
    (r"(?<!G)H200(?!.*NVL)", 989e12, _NVIDIA + "h200"),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device, or None where it is not known."""
    for pattern, flops, _ in PEAKS:
        if re.search(pattern, device_kind):
            return flops
    return None


def mfu(
    flops_per_step: float, step_secs: float, device_kind: str, num_devices: int
) -> float | None:
    """Share of the peak that the model's own arithmetic reaches, in [0, 1].

    Args:
      flops_per_step: forward and backward of one optimizer step over all devices,
        without recomputation.
      step_secs: wall time of the step.
      device_kind: as JAX names it.
      num_devices: devices of the run.
    """
    peak = peak_flops(device_kind)
    if peak is None or step_secs <= 0:
        return None
    return flops_per_step / (step_secs * num_devices * peak)
