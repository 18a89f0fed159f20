"""The embedded corpus: what is in it, and what is not."""

import sysconfig
from pathlib import Path

from llm_jax.data.sources import stdlib


def test_files():
  source = stdlib.Source()
  root = Path(sysconfig.get_path('stdlib'))
  assert 300 < len(source) < 2000
  left_out = {'test', 'tests', 'site-packages', 'idle_test', 'encodings'}
  assert not [name for name in source.files if left_out & set(name.split('/'))]
  for name in ('argparse.py', 'json/decoder.py'):
    assert source[source.files.index(name)] == {'text': (root / name).read_bytes().decode()}
  assert sum(len(source[i]['text']) for i in range(len(source))) > 8_000_000
  assert stdlib.Source().fingerprint == source.fingerprint
