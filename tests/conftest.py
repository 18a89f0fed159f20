"""A tokenizer, documents and a network that are small enough to see through."""

import os
import pathlib
import shutil
import tempfile
import types

# With the TPU compiler installed (for plans), JAX would look for a TPU in every process. Set before
# JAX is imported, here and in the processes that tests start; another value, to test on other
# devices, stays.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The time of the tests is that of compiling, and XLA is several times as fast with little care.
# Tests of what is compiled, and against other libraries, ask for `as_in_use`.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import contracts
from llm_jax.data import documents


class Tokenizer:
  """Ids 0 to 6 are special; of the others the multiples of `word` begin a word, and id i spells i %
  5 + 1 bytes.
  """

  pad_id, unk_id, cls_id, sep_id, mask_id, bos_id, eos_id = range(7)
  template = pair_template = None

  def __init__(self, vocab_size=50, word=1):
    self.vocab_size, self.fingerprint = vocab_size, 'test'
    ids = np.arange(vocab_size)
    self.special = ids < 7
    self.word_start = (ids % word == 0) & ~self.special
    self.token_bytes = np.where(self.special, 0, ids % 5 + 1).astype(np.int32)

  def encode(self, text):
    return np.array([7 + ord(c) % (self.vocab_size - 7) for c in text], np.int32)


class Documents(documents.Memory):
  """Token arrays as one split of a corpus; anything is an id."""

  def __init__(self, texts, pairs=None, labels=None):
    self.texts = texts
    given = {'tokens': texts, 'pair_tokens': pairs, 'label': labels}
    columns = {name: column for name, column in given.items() if column is not None}
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    super().__init__(records, encode, None)


def encode(record, tokenizer):
  """Records that are encoded already."""
  ids = {k: np.asarray(v, np.int32) for k, v in record.items() if k in ('tokens', 'pair_tokens')}
  return dict(record) | ids


def random_documents(lengths, vocab_size=50, seed=0, **given):
  rng = np.random.default_rng(seed)
  return Documents([rng.integers(7, vocab_size, n) for n in lengths], **given)


def stack(examples):
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def network(dim=6, vocab_size=50, seed=0, **outputs):
  """A bound network of linear maps, as `contracts.Net` has them: table `w_DV`, and by head name a
  matrix [D, outputs[name]]; the pooler does nothing, hidden states are the tokens' vectors.
  """
  rng = np.random.default_rng(seed)
  w_DV = rng.normal(size=(dim, vocab_size)).astype(np.float32)
  matrices = {
    name: rng.normal(size=(dim, size)).astype(np.float32) for name, size in outputs.items()
  }
  heads = {name: (lambda x, w=w: x @ w) for name, w in matrices.items()}
  heads |= {'mlm': lambda x: (2 * x, None), 'pooler': lambda x: x}

  def forward(batch, positions=None):
    hidden = w_DV.T[np.asarray(batch['tokens'])]
    return contracts.Outputs(_chosen(hidden, positions))

  model = types.SimpleNamespace(
    table=lambda: jnp.asarray(w_DV.T),
    table_bias=lambda: None,
    vocab_size=vocab_size,
    options=types.SimpleNamespace(dim=dim),
  )
  return types.SimpleNamespace(
    model=model, heads=heads, forward=forward, w_DV=w_DV, matrices=matrices
  )


def read(objective, hidden, batch):
  """Of hidden states [B, T, D] those that an objective asks for."""
  return _chosen(hidden, objective.positions(batch))


def _chosen(hidden, positions):
  if positions is None:
    return jnp.asarray(hidden)
  return jnp.asarray(hidden[np.arange(len(hidden))[:, None], np.asarray(positions)])


def cross_entropy(logits, targets):
  """Brute force in float64: minus the log of the softmax at the target, along the last axis."""
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  return -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1)[..., 0])


def pytest_configure():
  """What a test has compiled, no later one compiles again, nor do the processes that it starts.

  Each pytest worker has a folder of its own: none reads what another is about to write.
  """
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='llm_jax_tests_')
  os.environ |= {
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def pytest_unconfigure():
  shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'])


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """A process drops its compiled programs before they hold all of the memory maps that it may have.

  Linux gives a process 65,530, a program takes six and more, and one beyond ends the process.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_text().count('\n') > 20_000:
    jax.clear_caches()


@pytest.fixture(scope='module')
def as_in_use():
  """Programs are compiled as users have them, in processes that are started too."""
  option = 'jax_disable_most_optimizations'
  before, said = jax.config.values[option], os.environ.pop(option.upper())
  jax.config.update(option, False)
  yield
  jax.config.update(option, before)
  os.environ[option.upper()] = said


@pytest.fixture(scope='session')
def small():
  return types.SimpleNamespace(
    Tokenizer=Tokenizer,
    Documents=Documents,
    random_documents=random_documents,
    stack=stack,
    network=network,
    read=read,
    cross_entropy=cross_entropy,
  )


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
  """The quick tier, `-m quick`: every test that is marked neither `slow` nor `parity`."""
  for item in items:
    if not any(item.get_closest_marker(name) for name in ('slow', 'parity')):
      item.add_marker('quick')
