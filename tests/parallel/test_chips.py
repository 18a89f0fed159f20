import jax

from llm_jax.parallel import chips


def test_peaks_of_the_vendors():
  # TFLOP/s per chip by Google: v3 123 and TPU7x 2307 (two devices each), v4 275; by NVIDIA: H100
  # SXM 1979 with sparsity.
  assert 2 * chips.peak_flops('TPU v3') == 123e12
  assert 2 * chips.peak_flops('TPU7x') == 2307e12
  assert chips.peak_flops('TPU v4') == 275e12
  assert abs(2 * chips.peak_flops('NVIDIA H100 80GB HBM3') - 1979e12) < 1e12


def test_unknown_chips_have_no_peak():
  assert chips.peak_flops(jax.devices('cpu')[0].device_kind) is None
  assert chips.peak_flops('NVIDIA H100 80GB HBM3 MIG 1g.10gb') is None
