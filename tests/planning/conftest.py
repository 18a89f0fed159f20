"""A compiled program, written by hand: a loop of four iterations with a product and collectives."""

import pytest

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
"""  # noqa: E501 (lines as the compiler writes them)


@pytest.fixture
def written():
  return WRITTEN


@pytest.fixture(scope='module', autouse=True)
def compiled(as_in_use):
  """What a plan says is read from programs as users have them."""
