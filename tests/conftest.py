"""What holds for every test: one thread per worker, and hypothesis that repeats itself."""

from __future__ import annotations

import os

from hypothesis import settings

# Before anything imports torch: two workers with a thread per core each would fight for the same cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A first call into torch takes longer than any deadline, and a failure must come back on the next run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
