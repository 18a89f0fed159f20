"""LLaMA: `configs/llama.py:3.2-1b` (arXiv:2407.21783) and `:2-7b` (arXiv:2307.09288).

`:tiny` is a model small enough to try the recipe on a laptop.
"""

from configs import base, gpt_tiny

VARIANTS = {'3.2-1b': 'llama_3_2_1b', '2-7b': 'llama_2_7b'}
BATCH_TOKENS = 2**22  # 4M tokens per step


def get_config(size: str = '3.2-1b'):
  """4M tokens per step, AdamW, cosine to a tenth of the peak rate, FSDP over all devices.

  LLaMA 2 follows section 2.2 of its paper: 2 trillion tokens. LLaMA 3.2 1B follows the LLaMA 3
  paper for models of its size (section 3.2.1: peak rates of 2e-4 to 4e-4) and its model card
  (9 trillion tokens); what neither of them states is as in LLaMA 2. The released 1B model was
  pruned from a larger one and distilled; this recipe trains one from scratch.
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
  config.model = base.model('decoder', VARIANTS[size])
  config.objective = base.clm()
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule = 'cosine'
  config.optimizer.final_fraction = 0.1
  config.optimizer.warmup_fraction = base.unset(float)
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
  """LLaMA's architecture with the size and recipe of gpt_tiny: minutes on a laptop."""
  config = gpt_tiny.get_config()
  config.model = base.model('decoder', 'llama_tiny')
  return config
