"""Set a private user cache and a fixed number of threads for the tests and their child processes."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory(prefix="model-zhu-tests-")  # removed when the tests end
CACHE = Path(_folder.name)
os.environ["XDG_CACHE_HOME"] = _folder.name
# Code that torch compiles stays in torch's own folder, so that it is compiled once for all tests.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")))
# By default it depends on other processes, and the last bits of weights depend on it.
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
