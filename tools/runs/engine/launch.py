"""Execute a command in this process, which receives SIGTERM when its parent ends: launch.py PARENT_PID COMMAND …

A function that runs between fork and exec would do the same, but is unsafe in a process with threads, such as a worker
of Ray.
"""

from __future__ import annotations

import os
import signal
import sys

from configs.utils.process import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM, int(sys.argv[1]))  # torchrun forwards it to its processes
    os.execv(sys.argv[2], sys.argv[2:])
