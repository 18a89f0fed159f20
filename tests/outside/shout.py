"""A mode: tags words with the run in the workdir, and says it loudly."""

from absl import flags

from llm_jax.modes._command import Command

WORDS = flags.DEFINE_string('words', None, 'outside.shout: words to tag.')
WORKDIR = 'always'


def run(command: Command) -> None:
  """Prints each word with its tag."""
  command.require('words="twenty two"')
  words = WORDS.value.split()
  (answer,) = command.session().predict([{'words': words}])
  tagged = zip(words, answer['tags'], strict=True)
  print(' '.join(f'{word}/{tag}' for word, tag in tagged).upper() + '!')
