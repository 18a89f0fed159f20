"""The plug-ins can be imported as `outside.<name>`, here and in processes that tests start."""

import pathlib
import sys

FOLDER = str(pathlib.Path(__file__).parents[1])

if FOLDER not in sys.path:
  sys.path.append(FOLDER)
