"""Costs of compiled programs, against sizes that are known and programs that XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from llm_jax.core import scopes
from llm_jax.planning import costs
from llm_jax.planning.hlo_text import Instruction


def test_collectives_by_kind_with_what_runs_beside_them(written):
  found = costs.costs(written).collectives
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


def test_a_collective_of_another_thread_is_beside_what_runs_until_it_ends(written):
  text = written.replace(
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
  assert costs.costs(text).collectives == costs.costs(written).collectives
  late = text.replace('  %product', '  %later').replace(
    '%gather = bf16[256,32]{1,0} call-done(%gather-start)\n', ''
  )
  lines = late.splitlines()
  lines.insert(
    next(i for i, line in enumerate(lines) if '%later' in line),
    '  %gather = bf16[256,32] call-done(%gather-start)',
  )
  assert costs.costs('\n'.join(lines)).collectives['all-gather'].overlapped_bytes == 0


def test_what_lies_in_the_core_is_no_memory_traffic(written):
  moved = costs.costs(written).bytes
  assert costs.costs(written.replace('S(1)', '')).bytes > moved > 0


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
  assert costs._group_size(Instruction('x', (), 'all-reduce', (), groups)) == size


def test_programs_compiled_here():
  """Two products in a scan of seven iterations, one outside; XLA itself counts the loop once."""

  def run(x, w):
    y, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w) @ w, None), x, None, length=7)
    return y @ w

  compiled = jax.jit(run).lower(jnp.ones((32, 64)), jnp.ones((64, 64))).compile()
  one = 2 * 32 * 64 * 64
  found = costs.costs(compiled.as_text())
  assert found.flops == 15 * one and found.unknown_loops == 0
  assert compiled.cost_analysis()['flops'] < 5 * one


def test_a_kernel_says_its_flops_by_its_scope():
  scope = scopes.kernel_flops(fwd=10, dkv=25)
  text = """ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %k = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/transpose(jvp(SCOPE))/splash_mha_NAME_residuals/pallas_call"}
  ROOT %n = f32[2]{0} negate(%k)
}"""  # noqa: E501
  found = {
    name: costs.costs(text.replace('SCOPE', scope).replace('NAME', name))
    for name in ('fwd', 'dkv', 'dq')
  }
  assert [cost.kernel_flops for cost in found.values()] == [10, 25, 0]
  assert [cost.unknown_kernels for cost in found.values()] == [0, 0, 1]


CHAIN = """%start (p: bf16[8,4]) -> (bf16[8,4], bf16[8,16], u32[]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %g = bf16[8,16]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
  ROOT %c = (bf16[8,4]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%on (a: bf16[8,4], b: bf16[8,16], x: bf16[32,64], w: bf16[64,64]) -> (bf16[32,64], bf16[8,4], bf16[8,16], bf16[8,16]) {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %x = bf16[32,64]{1,0} parameter(2)
  %w = bf16[64,64]{1,0} parameter(3)
  %d = bf16[32,64]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %h = bf16[8,16]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
  ROOT %t = (bf16[32,64]{1,0}, bf16[8,4]{1,0}, bf16[8,16]{1,0}, bf16[8,16]{1,0}) tuple(%d, %a, %b, %h)
}

ENTRY %main (p: bf16[8,4], x: bf16[32,64], w: bf16[64,64]) -> bf16[32,64] {
  %p = bf16[8,4]{1,0} parameter(0)
  %x = bf16[32,64]{1,0} parameter(1)
  %w = bf16[64,64]{1,0} parameter(2)
  %s = (bf16[8,4]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %q = bf16[8,4]{1,0} get-tuple-element(%s), index=0
  %r = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %f = (bf16[32,64]{1,0}, bf16[8,4]{1,0}, bf16[8,16]{1,0}, bf16[8,16]{1,0}) fusion(%q, %r, %x, %w), kind=kOutput, calls=%on
  %i = (bf16[32,64]{1,0}, bf16[8,4]{1,0}, bf16[8,16]{1,0}, bf16[8,16]{1,0}) fusion(%q, %r, %x, %w), kind=kOutput, calls=%on
  ROOT %y = bf16[32,64]{1,0} get-tuple-element(%i), index=0
}"""  # noqa: E501


def test_a_transfer_in_a_chain_of_fusions_is_one():
  """As v5e's compiler writes it: started in a fusion, going on in others beside their products."""
  found = costs.costs(CHAIN)
  gather, gathered = found.collectives['all-gather'], 8 * 16 * 2
  assert (gather.count, gather.bytes, gather.overlapped_bytes) == (1, gathered, gathered)
  assert gather.wire_bytes == gathered * 3 / 4
  product = 2 * (32 * 64 + 64 * 64 + 32 * 64)
  assert found.flops == 2 * 2 * 32 * 64 * 64
  assert (
    found.bytes == 2 * product + 2 * (8 * 4) * 2 + gathered
  )  # the part, handed on, and the whole
  alone = costs.costs(CHAIN.replace(' dot(%x, %w)', ' add(%x, %x)'))
  assert alone.collectives['all-gather'].overlapped_bytes == 0
  other = costs.costs(CHAIN.replace('AsyncCollectiveStart', 'Other'))  # no chain: each is one
  assert other.collectives['all-gather'].count == 3
