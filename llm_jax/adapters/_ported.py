"""What an adapter_config.json of the library `peft` says that a method here does not have."""

from collections.abc import Collection, Mapping
from typing import Any

# Of every method: what changes nothing of what is computed, or is read elsewhere.
_SHARED = frozenset(
  'peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version '
  'target_modules exclude_modules modules_to_save fan_in_fan_out layers_pattern '
  'layers_to_transform'.split()
)


def check(
  name: str, settings: Mapping[str, Any], known: Collection[str], **allowed: Collection[Any]
) -> None:
  """Raises ValueError for a setting that a method does not have.

  Args:
    name: of the adapter.
    settings: an adapter_config.json; what is empty, zero or false in it asks for nothing.
    known: settings of any value.
    **allowed: the values of those that may have only some.
  """
  refused = {}
  for key, value in settings.items():
    fine = value in allowed[key] if key in allowed else not value or key in {*_SHARED, *known}
    if not fine:
      refused[key] = value
  if refused:
    shown = ', '.join(f'{key}={value!r}' for key, value in refused.items())
    raise ValueError(
      f'{shown}: {name} does not have it here; merge the adapter by peft (merge_and_unload), '
      'where it can be, and open the result.'
    )
