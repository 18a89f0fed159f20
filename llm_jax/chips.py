"""What a chip can do: peak dense matrix-product rate by the name that JAX gives the device, for model FLOPs utilization.

FLOP/s in bfloat16 with float32 sums, no sparsity; float16 for V100 and T4, which have no bfloat16. Rates are for one JAX device:
half a chip where the two cores of a chip are two devices (TPU v2, v3, 7x). Sources: Google's pages on each TPU version
(docs.cloud.google.com/tpu/docs/v4 and so on), NVIDIA's data sheets of each product, whose sparse figures are halved here.
"""

PEAK_FLOPS = {
    'TPU v2': 22.5e12,
    'TPU v3': 61.5e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 1153.5e12,
    'Tesla V100-PCIE-16GB': 112e12,
    'Tesla V100-PCIE-32GB': 112e12,
    'Tesla V100-SXM2-16GB': 125e12,
    'Tesla V100-SXM2-32GB': 125e12,
    'Tesla T4': 65e12,
    'NVIDIA A100-PCIE-40GB': 312e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100 80GB PCIe': 312e12,
    'NVIDIA L4': 121e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835e12,
    'NVIDIA H100 80GB HBM3': 989.4e12,
    'NVIDIA H200': 989.4e12,
    'NVIDIA B200': 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak FLOP/s of one device by `jax.Device.device_kind`; None for a kind that is not in the table, such as 'cpu'."""
  return PEAK_FLOPS.get(device_kind)
