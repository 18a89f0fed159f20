"""The notebooks: they define nothing, hold no outputs, and run from end to end on a CPU, with
figures and numbers.
"""

import ast
import base64
import collections
import csv
import json
import math
import pathlib
import re
import sysconfig

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from llm_jax.core import config
from llm_jax.training import logs

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ('pretrain_bert_tpu', 'finetune_gpt_tpu', 'finetune_bert', 'chat', 'inspect')
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def read(name):
  return nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', nbformat.NO_CONVERT)


def code(book):
  return [cell for cell in book.cells if cell.cell_type == 'code']


def faults(book):
  """What a committed notebook must not hold."""
  for number, cell in enumerate(code(book)):
    tree = ast.parse(TransformerManager().transform_cell(cell.source))  # %pip is no Python
    found = (node for node in ast.walk(tree) if isinstance(node, DEFINITIONS))
    yield from (f'cell {number} defines something: {ast.unparse(node)}' for node in found)
    if cell.outputs or cell.execution_count is not None:
      yield f'cell {number} has outputs'


def variables_cell(book):
  """The index of the cell with the notebook's variables, and their names."""
  tags = [cell.metadata.get('tags', ()) for cell in book.cells]
  (index,) = (i for i, found in enumerate(tags) if 'parameters' in found)
  names = set()
  for node in ast.walk(ast.parse(book.cells[index].source)):
    if isinstance(node, ast.Assign):
      names |= {target.id for target in node.targets}
  return index, names


def execute(name, folder, monkeypatch, last=None, after='', **variables):
  """Runs a notebook; returns it with its outputs.

  Args:
    name: of the notebook.
    folder: to run it in.
    monkeypatch: the fixture.
    last: text of the last code cell that is run; None to run all.
    after: code of one more cell at the end; '' for none.
    **variables: values that replace those of the notebook's variables.
  """
  monkeypatch.delenv('COLAB_RELEASE_TAG', raising=False)
  for variable in ('XDG_CACHE_HOME', 'IPYTHONDIR', 'JUPYTER_RUNTIME_DIR'):
    monkeypatch.setenv(variable, str(folder / variable.lower()))
  book = read(name)
  index, known = variables_cell(book)
  assert variables.keys() <= known
  changes = '\n'.join(f'{key} = {value!r}' for key, value in variables.items())
  book.cells.insert(index + 1, nbformat.v4.new_code_cell(changes))
  if last is not None:
    kinds = [(cell.cell_type, last in cell.source) for cell in book.cells]
    book.cells = book.cells[: kinds.index(('code', True)) + 1]
  if after:
    book.cells.append(nbformat.v4.new_code_cell(after))
  resources = {'metadata': {'path': str(folder)}}
  client = nbclient.NotebookClient(book, timeout=400, kernel_name='python3', resources=resources)
  client.execute()
  return book


def outputs(book):
  return [output for cell in code(book) for output in cell.outputs]


def printed(book):
  return ''.join(output.text for output in outputs(book) if output.output_type == 'stream')


def figures(book):
  """The pictures under the cells, each checked to be a PNG of a size at which something can be
  seen.
  """
  shown = [output.data for output in outputs(book) if 'data' in output]
  found = [base64.b64decode(data['image/png']) for data in shown if 'image/png' in data]
  for picture in found:
    width, height = (int.from_bytes(picture[i : i + 4], 'big') for i in (16, 20))
    assert picture[:8] == b'\x89PNG\r\n\x1a\n'
    assert width > 400 and height > 200 and len(picture) > 5000
  return found


def losses(folder, split):
  return [line['loss'] for line in logs.read(folder) if line['split'] == split]


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """Some hundred documents: modules of the standard library in pieces."""
  folder = tmp_path_factory.mktemp('texts')
  for path in pathlib.Path(sysconfig.get_path('stdlib')).glob('[a-g]*.py'):
    content = path.read_text(encoding='utf-8', errors='replace')
    for start in range(0, len(content), 2500):
      piece = folder / f'{path.stem}_{start}.txt'
      piece.write_text(content[start : start + 2500], encoding='utf-8')
  return f'{folder}/*.txt'


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_defines_nothing_and_holds_no_outputs(name):
  book = read(name)
  nbformat.validate(book)
  assert list(faults(book)) == []
  assert len(code(book)) > 8 and all(cell.source.strip() for cell in book.cells)


def test_the_check_finds_definitions_and_outputs():
  cells = [
    'def f():\n  pass',
    '%pip install x\nclass A: pass',
    'f = lambda x: x',
    'async def g(): pass',
    'print(1)',
  ]
  book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
  assert len(list(faults(book))) == 4
  book.cells[-1].outputs = [nbformat.v4.new_output('stream', text='1')]
  assert list(faults(book))[-1] == 'cell 4 has outputs'


def test_every_notebook_is_here():
  assert {path.stem for path in (ROOT / 'notebooks').glob('*.ipynb')} == set(NAMES)


@pytest.mark.slow
def test_pretraining(tmp_path, texts, monkeypatch):
  book = execute('pretrain_bert_tpu', tmp_path, monkeypatch, SIZE='tiny', STEPS=20, TEXT=texts)
  folder, said = tmp_path / 'runs' / 'bert_tiny', printed(book)
  pictures = figures(book)
  assert len(pictures) == 3 and pictures[-1] == (folder / 'loss.png').read_bytes() != pictures[-2]
  steps = [line['step'] for line in logs.read(folder) if line['split'] == 'validation']
  assert steps == [5, 10, 15, 20, 25]
  for split, least in (('train', 1.0), ('validation', 0.2)):  # the first validation is after step 5
    assert losses(folder, split)[0] > losses(folder, split)[-1] + least
  assert losses(folder, 'train')[0] < 1.1 * math.log(4096)
  assert f'goes on at step 20, with example {20 * 16}' in said  # 16 sequences per step
  accuracy = float(re.search(r'mlm_accuracy (\S+)\n', said)[1])
  scores = json.loads((folder / 'eval.json').read_text())
  assert 0.02 < accuracy < 1 and scores['mlm_accuracy'] == pytest.approx(accuracy, rel=1e-4)
  # Masks in the row of the beginning, and probabilities of what fills them at the end.
  assert "'[MASK]' | " in said and len(re.findall(r' \| 0\.\d\d\n', said)) > 10


@pytest.mark.slow
def test_fine_tuning(tmp_path, texts, monkeypatch):
  variables = dict(SIZE='tiny', STEPS=12, TUNING_STEPS=6, TEXT=texts)
  after = 'import json\n\nprint(json.dumps(answers))'
  book = execute('finetune_gpt_tpu', tmp_path, monkeypatch, after=after, **variables)
  runs = tmp_path / 'runs'
  pretrained, tuned, scratch = (
    runs / name for name in ('gpt_tiny', 'gpt_tiny_classify', 'gpt_tiny_scratch')
  )
  said, pictures = printed(book), figures(book)
  assert len(pictures) == 4 and pictures[2] == (tuned / 'loss.png').read_bytes()
  assert (scratch / 'loss.png').exists()
  assert losses(pretrained, 'train')[0] > losses(pretrained, 'train')[-1] + 0.5
  assert re.search(r'bits_per_byte \d\.\d+\n +clm', said) and 'xz_bits_per_byte' in said
  assert f'goes on at step 12, with example {12 * 16}' in said
  assert 'took 19 parameters' in said and 'heads_classifier/dense/kernel\n' in said
  answers = json.loads(said.splitlines()[-1])
  classes = answers[0]['probabilities']
  assert len(answers) == 3 and len(classes) > 20
  assert sum(classes.values()) == pytest.approx(1, abs=1e-4)
  assert answers[0]['label'] == max(classes, key=classes.get)
  for folder in (tuned, scratch):
    assert min(losses(folder, 'validation')) < math.log(len(classes))  # an even guess
    lines = [line for line in logs.read(folder) if line['split'] == 'validation']
    assert all(0 <= line['accuracy'] <= 1 for line in lines)
  assert re.search(r' accuracy 0\.\d+\n +macro_f1', said) and 'weighted avg' in said


@pytest.mark.slow
def test_fine_tuning_on_tables(tmp_path, monkeypatch):
  book = execute('finetune_bert', tmp_path, monkeypatch, PRETRAINING_STEPS=20, EPOCHS=1.0)
  said, runs = printed(book), tmp_path / 'runs'
  pictures = figures(book)
  assert len(pictures) == 3 and pictures[1] == (runs / 'bert_classify' / 'loss.png').read_bytes()
  counts = [int(n.replace(',', '')) for n in re.findall(r': ([\d,]+) texts, 8 labels', said)]
  assert len(counts) == 3 and counts[0] > 4 * counts[1] > 400
  share, low, high, texts = re.search(
    r'accuracy (\S+), from (\S+) to (\S+), (\d+) texts', said
  ).groups()
  with open(runs / 'tables' / 'test.csv', newline='', encoding='utf-8') as file:
    labels = [row['label'] for row in csv.DictReader(file)]
  assert int(texts) == len(labels) == counts[2]
  most = collections.Counter(labels).most_common(1)[0][1] / len(labels)
  assert most < float(low) < float(share) < float(high) < 1
  assert 'weighted avg' in said and ', labelled ' in said
  assert "'config.json', 'model.safetensors'" in said and 'tokenizer.json' in said


@pytest.mark.slow
def test_conversations(tmp_path, monkeypatch):
  book = execute('chat', tmp_path, monkeypatch, STEPS=150)
  said, folder = printed(book), tmp_path / 'runs' / 'chat'
  pictures = figures(book)
  assert len(pictures) == 2 and pictures[1] == (folder / 'loss.png').read_bytes()
  # Green is what the assistant says, and its end.
  shown = ''.join(output.data.get('text/html', '') for output in outputs(book) if 'data' in output)
  green = re.findall(r'<span style="background[^>]*>([^<]*)</span>', shown)
  assert green and all(re.match(r'\d \+ \d = \d+', text) for text in green)
  assert 0.2 < int(re.search(r'(\d+)% of the tokens are learned', said)[1]) / 100 < 0.6
  asked, answer, written = (
    re.search(rf'^{name}: +(.*)$', said, re.M)[1] for name in ('asked', 'answer', 'written')
  )
  a, b = re.findall(r'\d', asked)
  assert written == f'{a} + {b} = {int(a) + int(b)}' and re.fullmatch(r'\d \+ \d = \d+', answer)
  assert re.search(r'\d+ of 40 turns are answered as they were written', said)
  assert "'config.json'" in said and 'tokenizer.json' in said


@pytest.mark.slow
def test_inspecting(tmp_path, monkeypatch):
  book = execute('inspect', tmp_path, monkeypatch, STEPS=16, TEXTS=60, EXPLAINED=2)
  said = printed(book)
  assert len(figures(book)) == 6
  assert losses(tmp_path / 'runs' / 'classify', 'train')[0] > 3
  right = int(re.search(r'(\d+) of 60 held-out texts are answered', said)[1])
  assert 6 < right <= 60  # of some 30 packages
  assert len(re.findall(r'\d\.\d\d nats  \w+, answered \w+: ', said)) == 5
  added, changes = re.search(r'integrated gradients: .* to (\S+), .* changes (\S+)', said).groups()
  assert float(added) == pytest.approx(float(changes), abs=0.01)
  assert re.search(r'occlusion: the scores add up to', said)


@pytest.mark.parametrize(
  ('name', 'variant'), [('pretrain_bert_tpu', 'bert_base'), ('finetune_gpt_tpu', 'gpt2_small')]
)
def test_the_size_for_tpus_is_a_config_that_can_be(tmp_path, monkeypatch, name, variant):
  book = execute(name, tmp_path, monkeypatch, last='program.check(', SIZE='base', STEPS=2000)
  last = code(book)[-1].outputs  # one print may come in several parts
  printed_parts = [output.text for output in last if output.get('name') == 'stdout']
  shown = config.from_json(''.join(printed_parts))
  assert shown.model['variant'] == variant and shown.model['dtype'] == 'bfloat16'
  assert shown.steps == 2000
