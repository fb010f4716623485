"""What a TPU core can do: public figures, and what the compiler assumes.

A "device" is what JAX calls so: a whole chip from v4 on (tpu7x: half of one), a core
of two before. Rates, bandwidths and links of v5e and v5p are those of Google Cloud's
system architecture pages; those of the others are common knowledge that was not looked
up again, least sure between slices. `hbm_bytes` is what libtpu lets a program use.
`clock` turns the compiler's cycle estimates of matrix products into seconds; it is the
peak rate divided by the FLOPs per cycle which those estimates assume.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device.

    Attributes:
      name: as in a topology's name.
      kind: JAX's `device_kind`.
      flops: dense bfloat16 FLOP/s.
      hbm_bandwidth: bytes/s.
      hbm_bytes: usable bytes.
      link_bandwidth: bytes/s of one inter-chip link, one way.
      dcn_bandwidth: bytes/s between slices.
      host_bandwidth: bytes/s to the host or from it, each way; the same round figure
        for all, of 16 lanes of PCIe 3.0.
      clock: Hz; 0 where no cycle estimates were calibrated.
      devices_per_chip: 2 where each core is a device of its own.
    """

    name: str
    kind: str
    flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    link_bandwidth: float
    dcn_bandwidth: float
    host_bandwidth: float = 15e9
    clock: float = 0.0
    devices_per_chip: int = 1


CHIPS = (
    Chip(
        name="v2",
        kind="TPU v2",
        flops=22.5e12,
        hbm_bandwidth=350e9,
        hbm_bytes=7.48 * GIB,
        link_bandwidth=31e9,
        dcn_bandwidth=1.5e9,
        devices_per_chip=2,
    ),
    Chip(
        name="v3",
        kind="TPU v3",
        flops=61.5e12,
        hbm_bandwidth=450e9,
        hbm_bytes=15.48 * GIB,
        link_bandwidth=41e9,
        dcn_bandwidth=1.5e9,
        devices_per_chip=2,
    ),
    Chip(
        name="v4",
        kind="TPU v4",
        flops=275e12,
        hbm_bandwidth=1228e9,
        hbm_bytes=30.75 * GIB,
        link_bandwidth=50e9,
        dcn_bandwidth=3.1e9,
        clock=1.05e9,
    ),
    Chip(
        name="v5e",
        kind="TPU v5 lite",
        flops=197e12,
        hbm_bandwidth=819e9,
        hbm_bytes=15.75 * GIB,
        link_bandwidth=50e9,
        dcn_bandwidth=3.1e9,
        clock=1.5e9,
    ),
    Chip(
        name="v5p",
        kind="TPU v5",
        flops=459e12,
        hbm_bandwidth=2765e9,
        hbm_bytes=95.73 * GIB,
        link_bandwidth=100e9,
        dcn_bandwidth=6.25e9,
        clock=1.75e9,
    ),
    Chip(
        name="v6e",
        kind="TPU v6 lite",
        flops=918e12,
        hbm_bandwidth=1640e9,
        hbm_bytes=31.24 * GIB,
        link_bandwidth=112e9,
        dcn_bandwidth=12.5e9,
        clock=1.75e9,
    ),
    Chip(
        name="tpu7x",
        kind="TPU7x",
        flops=1153.5e12,
        hbm_bandwidth=3690e9,
        hbm_bytes=94.74 * GIB,
        link_bandwidth=100e9,
        dcn_bandwidth=6.25e9,
        devices_per_chip=2,
    ),
)

BY_NAME = {chip.name: chip for chip in CHIPS}
BY_KIND = {chip.kind: chip for chip in CHIPS}
