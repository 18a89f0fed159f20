"""Names that a program carries into its compiled text, where the planner reads them.

XLA cannot look into a Pallas kernel, so a kernel that states no cost estimate is traced in a
`jax.named_scope` whose name gives its FLOPs. The scope becomes part of the kernel's `op_name`.
"""

import re

_KERNEL_FLOPS = 'kernel_flops'
_OP_NAME = re.compile(rf'.*{_KERNEL_FLOPS}\.([\w.]+)(.*)', re.DOTALL)  # the innermost


def kernel_flops(**passes: int) -> str:
  """The name of the scope for a kernel: the FLOPs of each of its passes.

  A pass is recognized by `_pass_` in the kernel's own name: `kernel_flops(fwd=2, dkv=5)` covers
  `splash_mha_fwd_residuals` and `splash_mha_dkv_no_residuals`.
  """
  parts = [f'{name}_{flops}' for name, flops in passes.items()]
  return '.'.join([_KERNEL_FLOPS, *parts])


def flops_of_kernel(op_name: str) -> int | None:
  """The FLOPs that `kernel_flops` gave for the pass that `op_name` runs; None where it gave none.

  Args:
    op_name: of a custom call, 'jit(f)/kernel_flops.fwd_2.dkv_5/splash_mha_fwd_residuals/...'.
  """
  scope = _OP_NAME.match(op_name)
  if scope is None:
    return None
  kernel = scope[2]
  for part in scope[1].split('.'):
    name, flops = part.split('_')
    if f'_{name}_' in kernel:
      return int(flops)
  return None
