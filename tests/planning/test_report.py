"""The Markdown of a plan, from a report that is written down here."""

from llm_jax.planning import report

MIB = 2**20
FITTING = {
  'topology': 'v5e:2x2',
  'chips': 4,
  'device_kind': 'TPU v5 lite',
  'mesh': {'data': 2, 'fsdp': 2, 'sequence': 1, 'tensor': 1},
  'rules': 'fsdp',
  'model': 'bert_base',
  'dtype': 'bfloat16',
  'parameters_dtype': 'float32',
  'remat': 'none',
  'micro_batches': 2,
  'optimizer': 'adamw',
  'objective': 'mlm',
  'parameters': 1234567,
  'seq_len': 512,
  'global_batch_sequences': 16,
  'global_batch_tokens': 8192,
  'device_batch_sequences': 4,
  'device_batch_tokens': 2048,
  'model_flops': 2e12,
  'fits': True,
  'hbm': {
    'parameters_bytes': 1024 * MIB,
    'optimizer_bytes': 2048 * MIB,
    'gradients_bytes': 1024 * MIB,
    'batch_bytes': MIB,
    'temporaries_bytes': 512 * MIB,
    'total_bytes': 5120 * MIB,
    'limit_bytes': 16128 * MIB,
  },
  'executed_flops': 3e12,
  'bytes_accessed': 4e9,
  'collectives': {
    'all-reduce': dict(
      count=1200, bytes=256 * MIB, wire_bytes=384 * MIB, overlapped_bytes=128 * MIB
    )
  },
  'step_seconds_roofline': 0.02,
  'mfu_roofline': 0.5,
  'roofline': {'compute_seconds': 0.015, 'memory_seconds': 0.005, 'assumptions': ['a', 'b']},
  'suggestions': [],
  'not_known': ['c', 'd'],
  'compile_seconds': 12.4,
}
TRIED = [
  dict(
    flags='--config.model.remat=full',
    fits=True,
    total_bytes=9216 * MIB,
    step_seconds_roofline=0.02,
  ),
  dict(
    flags='--config.model.remat=dots',
    fits=False,
    total_bytes=17000 * MIB,
    step_seconds_roofline=None,
  ),
]


def cells(text):
  """The cells of every table row."""
  rows = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('| ')]
  return [[cell.strip() for cell in row] for row in rows]


def test_a_plan_that_fits():
  text = report.describe(FITTING)
  assert text.startswith('# bert_base on v5e:2x2: fits\n')
  assert '1,234,567 parameters, computed in bfloat16, kept in float32; optimizer adamw,' in text
  assert 'objective mlm; remat none, 2 micro-batch(es).' in text
  assert '4 chips (TPU v5 lite), mesh data 2 x fsdp 2 (fsdp). Per step: 16 sequences' in text
  rows = cells(text)
  assert ['parameters', '1.00'] in rows and ['batch', '0.0010'] in rows
  assert ['gradients, activations and all else', '2.00'] in rows  # 5 - 1 - 2 - the batch
  assert ['**total**', '5.00'] in rows and ['limit', '15.75'] in rows
  assert ['executed / model (recompute, optimizer)', '1.500'] in rows
  assert ['all-reduce', '1,200', '0.25', '0.38', '0.12'] in rows
  assert ['compute', '15.0'] in rows and ['**step**', '20.0'] in rows
  assert 'At best 50% of the peak FLOP/s (MFU), 409,600 tokens/s.' in text
  assert 'Assumed for the times:\n\n- a\n- b\n\nNot known here:\n\n- c\n- d\n\n' in text
  assert text.endswith('compiled in 12 s on the machine that made it.')


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would():
  hbm = FITTING['hbm'] | {'total_bytes': 18176 * MIB}
  text = report.describe(FITTING | {'fits': False, 'hbm': hbm, 'suggestions': TRIED})
  assert 'short by 2.00 GiB; this change would fit: `--config.model.remat=full`' in text
  assert cells(text)[-2:] == [
    ['`--config.model.remat=full`', 'yes', '9.00', '20.0'],
    ['`--config.model.remat=dots`', 'no', '16.60', '-'],
  ]
  text = report.describe(FITTING | {'fits': False, 'hbm': hbm, 'suggestions': TRIED[1:]})
  assert 'none of the changes tried fits; take a smaller model, or more chips' in text


def test_the_memory_of_a_state_that_is_too_large_adds_up_too():
  hbm = FITTING['hbm'] | {'temporaries_bytes': None, 'total_bytes': 4097 * MIB}
  text = report.describe(FITTING | {'fits': False, 'hbm': hbm})
  rows = cells(text)
  assert 'Nothing was compiled' in text
  sizes = {name: float(size) for name, size, *_ in rows if name in ('parameters', 'optimizer')}
  assert sum(sizes.values()) + 1.0 == 4.0 and ['gradients', '1.00'] in rows
  assert ['**total, before activations**', '4.00'] in rows


def test_what_is_not_known_is_a_dash():
  unknown = dict.fromkeys(('executed_flops', 'collectives', 'roofline'))
  text = report.describe(FITTING | unknown)
  assert (
    'Assumed' not in text and 'Not known here' in text and 'TFLOP' not in text and 'MFU' not in text
  )
  text = report.describe(FITTING | {'model_flops': None, 'mfu_roofline': None})
  assert ['model TFLOP', '-'] in cells(text) and 'At best 409,600 tokens/s.' in text


def test_topologies_beside_each_other():
  more = FITTING | {'chips': 8, 'collectives': {'all-gather': FITTING['collectives']['all-reduce']}}
  none = FITTING | {'chips': 16, 'collectives': None}
  text = report.describe_scaling([FITTING, more, none])
  assert text.startswith('# Collectives per device and step, from 4 to 16 chips\n')
  assert cells(text) == [
    ['chips', 'all-gather GiB', 'all-reduce GiB', 'sent GiB', 'memory GiB'],
    ['4', '-', '0.25', '0.38', '5.00'],
    ['8', '0.25', '-', '0.38', '5.00'],
    ['16', '-', '-', '0.00', '5.00'],
  ]
