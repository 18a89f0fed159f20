"""Roles in events: which words are what to the predicate, one word of the text that is given? Here,
in the lines of Python's library that define or import something, to the name that comes first.

`--config.init_from=FOLDER` starts from pretrained weights. For another corpus:
`--config.data.source=jsonl --config.data.path=FILE --config.data.text=
"--config.data.fields=('words','tags','predicate')"`, a record for each predicate.
"""

from configs import tag


def get_config():
  """A few hundred steps on labelled lines, from the weights of `init_from` or from scratch."""
  config = tag.get_config()
  config.data.view = 'roles'
  config.objective.predicate = True
  return config
