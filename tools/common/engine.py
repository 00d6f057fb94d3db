"""The options --engine and --address, by which a command does its work on a Ray cluster."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from configs.utils.errors import UserError

if TYPE_CHECKING:
    from pipelines.cluster.connection import Cluster


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="local: this machine; ray: all machines of a Ray cluster, which share the folders (default: %(default)s)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: $RAY_ADDRESS, or the cluster that this machine belongs to)",
    )


def open_cluster(arguments: argparse.Namespace) -> AbstractContextManager[Cluster | None]:
    """Connect to the cluster that the arguments name. The context is None with --engine local.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    if arguments.engine == "local":
        if arguments.address is not None:
            raise UserError(f"--address {arguments.address} belongs to --engine ray; add it, or omit --address")
        return nullcontext()
    from pipelines.cluster.connection import connect

    return connect(arguments.address)
