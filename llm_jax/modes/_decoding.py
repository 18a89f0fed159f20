"""How tokens of new text are chosen: the flags of all modes that write."""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
  from llm_jax.generation.sampling import Sampling

flags.DEFINE_integer(
  'max_new_tokens', 128, 'generate, predict, chat: the most tokens that come after a prompt.'
)
flags.DEFINE_float(
  'temperature',
  None,
  'generate, predict, chat: how freely is drawn; 0, the default of predict, takes the most likely '
  'token; 1 is the default of the others.',
)
flags.DEFINE_integer(
  'top_k', 0, 'generate, predict, chat: only the most likely K tokens are drawn; 0 for all.'
)
flags.DEFINE_float(
  'top_p',
  1.0,
  'generate, predict, chat: only the most likely tokens of this probability together are drawn.',
)
flags.DEFINE_float(
  'min_p',
  0.0,
  'generate, predict, chat: only tokens at least this many times as likely as the most likely are '
  'drawn.',
)
flags.DEFINE_float(
  'repetition_penalty',
  1.0,
  'generate, predict, chat: above 1, tokens that stand in the text already become less likely.',
)
flags.DEFINE_integer(
  'no_repeat_ngram_size',
  0,
  'generate, predict, chat: no sequence of so many tokens comes twice in a text; 0: any may.',
)
flags.DEFINE_integer('min_new_tokens', 0, 'generate, predict, chat: no text ends before so many.')
flags.DEFINE_integer(
  'forced_bos',
  None,
  'generate, predict, chat: the id of the first new token, that of a language, say; by default '
  'what the model says.',
)
flags.DEFINE_integer(
  'forced_eos',
  None,
  'generate, predict, chat: the id of the last new token of a text that is as long as it may be; '
  'by default what the model says.',
)
flags.DEFINE_integer(
  'beams', 1, 'generate, predict, chat: beam search with so many beams; needs --temperature=0.'
)
flags.DEFINE_float(
  'length_penalty', 1.0, 'generate, predict, chat: of beam search; above 1 favours long texts.'
)
flags.DEFINE_integer(
  'num_return_sequences',
  1,
  'generate, predict, chat: how many texts a prompt gets: the best beams, or as many draws.',
)
flags.DEFINE_integer(
  'seed', 0, 'generate, predict, chat, augment: the same seed draws the same text.'
)


def sampling(temperature: float) -> 'Sampling':
  """What the flags say; `temperature`: where they do not say it.

  Raises:
    ValueError: a number that is not possible, or changes nothing beside the others.
  """
  from llm_jax.generation.sampling import Sampling

  numbers = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Sampling)}
  if numbers['temperature'] is None:
    numbers['temperature'] = temperature
  return Sampling(**numbers)
