"""The reader of compiled programs, against products whose size is known and programs that XLA
compiles here.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from llm_jax.planning import hlo

WRITTEN = """HloModule step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state: (s32[], bf16[64,32])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (state.1: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %state.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state.1), index=1
  %two = s32[]{:T(128)} constant(2)
  %gather-start = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %w = bf16[32,32]{1,0} constant({...})
  %product = bf16[64,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %gather = bf16[256,32]{1,0} all-gather-done(%gather-start)
  %permute-start = (bf16[64,32]{1,0}, bf16[64,32]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %permute = bf16[64,32]{1,0} collective-permute-done(%permute-start)
  %reduced = f32[64,32]{1,0} all-reduce(%permute), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add.1
  %next = s32[]{:T(128)} add(%counter.1, %two)
  ROOT %state.2 = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%next, %permute)
}

ENTRY %main (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  %start = s32[]{:T(128)} constant(2)
  %initial = (s32[]{:T(128)}, /*index=1*/bf16[64,32]{1,0}) tuple(%start, %p)
  %loop = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%initial), condition=%condition, body=%body
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_turns():
  assert list(hlo.while_bodies(WRITTEN)) == [('body', 4)]  # 2, 4, 6, 8
  costs = hlo.costs(WRITTEN)
  assert costs.flops == 4 * 2 * 64 * 32 * 32 and not costs.unknown_loops


def test_collectives_by_kind_with_what_runs_beside_them():
  found = hlo.costs(WRITTEN).collectives
  block = 64 * 32 * 2
  gather, permute, reduce = found['all-gather'], found['collective-permute'], found['all-reduce']
  assert (gather.count, gather.bytes, gather.wire_bytes) == (4, 4 * 4 * block, 4 * 3 * block)
  assert (
    gather.overlapped_bytes == gather.bytes
    and not permute.overlapped_bytes
    and not reduce.overlapped_bytes
  )
  assert (permute.count, permute.bytes, permute.wire_bytes) == (4, 4 * block, 4 * block)
  assert (
    reduce.bytes == 4 * 64 * 32 * 4 and reduce.wire_bytes == reduce.bytes
  )  # a ring of two sends each half twice


def test_a_collective_of_another_thread_is_beside_what_runs_until_it_ends():
  text = WRITTEN.replace(
    '%gather-start = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) all-gather-start(%x)',
    '%gather-start = ((bf16[64,32]{1,0}), bf16[256,32]{1,0}, u32[]) call-start(%x), calls=%sent, '
    'unused',
  )
  text = text.replace('all-gather-done(', 'call-done(').replace(
    'ENTRY',
    """%sent (y: bf16[64,32]) -> bf16[256,32] {
  %y = bf16[64,32]{1,0} parameter(0)
  ROOT %gathered = bf16[256,32]{1,0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY""",
  )
  assert hlo.costs(text).collectives == hlo.costs(WRITTEN).collectives
  late = text.replace('  %product', '  %later').replace(
    '%gather = bf16[256,32]{1,0} call-done(%gather-start)\n', ''
  )
  lines = late.splitlines()
  lines.insert(
    next(i for i, line in enumerate(lines) if '%later' in line),
    '  %gather = bf16[256,32] call-done(%gather-start)',
  )
  assert hlo.costs('\n'.join(lines)).collectives['all-gather'].overlapped_bytes == 0


def test_what_lies_in_the_core_is_no_memory_traffic():
  moved = hlo.costs(WRITTEN).bytes
  assert hlo.costs(WRITTEN.replace('S(1)', '')).bytes > moved > 0


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('replica_groups={{0,1,2},{3,4,5}}', 3),
    ('replica_groups=[2,4]<=[8]', 4),
    ('replica_groups=[16,4]<=[8,8]T(1,0)', 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
  ],
)
def test_group_sizes(groups, size):
  assert hlo._group_size(hlo.Instruction('x', (), 'all-reduce', (), groups)) == size


@pytest.mark.parametrize(
  ('labels', 'left', 'right', 'out', 'window', 'flops'),
  [
    ('bf_io->bf', (8, 16), (16, 4), (8, 4), '', 2 * 8 * 16 * 4),
    ('0bf_io0->0bf', (3, 8, 16), (16, 4, 1), (3, 8, 4), 'window={size=1}, ', 2 * 3 * 8 * 16 * 4),
    # Batch dimensions of a product, as the TPU compiler writes them: one kernel place meets each
    # output place.
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
  assert hlo.costs(text).flops == flops


def test_programs_compiled_here():
  """Two products in a scan of seven turns, one outside; XLA's own analysis counts the loop once."""

  def run(x, w):
    y, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w) @ w, None), x, None, length=7)
    return y @ w

  compiled = jax.jit(run).lower(jnp.ones((32, 64)), jnp.ones((64, 64))).compile()
  one = 2 * 32 * 64 * 64
  costs = hlo.costs(compiled.as_text())
  assert costs.flops == 15 * one and costs.unknown_loops == 0
  assert compiled.cost_analysis()['flops'] < 5 * one


def test_a_batched_product_and_a_strided_convolution_as_xla_counts_them():
  def run(x, y, image, kernel):
    return jnp.einsum('bij,bjk->bik', x, y), lax.conv_general_dilated(
      image, kernel, (2, 1), ((1, 1), (0, 2))
    )

  shapes = [(4, 8, 16), (4, 16, 32), (2, 8, 9, 12), (16, 8, 3, 3)]
  compiled = jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
  assert hlo.costs(compiled.as_text()).flops == pytest.approx(
    compiled.cost_analysis()['flops'], rel=1e-3
  )


def test_a_kernel_says_its_flops_by_its_scope():
  scope = hlo.kernel_flops(fwd=10, dkv=25)
  text = """ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %k = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/transpose(jvp(SCOPE))/splash_mha_NAME_residuals/pallas_call"}
  ROOT %n = f32[2]{0} negate(%k)
}"""
  costs = lambda name: hlo.costs(text.replace('SCOPE', scope).replace('NAME', name))
  assert [costs(name).kernel_flops for name in ('fwd', 'dkv', 'dq')] == [10, 25, 0]
  assert costs('dq').unknown_kernels == 1 and not costs('fwd').unknown_kernels


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.costs('nothing')
