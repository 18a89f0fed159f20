"""What the parts of the program agree on. A plug-in is one module that implements one of these.

Data flows one way: config -> records -> arrays -> rows -> batch -> step -> metrics -> checkpoint.

| plug-in | config section | module defines | shipped in |
|---|---|---|---|
| source | `data` (`data.source`) | `Source(**options)` | `llm_jax.data.sources` |
| tokenizer | `tokenizer` | `create(**options)`, `load(directory)` | `llm_jax.data.tokenizers` |
| model | `model` | `Model(**options)`, `VARIANTS` | `llm_jax.models` |
| objective | `objective` | `Objective(tokenizer, **options)` | `llm_jax.objectives` |
| adapter | `adapter` | `Adapter(**options)` | `llm_jax.adapters` |
| compression | `compress` | `Compression(**options)` | `llm_jax.compress` |
| evaluator | `evaluators` (a section by name) | `Evaluator(**options)` | `llm_jax.evaluators` |
| hook | `hooks` (a section by name) | `Hook(**options)` | `llm_jax.training.hooks` |
| mode | `--mode` | `run(command)`, its flags | `llm_jax.modes` |

A name with a dot is the path of a module of the user's own. Objectives, models, adapters and
predictors inherit the classes below for their defaults; sources, tokenizers and evaluators have
nothing to inherit. An objective may also ask for `causal`, whether the model is.

A batch is a dictionary of arrays whose leading axis is the row. Letters: B rows, T tokens of a
row, P positions whose hidden states are read, M masked positions, C classes, G the most texts of a
row. Every array has one static shape for the whole run; rows that only fill up a batch are zeros.

| key | shape, type | meaning |
|---|---|---|
| tokens | B T int32 | input ids; anything where segments is 0 |
| segments | B T int32 | 0 padding, then 1, 2, ...: a number per document; it sees itself alone |
| positions | B T int32 | position within the segment, from 0 |
| source_tokens, source_segments, ... | B S int32 | of the row that an encoder reads beside it |
| prefix | B T int32 | prefix LM: 1 for tokens that all of their document see |
| token_types | B T int32 | 0 first text, 1 second text of a pair (objectives with pairs only) |
| mask_positions, mask_targets | B M int32 | masked LM: indices into the row, true ids there |
| mask_weights | B M float32 | 1 or 0 |
| targets, weights | B T int32, float32 | causal LM: the next ids, 1 where one counts |
| bytes | B float32 | causal LM: UTF-8 bytes that the counted targets spell |
| nsp_label, nsp_weight, sop_... | B int32, float32 | 1 when the pair is not what it should be |
| text_firsts, text_lasts | B G int32 | first and last index of text g, which is segment g + 1 |
| label | B G int32, B G C float32, or B G float32 | classes, several classes, a number |
| label_weight | B G float32 | classification; 0: no text or no label |
| mix_rank, mix_share | B G int32, float32 | mixup: an order of all texts; how much each is itself |
| unlabelled | B G float32 | classification that learns from them: 1 for a text without a label |
| chain, tag | B T int32 | token labelling: bits of `nn.crf` where a word is read; its tag |
| tag_weight | B T float32 | token labelling; 0: no word or no tag |
| span | B T int32 | QA: bits; 1 an answer may begin or end here, 2 it begins, 4 it ends |
| span_weight | B G float32 | QA; 0: no window or no answers given |
| reads | B G S int32 | prompts: where a word is read in each of the S segments of text g |
| group, member | B G int32 | the group of its row that text g is of, from 1; its number in it |
| text_key | B G 2 int32 | contrastive learning: equal for equal texts |
| markers | B G 2 int32 | relations: where in the row head and tail are read |
"""

from llm_jax.core.contracts.adapter import Adapter, Piece, Ported
from llm_jax.core.contracts.compression import (
  ACTIVATIONS,
  GRADIENTS,
  IDS,
  Compression,
  Seen,
  Smaller,
)
from llm_jax.core.contracts.data import Documents, Rows, Source, Texts, Tokenizer
from llm_jax.core.contracts.evaluator import Evaluator, Hook, Validation
from llm_jax.core.contracts.model import Model, Net, Outputs
from llm_jax.core.contracts.objective import Objective, Predictor
from llm_jax.core.contracts.values import SOURCE, Batch, Encoded, Example, Metrics, Number, Record
from llm_jax.core.contracts.weights import Scheme, StoredForm, WeightForm

__all__ = [
  'ACTIVATIONS',
  'Adapter',
  'Batch',
  'Compression',
  'Documents',
  'Encoded',
  'Evaluator',
  'Example',
  'GRADIENTS',
  'Hook',
  'IDS',
  'Metrics',
  'Model',
  'Net',
  'Number',
  'Objective',
  'Outputs',
  'Piece',
  'Ported',
  'Predictor',
  'Record',
  'Rows',
  'SOURCE',
  'Scheme',
  'Seen',
  'Smaller',
  'Source',
  'StoredForm',
  'Texts',
  'Tokenizer',
  'Validation',
  'WeightForm',
]
