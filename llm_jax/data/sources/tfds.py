"""Prepared TensorFlow Datasets in array_record format, read without TensorFlow
(https://www.tensorflow.org/datasets).
"""

import functools
import os
from typing import Any

import numpy as np

from llm_jax.data.sources import _paths, _record


class Source:
  """The examples of a prepared dataset as records; integer classes carry their names where the
  dataset knows them.

  Args:
    name: dataset, with config and version if wanted: 'wiki40b/en', 'glue/sst2:2.0.0'; or a folder
      with a prepared dataset in it.
    split: split to read, slices too: 'train', 'train[:10%]', 'train+validation'.
    data_dir: where prepared datasets lie; TFDS's own default (~/tensorflow_datasets or
      $TFDS_DATA_DIR) if not given.
    text: name of the feature with the text; '' where there is none.
    pair: name of the feature with the second text, if there is one.
    label: name of the feature with the label, if there is one.
    fields: names of further features that the objective reads: numbers, strings, lists of them.
    target: name of the field with the text that a model is to give, if there is one.

  Raises:
    ValueError: the dataset is not prepared in array_record format, or has no such split or feature,
      or no example.
  """

  def __init__(
    self,
    name: str,
    split: str = 'train',
    data_dir: str | None = None,
    text: str = 'text',
    pair: str | None = None,
    label: str | None = None,
    fields: tuple[str, ...] = (),
    target: str | None = None,
  ):
    self.name, self.split, self.data_dir = name, split, data_dir
    self.fields = _record.Fields(text, pair, label, fields, target)
    builder = _builder(name, data_dir)
    features = builder.info.features
    self.fields.check(f'dataset {name!r}', features)
    self._names = {field: getattr(features[field], 'names', None) for field in self.fields.names}
    try:
      info = builder.info.splits[split]
    except (KeyError, ValueError) as error:
      known = ', '.join(builder.info.splits)
      raise ValueError(
        f'split={split!r} of dataset {name!r} is not there ({error}); it has: {known}.'
      ) from error
    self._length = info.num_examples
    if not self._length:
      raise ValueError(f'split={split!r} of dataset {name!r} is an empty corpus.')
    files = sorted(str(path) for path in info.filepaths)
    self.fingerprint = _paths.fingerprint(
      files, 'tfds', builder.info.full_name, split, self._length, *self.fields.key
    )

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    example = self._data[index]
    values = {field: _python(example[field], self._names[field]) for field in self.fields.names}
    return self.fields.record(values, self.where(index))

  def where(self, index: int) -> str:
    """Dataset, split and example of a record."""
    return f'dataset {self.name!r}, {self.split}, example {index}'

  def __getstate__(self) -> dict[str, Any]:
    state = dict(self.__dict__)
    state.pop('_data', None)  # open files stay in their process
    return state

  @functools.cached_property
  def _data(self) -> Any:
    return _builder(self.name, self.data_dir).as_data_source(self.split)


def _builder(name: str, data_dir: str | None) -> Any:
  """The dataset's description from its files alone: the code that prepared it is neither needed nor
  run.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  how = (
    f'Prepare it once, with tfds.builder({name!r}, '
    'file_format="array_record").download_and_prepare() or '
    '`tfds build --file_format=array_record`, then set data_dir to the folder it was written under.'
  )
  folder = os.path.expanduser(name)
  try:
    if os.path.isfile(os.path.join(folder, 'dataset_info.json')):
      builder = tfds.builder_from_directory(folder)
    else:
      builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    where = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    raise ValueError(
      f'name={name!r} is no dataset prepared under {where}, nor the folder of one. {how}'
    ) from error
  if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f'name={name!r} is prepared as {builder.info.file_format.value}, which has no random access. '
      f'{how}'
    )
  return builder


def _python(value: Any, names: list[str] | None) -> Any:
  """NumPy and bytes to Python's own types; a class number to its name."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, (np.ndarray, list)):
    return [_python(item, names) for item in value] if np.ndim(value) else _python(value[()], names)
  value = value.item() if isinstance(value, np.generic) else value
  value = value.decode('utf-8') if isinstance(value, bytes) else value
  if names is not None and isinstance(value, int) and value >= 0:
    return names[value]
  return None if names is not None and value == -1 else value
