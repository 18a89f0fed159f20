"""The page at /: for a look at what the models answer, from any browser.

It is one file, page.html, which loads nothing but the answers of this service. The policy in its
headers allows its own script and style, by their hashes, and nothing else.
"""

import base64
import hashlib
import importlib.resources
import re

TEXT = importlib.resources.files(__package__).joinpath('page.html').read_text('utf-8')


def _hash(tag: str) -> str:
  """What names the text of the only element of this kind in a Content-Security-Policy."""
  (text,) = re.findall(f'<{tag}>(.*?)</{tag}>', TEXT, re.DOTALL)
  return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {
  'Content-Security-Policy': (
    f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  'Cache-Control': 'no-cache',
  'Referrer-Policy': 'no-referrer',
  'X-Content-Type-Options': 'nosniff',
}
