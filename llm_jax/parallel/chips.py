"""What a chip can do, by the name that JAX gives the device: for model FLOPs utilization, and for
plans.

Figures are for one JAX device: half a chip where the two cores of a chip are two devices (TPU v2,
v3, 7x). Sources: Google's pages on each TPU version (docs.cloud.google.com/tpu/docs/v4 and so on),
NVIDIA's data sheets of each product, whose sparse figures are halved here; `usable_bytes` is what
the TPU compiler itself grants a program (it says so when it refuses one).
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device.

  Attributes:
    flops: peak FLOP/s of dense matrix products in bfloat16 with float32 sums; float16 for V100 and
      T4, which have no bfloat16.
    usable_bytes: of its main memory, for a program; None where no compiler for it runs here.
    memory_bandwidth: bytes per second between main memory and cores.
    link_bandwidth: bytes per second that it can send its neighbours in a slice, all links together,
      one way.
  """

  flops: float
  usable_bytes: float | None = None
  memory_bandwidth: float | None = None
  link_bandwidth: float | None = None


_V5E = Chip(197e12, 15.75 * GIB, 819e9, 200e9)  # 1,600 Gbit/s per chip
_V5P = Chip(459e12, 95.74 * GIB, 2765e9, 600e9)  # 4,800 Gbit/s
_V6E = Chip(918e12, 31.25 * GIB, 1640e9, 400e9)  # 3,200 Gbit/s ("800 GB/s, both ways")
CHIPS = {
  'TPU v2': Chip(22.5e12),
  'TPU v3': Chip(61.5e12, 15.48 * GIB, 450e9, 41e9),  # 900 GB/s and 656 Gbit/s per chip
  'TPU v4': Chip(275e12, 30.75 * GIB, 1228e9, 300e9),  # 2,400 Gbit/s
  'TPU v5 lite': _V5E,
  'TPU v5e': _V5E,
  'TPU v5': _V5P,
  'TPU v5p': _V5P,
  'TPU v6 lite': _V6E,
  'TPU v6e': _V6E,
  'TPU7x': Chip(1153.5e12),
  'Tesla V100-PCIE-16GB': Chip(112e12),
  'Tesla V100-PCIE-32GB': Chip(112e12),
  'Tesla V100-SXM2-16GB': Chip(125e12),
  'Tesla V100-SXM2-32GB': Chip(125e12),
  'Tesla T4': Chip(65e12),
  'NVIDIA A100-PCIE-40GB': Chip(312e12),
  'NVIDIA A100-SXM4-40GB': Chip(312e12),
  'NVIDIA A100-SXM4-80GB': Chip(312e12),
  'NVIDIA A100 80GB PCIe': Chip(312e12),
  'NVIDIA L4': Chip(121e12),
  'NVIDIA H100 PCIe': Chip(756e12),
  'NVIDIA H100 NVL': Chip(835e12),
  'NVIDIA H100 80GB HBM3': Chip(989.4e12),
  'NVIDIA H200': Chip(989.4e12),
  'NVIDIA B200': Chip(2250e12),
}


def peak_flops(device_kind: str) -> float | None:
  """Peak FLOP/s of one device by `jax.Device.device_kind`; None for a kind that is not in the
  table, such as 'cpu'.
  """
  chip = CHIPS.get(device_kind)
  return None if chip is None else chip.flops
