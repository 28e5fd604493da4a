"""Loaded last by the server that ranks fork from: what is alive then no rank's garbage collector has to look at."""

import gc
from pathlib import Path

_threads = Path("/proc/self/task")
assert not _threads.is_dir() or len(list(_threads.iterdir())) == 1, (
    "a module that the server loads has started a thread"
)
gc.collect()
gc.freeze()
