"""What the library `adapters` 1.3.0 computes with bottleneck adapters, for `test_bottleneck.py`.

    python tests/parity/bottleneck_reference.py

writes `bottleneck_reference.npz`: logits, and gradients of the adapters' parameters, of a tiny BERT
and a tiny GPT-2. It needs `pip install adapters==1.3.0 torch`, which wants another version of
transformers than the other tests of this folder. All parameters follow from their names (`drawn`),
so that none of them is kept.
"""

import pathlib
import zlib

import numpy as np
import torch
import transformers

V, D, T, R, LAYERS, NAME = 40, 16, 9, 3, 2, 'small'
KINDS = {
  'bert': ('BertForMaskedLM', dict(hidden_size=D, intermediate_size=24)),
  'gpt2': ('GPT2LMHeadModel', dict(n_embd=D, n_inner=24)),
}
SHAPE = dict(vocab_size=V, num_attention_heads=4, num_hidden_layers=LAYERS, pad_token_id=0)
PLACEMENTS = {'houlsby': 'DoubleSeqBnConfig', 'pfeiffer': 'SeqBnConfig', 'parallel': 'ParBnConfig'}
SCALE = {'houlsby': 1.0, 'pfeiffer': 1.0, 'parallel': 4.0}
TOKENS = np.random.default_rng(0).integers(3, V, (2, T))
WEIGHT = np.random.default_rng(3).normal(size=(2, T, V)).astype(np.float32) / T
FILE = pathlib.Path(__file__).with_suffix('.npz')


def drawn(name, shape, around=0.0):
  """The values of a parameter, by its name alone."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return (around + 0.2 * rng.normal(size=shape)).astype(np.float32)


def base(kind):
  """A model of transformers, any version."""
  name, shape = KINDS[kind]
  made = getattr(transformers, name)
  model = made(made.config_class(**SHAPE | shape, attn_implementation='eager'))
  with torch.no_grad():
    for path, value in model.named_parameters():
      scale = value.ndim == 1 and path.endswith('weight')  # of a norm
      value.copy_(torch.tensor(drawn(path, tuple(value.shape), float(scale))))
  return model.eval()


def own_name(path):
  """(layer, half of it, piece) of a parameter of the adapters, by its name there."""
  parts = path.split('.')
  layer = int(next(part for part in parts if part.isdigit()))
  half = 'attention' if 'attention' in path.split('.adapters.')[0] else 'mlp'
  side = 'down' if 'adapter_down' in path else 'up'
  return layer, half, f'{side}_bias' if path.endswith('bias') else side


def reference(kind, placement):
  """Logits, and gradients by 'layer/half/piece'."""
  import adapters

  model = base(kind)
  adapters.init(model)
  options = dict(reduction_factor=D / R, non_linearity='relu')
  model.add_adapter(NAME, config=getattr(adapters, PLACEMENTS[placement])(**options))
  model.train_adapter(NAME)
  own = {own_name(path): x for path, x in model.named_parameters() if f'.adapters.{NAME}.' in path}
  with torch.no_grad():
    for key, value in own.items():
      value.copy_(torch.tensor(drawn('/'.join(map(str, key)), tuple(value.shape))))
  model.eval()
  logits = model(input_ids=torch.tensor(TOKENS)).logits
  torch.sum(torch.log_softmax(logits, -1) * torch.tensor(WEIGHT)).backward()
  return {'logits': logits.detach()} | {'/'.join(map(str, key)): x.grad for key, x in own.items()}


def main():
  """Writes the file."""
  found = {}
  for kind in KINDS:
    for placement in PLACEMENTS:
      arrays = reference(kind, placement)
      print(kind, placement, sorted(arrays))
      found |= {f'{kind}/{placement}/{name}': np.asarray(x) for name, x in arrays.items()}
  np.savez_compressed(FILE, **found)


if __name__ == '__main__':
  main()
