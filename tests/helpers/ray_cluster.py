"""A Ray cluster of several nodes on this machine, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NODES = 3
OBJECT_STORE_BYTES = 80 << 20  # about the minimum
CPUS = 1  # per node


class RayCluster:
    """A cluster for tests. It ends with this process, or when it is closed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.nodes = NODES
        self.address = self._answer()

    def kill_node(self) -> None:
        """Kill the node that was added last, with its workers."""
        self._ask("kill")
        self.nodes -= 1

    def add_node(self) -> None:
        self._ask("add")
        self.nodes += 1

    def restore(self) -> None:
        """Add nodes in place of those that were killed."""
        while self.nodes < NODES:
            self.add_node()

    def options(self) -> list[str]:
        """Return the options by which a command uses this cluster."""
        return ["--engine", "ray", "--address", self.address]

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        """Return the next answer. Ray prints other lines to stdout too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return line.split()[1]
        raise AssertionError("the cluster did not start")


def serve() -> None:
    """Start a cluster, and obey the commands on stdin until it is closed."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": CPUS, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        others = [cluster.add_node(**options) for _ in range(NODES - 1)]
        print(f"answer: {cluster.address}", flush=True)
        for line in sys.stdin:
            if line == "kill\n":
                cluster.remove_node(others.pop(), allow_graceful=False)
            else:
                others.append(cluster.add_node(**options))
            print(f"answer: {len(others)}", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    serve()
