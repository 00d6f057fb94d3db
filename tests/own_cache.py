"""Importing it gives the tests, and the processes that they start, a user's cache of their own, not the real one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory(prefix="model-zhu-tests-")  # removed when the tests end
CACHE = Path(_folder.name)
os.environ["XDG_CACHE_HOME"] = _folder.name
