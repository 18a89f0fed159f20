"""FLOPs of products whose size is known, and of those that XLA counts itself."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from llm_jax.planning import costs


@pytest.mark.parametrize(
  ('labels', 'left', 'right', 'out', 'window', 'flops'),
  [
    ('bf_io->bf', (8, 16), (16, 4), (8, 4), '', 2 * 8 * 16 * 4),
    ('0bf_io0->0bf', (3, 8, 16), (16, 4, 1), (3, 8, 4), 'window={size=1}, ', 2 * 3 * 8 * 16 * 4),
    # Batch dimensions of a product, as the TPU compiler writes them: one kernel element meets each
    # output element.
    (
      '0b1f_0o1i->01bf',
      (6, 8, 5, 16),
      (6, 4, 5, 16),
      (6, 5, 8, 4),
      'window={size=6x5 stride=5x4 lhs_dilate=6x5}, ',
      2 * 6 * 5 * 8 * 4 * 16,
    ),
    # An output dimension as a reversed, padded window.
    (
      '0bf1_i1o0->0b1f',
      (3, 8, 16, 1),
      (16, 12, 4, 1),
      (3, 8, 12, 4),
      'window={size=1x12 pad=0_0x11_11 rhs_reversal=0x1}, ',
      2 * 3 * 8 * 12 * 4 * 16,
    ),
  ],
)
def test_products_written_as_convolutions(labels, left, right, out, window, flops):
  shape = lambda dims: f'f32[{",".join(map(str, dims))}]'
  text = f"""HloModule m
ENTRY %main (p: {shape(left)}, q: {shape(right)}) -> {shape(out)} {{
  %p = {shape(left)}{{0}} parameter(0)
  %q = {shape(right)}{{0}} parameter(1)
  ROOT %c = {shape(out)}{{0}} convolution(%p, %q), {window}dim_labels={labels}
}}"""
  assert costs.costs(text).flops == flops


def test_a_batched_product_and_a_strided_convolution_as_xla_counts_them():
  def run(x, y, image, kernel):
    return jnp.einsum('bij,bjk->bik', x, y), lax.conv_general_dilated(
      image, kernel, (2, 1), ((1, 1), (0, 2))
    )

  shapes = [(4, 8, 16), (4, 16, 32), (2, 8, 9, 12), (16, 8, 3, 3)]
  compiled = jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
  assert costs.costs(compiled.as_text()).flops == pytest.approx(
    compiled.cost_analysis()['flops'], rel=1e-3
  )
