"""Imported before numpy: one thread of linear algebra, unless the environment says otherwise.

The matrices are small, so that threads cost more than they bring; on a busy machine they wait for each other
and a round takes ten times as long.
"""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
