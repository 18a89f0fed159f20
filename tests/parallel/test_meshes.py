"""Every mesh is the same program: loss and gradients on simulated devices are those of one, and the
work is shared out.

The programs run in a process of their own (this file as a script), for which the number of CPU
devices is set at the start. The gradient is read from AdamW's first moment after one real train
step, which is 0.1 of it. How the work is shared out is read from the compiled text: the sizes of
the models are such that a dimension is known by its size.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from configs import bert_tiny, dpo, gpt_tiny, transformer
from llm_jax.core import config, tree
from llm_jax.data.documents import Memory
from llm_jax.data.tokenizers import byte
from llm_jax.nn.attention import ring as ring_attention
from llm_jax.parallel import sharding
from llm_jax.programs import assemble, inference
from llm_jax.training import program as programs

pytestmark = pytest.mark.usefixtures('as_in_use')

DEVICES = 16  # the cases take eight of them, but for those with four axes
ROWS, LENGTH = 16, 32
TOLERANCE = 1e-5
# Only a stack of layers has a dimension of 3, only the mlp's is a multiple of 11.
GROUPS, DIM, MLP = 3, 64, 11 * 16
SHAPE = dict(
  dim=DIM, mlp_dim=MLP, heads=8, layers=GROUPS, max_len=LENGTH, dropout=0.0, attention_dropout=0.0
)
MODELS = {  # over a vocabulary of 263, which nothing divides
  'encoder': (bert_tiny, SHAPE | dict(variant='bert_base')),
  'windowed': (bert_tiny, SHAPE | dict(layers=2 * GROUPS, window=6, global_every=2)),
  'decoder': (gpt_tiny, SHAPE | dict(variant='gpt2_small', tied=True)),
  'grouped': (gpt_tiny, SHAPE | dict(variant='llama_tiny', kv_heads=2, tied=False)),
  'both': (transformer, SHAPE | dict(variant='t5_1_1_small', head_dim=8)),
  'prefix': (gpt_tiny, SHAPE | dict(variant='gpt2_small', tied=True)),
  'preferences': (dpo, SHAPE | dict(variant='gpt2_small', tied=True)),
}
TOKENIZER = byte.create()
MLP_PRODUCT = re.compile(
  r' dot\((%[^,]+), (%[^)]+)\).*lhs_contracting_dims={([\d,]+)}.*op_name="[^"]*/mlp/'
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A mesh, what runs on it, and in how many micro-batches."""

  model: str
  mesh: dict
  micro_batches: int = 1

  def __str__(self):
    mesh = ' '.join(f'{axis}={size}' for axis, size in self.mesh.items())
    return f'{self.model}, {mesh}, {self.micro_batches} micro'

  @property
  def devices(self):
    return self.parts(*sharding.AXES)

  def parts(self, *axes):
    return math.prod(self.mesh.get(axis, 1) * self.mesh.get(f'dcn_{axis}', 1) for axis in axes)


CASES = [
  Case('encoder', dict(data=8)),
  Case('grouped', dict(fsdp=8)),
  Case('windowed', dict(sequence=8)),
  Case('decoder', dict(sequence=8)),
  Case('encoder', dict(tensor=8)),
  Case('grouped', dict(data=2, fsdp=4), 2),
  Case('windowed', dict(fsdp=4, tensor=2)),
  Case('grouped', dict(sequence=2, tensor=4)),
  Case('decoder', dict(fsdp=2, sequence=2, tensor=2)),
  Case('windowed', dict(data=2, fsdp=2, sequence=2)),
  Case('grouped', dict(data=2, sequence=2, tensor=2), 2),
  Case('encoder', dict(data=2, fsdp=2, tensor=2), 2),
  Case('decoder', dict(data=8, rules='zero1')),
  Case('encoder', dict(data=2, fsdp=2, tensor=2, rules='zero1')),
  Case('decoder', dict(dcn_data=2, fsdp=4)),
  Case('grouped', dict(dcn_fsdp=2, data=2, fsdp=2)),
  Case('grouped', dict(data=2, fsdp=2, sequence=2, tensor=2)),
  Case('encoder', dict(data=2, fsdp=2, sequence=2, tensor=2), 2),
  Case('both', dict(data=2, fsdp=4), 2),
  Case('both', dict(sequence=4, tensor=2)),
  Case('both', dict(fsdp=2, sequence=2, tensor=2)),
  Case('prefix', dict(fsdp=2, sequence=4)),
  Case('preferences', dict(data=2, sequence=2, tensor=2), 2),
]


def violations(text, case, sizes):
  """What in a compiled train step is not shared out as the mesh says; `sizes` are the parameters'
  elements by path.
  """
  rows, sequence, tensor = case.parts('data', 'fsdp'), case.parts('sequence'), case.parts('tensor')
  found = []
  products = mlp_products(text)
  if len(products) < 6:
    found.append(f'{len(products)} products of the mlp, not 6 or more')
  for flops, size in products:
    if size != MLP // tensor:
      found.append(f'an mlp of {size} on a device, not {MLP // tensor}')
    if flops != 2 * ROWS * LENGTH * DIM * MLP // (case.devices * case.micro_batches):
      found.append(f'{flops} FLOPs in a product of the mlp')
  stream = f'f32[{ROWS // (rows * case.micro_batches)},{LENGTH // (sequence * tensor)},{DIM}]'
  if not any(stream in line for line in text.splitlines() if ' while(' in line):
    found.append(f'no loop over layers carries {stream}')
  if (ROWS // rows, LENGTH) not in parameters(text):
    found.append(f'no batch of {ROWS // rows} rows')
  stacks = [shape for shape in results(text, 'all-gather') if GROUPS in shape]
  gathered = [shape for shape in stacks if math.prod(shape) > GROUPS * 2 * MLP]
  if gathered and case.mesh.get('rules') != 'zero1':  # which gathers what it has updated
    found.append(f'whole stacks of layers are gathered: {gathered}')
  ring = re.search(r' collective-permute(-start)?\(.*op_name="[^"]*/ppermute', text)
  if sequence > 1 and not ring:
    found.append('no ring')
  held, share = sum(map(math.prod, parameters(text))), shares(case, sizes)
  if held > share:
    found.append(f'{held} numbers on a device, not at most {share}')
  return sorted(set(found))


def shares(case, sizes):
  """How many numbers a device may hold of parameters, AdamW's two moments, and the batch.

  Vectors may be whole, and so are the small tables of positions, distances and token types.
  """
  whole = re.compile('(bias|scale|position/embedding|token_type/embedding|_bias/embedding)$')

  def cut(parts):
    return sum(size if whole.search(path) else size // parts for path, size in sizes.items())

  tensor, rows = case.parts('tensor'), case.parts('data', 'fsdp')
  batch = (8 if case.model == 'both' else 7) * ROWS * LENGTH // rows
  if case.mesh.get('rules') == 'zero1':
    return batch + cut(1) + 2 * cut(tensor * rows)
  return batch + 3 * cut(tensor * case.parts('fsdp'))


def mlp_products(text):
  """FLOPs and the mlp's dimension of each matrix product that comes from an mlp."""
  products, shapes = [], {}
  for line in text.splitlines():
    if line.endswith('{'):
      shapes = {}  # another computation
    if result := re.match(r'\s*(?:ROOT )?(%\S+) = \w+\[([\d,]*)\]', line):
      shapes[result[1]] = dimensions(result[2])
    product = MLP_PRODUCT.search(line)
    if product:
      left, right = shapes[product[1]], shapes[product[2]]
      summed = math.prod(left[i] for i in dimensions(product[3]))
      flops = 2 * math.prod(shapes[result[1]]) * summed
      products.append((flops, max((size for size in (*left, *right) if size % 11 == 0), default=0)))
  return products


def parameters(text):
  """Shapes of the arguments of the whole program."""
  entry = text[text.index('\nENTRY ') :]
  return [dimensions(found) for found in re.findall(r'= \w+\[([\d,]*)\]\S* parameter\(', entry)]


def results(text, operation):
  """Shapes of the results of an operation, wherever it is."""
  found = re.findall(rf'= ([^=]*?) {operation}(?:-start)?\(', text)
  return [dimensions(shape) for result in found for shape in re.findall(r'\[([\d,]*)\]', result)]


def dimensions(text):
  return tuple(int(size) for size in text.split(',') if size)


def program(small, case):
  """The program of a case, and its batch."""
  module, model = MODELS[case.model]
  parsed = module.get_config().to_dict()
  parsed |= dict(
    seq_len=LENGTH,
    batch_size=ROWS,
    micro_batches=case.micro_batches,
    mesh=case.mesh,
    model=parsed['model'] | model,
    optimizer=dict(name='adamw', learning_rate=1e-3, clip_norm=0.0),
  )
  if case.model == 'both':
    parsed['objective'] |= dict(source_len=LENGTH)
  elif case.model == 'prefix':
    parsed['objective'] = dict(name='prefix_lm', long='drop')
  elif case.model == 'preferences':
    parsed['objective'] |= dict(loss='dpo')
  parsed = assemble.resolve(config.parse(parsed), TOKENIZER.vocab_size)
  objective = assemble.create_objective(parsed, TOKENIZER)
  lengths = [9, 5, 20, 40, 7, 11, 13, 60] * 12
  documents = small.random_documents(lengths, vocab_size=TOKENIZER.vocab_size)
  if case.model in ('both', 'prefix', 'preferences'):
    documents = dict(preferences=preferences).get(case.model, pairs)(documents)
  rows, rng = objective.rows(documents, LENGTH), np.random.default_rng(0)
  if case.model == 'preferences':
    rows.reference = rng.normal(-9, 3, (len(documents), 2)).astype(np.float32)
  examples = [objective.transform(rows.example(i, rng), rng) for i in range(ROWS)]
  devices = jax.devices()[: case.devices]
  return programs.build(parsed, objective, examples[0], devices), small.stack(examples)


def pairs(documents):
  """Each document with the one before it as its target."""
  tokens = [documents.array('tokens', index) for index in range(len(documents))]
  records = [{'tokens': x, 'target_tokens': tokens[index - 1]} for index, x in enumerate(tokens)]
  return Memory(records, lambda record, tokenizer: record, TOKENIZER)


def preferences(documents):
  """Each document as the chosen answer, and the one before it as the rejected one, the first token
  of either as the question.
  """
  tokens = [documents.array('tokens', index)[:12] for index in range(len(documents))]
  records = []
  for index, chosen in enumerate(tokens):
    sides = dict(chosen=chosen, rejected=tokens[index - 1])
    record = {f'{name}_tokens': ids for name, ids in sides.items()}
    learned = {f'{name}_learned': np.int32(np.arange(len(x)) > 0) for name, x in sides.items()}
    records.append(record | learned)
  return Memory(records, lambda record, tokenizer: record, TOKENIZER)


def gradient(made, compiled, batch):
  """The loss and the gradients by path, from one train step with parameters away from the start,
  where biases are zero.
  """
  rng = np.random.default_rng(1)
  state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.state)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: rng.normal('scale' in str(path[-1]), 0.1, leaf.shape).astype(leaf.dtype),
    state.params,
  )
  state = state.replace(params=params)
  state = jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), state, made.state)
  state, metrics = compiled(state, made.put(batch))
  moments = tree.flatten(moment(state.opt_state))
  return float(metrics['loss'][0]), {path: 10 * np.asarray(g) for path, g in moments.items()}


def moment(opt_state):
  return optax.tree_utils.tree_get(opt_state, 'mu')


def compiled(made):
  return made.train_step.lower(made.state, made.batch).compile()


def deviation(found, true):
  """The largest of loss and leaves: relative to the loss, and to the largest entry of each leaf of
  the gradient.

  The gradient of a key's bias is zero but for rounding, as a softmax does not see it: that of the
  query's bias is its measure.
  """
  (loss, gradients), (true_loss, true_gradients) = found, true
  worst = abs(loss / true_loss - 1)
  for path, wanted in true_gradients.items():
    scale = np.abs(true_gradients[path.replace('key/bias', 'query/bias')]).max()
    assert scale > 0, path
    worst = max(worst, np.abs(gradients[path] - wanted).max() / scale)
  return worst


def alone(small, model):
  """Of one device: the loss and gradients, the program's text, and the parameters' elements by
  path.
  """
  made, batch = program(small, Case(model, dict(data=1)))
  run = compiled(made)
  sizes = {path: math.prod(leaf.shape) for path, leaf in tree.flatten(made.state.params).items()}
  return gradient(made, run, batch), run.as_text(), sizes


def measure(small, model):
  """Of each case of a model: how far it is off, its violations, and those of the program of one
  device in its place.
  """
  true, text, sizes = alone(small, model)
  for case in (case for case in CASES if case.model == model):
    made, batch = program(small, case)
    run = compiled(made)
    yield dict(
      case=str(case),
      deviation=float(deviation(gradient(made, run, batch), true)),
      violations=violations(run.as_text(), case, sizes),
      alone=violations(text, case, sizes),
    )


def break_(small):
  """What the measures say of programs that are wrong: each must be seen."""
  case = Case('grouped', dict(data=2, sequence=2, tensor=2))
  true, _, sizes = alone(small, case.model)
  # Of all keys only a device's own.
  with mock.patch.object(ring_attention, '_blocks', lambda ring, length: (0, 1)):
    made, batch = program(small, case)
    yield dict(deviation=float(deviation(gradient(made, compiled(made), batch), true)))
  # Nothing inside of the program is laid out.
  with mock.patch.object(inference, 'on_layout', lambda layout, function: function):
    yield dict(violations=violations(compiled(program(small, case)[0]).as_text(), case, sizes))
  case = Case('grouped', dict(fsdp=8))
  # Parameters whole on each device.
  with mock.patch.dict(sharding.RULES, fsdp=sharding.Rules({}, {})):
    yield dict(violations=violations(compiled(program(small, case)[0]).as_text(), case, sizes))


def unrolled(small):
  """Of the encoder without a loop over layers: how far it is off that with one, on one device and
  on meshes, and its FLOPs.
  """
  true, _, _ = alone(small, 'encoder')
  with mock.patch.dict(MODELS, encoder=(bert_tiny, MODELS['encoder'][1] | dict(unroll=0))):
    for mesh in (dict(data=1), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, sequence=2)):
      made, batch = program(small, Case('encoder', mesh))
      yield dict(
        deviation=float(deviation(gradient(made, compiled(made), batch), true)), flops=made.flops
      )


def run(what):
  """What this file prints as a script."""
  root = pathlib.Path(__file__).parents[2]
  env = os.environ | {
    'PYTHONPATH': str(root),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={DEVICES}',
  }
  done = subprocess.run(
    [sys.executable, __file__, what], capture_output=True, text=True, check=False, cwd=root, env=env
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize('model', MODELS)
def test_every_mesh_computes_the_same_and_shares_the_work(model):
  found = run(model)
  assert len(found) == sum(case.model == model for case in CASES)
  wrong = [f for f in found if not f['deviation'] < TOLERANCE or f['violations']]
  assert not wrong, '\n'.join(map(str, wrong))
  assert all(f['alone'] for f in found), 'the program of one device must not pass for a shared one'


@pytest.mark.slow
def test_the_last_layer_may_run_where_it_is_read_alone():
  single, mesh, ring = run('unrolled')
  assert max(single['deviation'], mesh['deviation'], ring['deviation']) < TOLERANCE
  # Where rows are cut, the last layer is as the others.
  assert single['flops'] == mesh['flops'] < ring['flops']


@pytest.mark.slow
def test_what_is_wrong_is_seen():
  ring, unlaid, replicated = run('broken')
  assert ring['deviation'] > 100 * TOLERANCE
  assert 'no ring' in unlaid['violations']
  assert any('numbers on a device' in line for line in replicated['violations']), replicated


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  import conftest

  other = {'broken': break_, 'unrolled': unrolled}.get(sys.argv[1])
  print(json.dumps(list(other(conftest) if other else measure(conftest, sys.argv[1]))))
