"""Causal language modelling: each token of a document is predicted from those before it.

Radford et al. 2019, "GPT-2". A document is read as BOS, its tokens, EOS; documents that share a row
do not see each other.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import contracts
from llm_jax.core.contracts import Batch, Documents, Example, Metrics, Net, Rows, Tokenizer
from llm_jax.data import pack, prompted
from llm_jax.objectives.shared import infilling, next_tokens


class Objective(next_tokens.Objective):
  """Next-token prediction: every token of every document, and its EOS, is a target once per epoch.

  A piece that continues a document in another row starts from the token before it, at position 0.

  Args:
    tokenizer: gives BOS and EOS, and the bytes of each id.
    packing: how documents fill rows: 'windows', 'best_fit' or 'none'.
    fim_rate: the share of the pieces of documents of which a middle part is learned after what
      stands around it (`shared.infilling`), drawn anew in each epoch.
    fim_spm: of these the share that begins with what stands behind.
    label_smoothing, z_loss: as in `vocabulary.cross_entropy`.
  """

  terms = {'clm': 1.0}

  def __init__(
    self,
    tokenizer: Tokenizer,
    packing: str = 'windows',
    fim_rate: float = 0.0,
    fim_spm: float = 0.5,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
  ):
    if packing not in pack.PACKINGS:
      raise ValueError(f'objective.packing={packing!r} must be one of {", ".join(pack.PACKINGS)}.')
    super().__init__('clm', label_smoothing, z_loss)
    self.tokenizer, self.packing = tokenizer, packing
    self.fill_in = infilling.FillIn(tokenizer, fim_rate, fim_spm)

  def check(self, model: contracts.Model) -> None:
    """The model must be causal."""
    if not model.causal:
      raise ValueError(
        'objective clm needs a causal model (decoder): one that sees both sides of a token would '
        'read the next one instead of predicting it. For this model choose objective mlm.'
      )

  def rows(self, documents: Documents, seq_len: int) -> Rows:
    """Rows of pieces of documents."""
    return _Rows(self, documents, seq_len)

  def transform(self, example: Example, rng: np.random.Generator) -> Example:
    """Nothing to add: the targets come with the row."""
    if 'targets' not in example:
      raise ValueError(
        'objective clm takes its targets only from rows that it lays out itself; in a mix, set '
        "rows='clm'."
      )
    return example

  def loss(self, net: Net, hidden_BTD: jax.Array, batch: Batch) -> Metrics:
    """Cross-entropy in nats and accuracy per token, and bits per UTF-8 byte of the text that the
    targets spell.
    """
    metrics = super().loss(net, hidden_BTD, batch)
    metrics['bits_per_byte'] = metrics['clm_nll'][0] / np.log(2), jnp.sum(batch['bytes'])
    return metrics


class _Rows:
  def __init__(self, objective: Objective, documents: Documents, seq_len: int):
    self.tokenizer, self.documents, self.seq_len = objective.tokenizer, documents, seq_len
    self.lengths = documents.lengths('tokens')
    inputs = np.where(self.lengths > 0, self.lengths + 1, 0)  # BOS and the tokens
    self.prompt = np.array(prompted.prompt(self.tokenizer), np.int32)
    self.fill_in = objective.fill_in
    overhead = len(self.prompt) + self.fill_in.room
    self.plan = pack.PACKINGS[objective.packing](inputs, seq_len, overhead=overhead)

  def __len__(self) -> int:
    return len(self.plan)

  def example(self, index: int, rng: np.random.Generator) -> Example:
    pieces = [self.turned(*piece, rng) for piece in self.plan[index]]
    example = pack.assemble([np.append(self.prompt, ids[:-1]) for ids in pieces], self.seq_len)
    counted_T = (example['segments'] > 0) & (example['positions'] >= len(self.prompt))
    targets_T = np.zeros(self.seq_len, np.int32)
    targets_T[counted_T] = np.concatenate([ids[1:] for ids in pieces])
    return example | {
      'targets': targets_T,
      'weights': counted_T.astype(np.float32),
      'bytes': np.float32(np.sum(self.tokenizer.token_bytes[targets_T[counted_T]])),
    }

  def turned(self, document: int, start: int, stop: int, rng: np.random.Generator) -> np.ndarray:
    """The ids of a piece, its text turned round where that is drawn."""
    ids = self.ids(document, start, stop)
    end = len(ids) - (stop == int(self.lengths[document]) + 1)
    return np.concatenate([ids[:1], self.fill_in(ids[1:end], rng), ids[end:]])

  def ids(self, document: int, start: int, stop: int) -> np.ndarray:
    """Ids start to stop, inclusive, of BOS document EOS: stop - start inputs, and the target of the
    last.
    """
    length = int(self.lengths[document])
    text = self.documents.array('tokens', document, max(start - 1, 0), min(stop, length))
    ids = np.empty(stop - start + 1, np.int32)
    first = int(start == 0)
    ids[first : first + len(text)] = text
    if start == 0:
      ids[0] = self.tokenizer.bos_id
    if stop == length + 1:
      ids[-1] = self.tokenizer.eos_id
    return ids
