"""What passes between the plug-ins: records, rows, batches and metrics."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

SOURCE = 'source_'  # before the names of the arrays of a second row, that an encoder reads
Record = Mapping[str, Any]  # what a source yields: field -> anything that JSON holds
Encoded = dict[str, Any]  # of one record: name -> integers [n], or anything else that JSON holds
Example = dict[str, np.ndarray]  # one row: batch keys without B
Batch = Mapping[str, Any]  # NumPy arrays on the host, jax's on devices
Number: TypeAlias = jax.Array | np.ndarray | float
Metrics = dict[str, tuple[Number, Number]]  # name -> (sum, weight); divided once, at the end
