import jax
import jax.numpy as jnp

from llm_jax.core import scopes


def test_a_kernel_has_the_flops_of_the_pass_that_it_runs():
  scope = scopes.kernel_flops(fwd=10, dkv=25)
  path = f'jit(f)/transpose(jvp({scope}))/splash_mha_NAME_residuals/pallas_call'
  found = [scopes.flops_of_kernel(path.replace('NAME', name)) for name in ('fwd', 'dkv', 'dq')]
  assert found == [10, 25, None]
  assert scopes.flops_of_kernel('jit(f)/splash_mha_fwd_residuals/pallas_call') is None


def test_the_name_stands_in_the_lowered_program():
  def double(x):
    with jax.named_scope(scopes.kernel_flops(fwd=7)):
      return jnp.tanh(x) * 2

  text = jax.jit(double).lower(jnp.ones(4)).compile().as_text()
  assert 'kernel_flops.fwd_7' in text
