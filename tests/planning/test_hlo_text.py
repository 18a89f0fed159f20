"""The reader of compiled programs, on a text written by hand."""

import pytest

from llm_jax.planning import hlo_text


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo_text.parse('nothing')


def test_computations_instructions_and_their_results(written):
  program, entry = hlo_text.parse(written)
  assert list(program) == ['add.1', 'condition', 'body', 'main'] and entry == 'main'
  main = program[entry]
  assert main.root == 'out' and main.result.operands == ('loop',)
  assert main.instructions['loop'].called == ('condition', 'body')
  x = program['body'].instructions['x']
  assert x.arrays == (hlo_text.Array('bf16', (64, 32), space=1),)
  assert x.bytes == 64 * 32 * 2 and x.main_bytes == 0
  initial = main.instructions['initial']
  assert initial.opcode == 'tuple' and initial.bytes == 4 + 64 * 32 * 2


@pytest.mark.parametrize(
  ('kind', 'size'), [('pred', 15), ('bf16', 30), ('f8e4m3fn', 15), ('s4', 7), ('u32', 60)]
)
def test_bytes_of_an_array(kind, size):
  assert hlo_text.Array(kind, (3, 5)).bytes == size
