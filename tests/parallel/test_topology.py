"""Machines by name: what they have, and names of no machine."""

import importlib.util

import pytest

from llm_jax.parallel import topology


@pytest.mark.parametrize(
  ('name', 'kind', 'chips', 'hosts', 'slices'),
  [
    ('v5e:2x2', 'TPU v5 lite', 4, 1, 1),
    ('v5e:4x4*2', 'TPU v5 lite', 32, 8, 2),
    ('v6e:4x4', 'TPU v6 lite', 16, 4, 1),
    ('v5p:4x4x4', 'TPU v5', 64, 16, 1),
    ('v4:2x2x4', 'TPU v4', 16, 4, 1),
    ('v5e:1x1', 'TPU v5 lite', 1, 1, 1),
    ('v6e-1', 'TPU v6 lite', 1, 1, 1),
    ('v5p:1x1x1', 'TPU v5', 1, 1, 1),
    ('v5e-16', 'TPU v5 lite', 16, 4, 1),
    ('v5litepod-8*2', 'TPU v5 lite', 16, 4, 2),
    ('v5p-64', 'TPU v5', 32, 8, 1),
  ],
)
def test_slices_of_tpus(name, kind, chips, hosts, slices):
  devices = topology.devices(name)
  assert {device.device_kind for device in devices} == {kind}
  assert len(devices) == topology.chips(name) == chips
  assert len({device.process_index for device in devices}) == hosts
  assert len({getattr(device, 'slice_index', 0) for device in devices}) == slices


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v5e', 'is not the name of a machine; give one such as v5e:4x4'),
    (
      'v5q:4x4',
      r"'v5q' is not a known kind of chip \(did you mean 'v5p'\?\); "
      r'known: v4, v5e, v5p, v6e, cpu\.',
    ),
    ('v5p:4x4', r'v5p has 3 dimension\(s\), as in v5p:4x4x4'),
    ('v5e-12', r'no such slice; the numbers of v5e are 1, 4, 8, 16, '),
    ('v5p-4', r'no such slice; the numbers of v5p are 8, 16, '),
    ('v5q-16', r'is not the name of a machine'),
    ('cpu:8*2', r'cpu has 1 dimension\(s\)'),
    ('v5e:3x5', r'the TPU compiler knows no such slice'),
    ('cpu:4096', r'JAX has started with \d+ CPU devices'),
  ],
)
def test_names_of_no_machine(name, message):
  with pytest.raises(ValueError, match=message):
    topology.devices(name)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"which runs without a TPU: pip install 'libtpu==\d"):
    topology.devices('v5e:2x2')
