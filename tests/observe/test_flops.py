"""Device names as JAX spells them find their peak; others find none."""

import pytest

from moe_jax.observe import flops


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", None),
        ("cpu", None),
    ],
)
def test_peak(kind, peak):
    assert flops.peak_flops(kind) == peak


def test_mfu():
    # Two devices at half their peak for two seconds.
    assert flops.mfu(2 * 275e12, 2.0, "TPU v4", 2) == pytest.approx(0.5)
    assert flops.mfu(1e12, 1.0, "cpu", 1) is None
