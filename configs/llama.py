"""LLaMA: `configs/llama.py:3.2-1b` (arXiv:2407.21783), `:2-7b` (arXiv:2307.09288), and `:tiny` to
try the recipe.
"""

from configs import base, gpt_tiny

VARIANTS = {'3.2-1b': 'llama_3_2_1b', '2-7b': 'llama_2_7b'}
BATCH_TOKENS = 2**22  # 4M tokens a step


def get_config(size: str = '3.2-1b'):
  """4M tokens a step, AdamW, cosine to a tenth of the peak rate, over all devices by FSDP.

  LLaMA 2 by section 2.2 of its paper: 2 trillion tokens. LLaMA 3.2 1B by what LLaMA 3's paper says
  of models of its size (section 3.2.1, peak rates of 2e-4 to 4e-4) and the 9 trillion tokens of its
  model card; what is not said is as in LLaMA 2. The model that was released was pruned from a
  larger one and distilled; this one is trained from scratch.
  """
  if size == 'tiny':
    return _tiny()
  if size not in VARIANTS:
    raise ValueError(
      f'configs/llama.py:{size} is not a size; there are tiny, {", ".join(VARIANTS)}.'
    )
  config = base.get_config()
  config.seq_len = {'3.2-1b': 8192, '2-7b': 4096}[size]
  config.batch_size = BATCH_TOKENS // config.seq_len
  config.steps = round({'3.2-1b': 9e12, '2-7b': 2e12}[size] / BATCH_TOKENS)
  config.log_every = 100
  config.eval_every = 5000
  config.tokenizer.vocab_size = {'3.2-1b': 128_256, '2-7b': 32_000}[size]
  config.tokenizer.sample_bytes = 50_000_000
  config.tokenizer.kind = 'bpe'
  config.tokenizer.normalization = 'identity'
  config.model = base.model('decoder', VARIANTS[size])
  config.model.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.objective = base.clm()
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule = 'cosine'
  config.optimizer.final_fraction = 0.1
  config.optimizer.warmup_fraction = None
  config.optimizer.warmup_steps = 2000
  config.optimizer.weight_decay = 0.1
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-5
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.checkpoint.every = 1000
  return config


def _tiny():
  """LLaMA's architecture at gpt_tiny's size and recipe: minutes on a laptop, over the embedded
  corpus.
  """
  config = gpt_tiny.get_config()
  config.model = base.model('decoder', 'llama_tiny')
  return config
