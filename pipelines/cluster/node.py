"""What runs on the nodes of a cluster: every task first checks that its node has the same code and files."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from configs.utils.errors import UserError

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "models", "pipelines", "train", "tools")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Requirements:
    """What a node must have in common with the process that submits the tasks."""

    token: Path  # file in a folder that all nodes must share
    content: str  # of the token
    current: str  # current folder, to which paths may be relative
    versions: tuple[tuple[str, str], ...]  # of this project and of the libraries that determine results


def installed_versions(libraries: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return a hash of this project's modules and the versions of the libraries."""
    digest = hashlib.sha256()
    for file in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT)}\0".encode())
        digest.update(file.read_bytes())
    versions = [("this project", digest.hexdigest()[:12])]
    for library in libraries:
        try:
            versions.append((library, version(library)))
        except PackageNotFoundError:
            versions.append((library, "none"))
    return tuple(versions)


def call(requirements: Requirements, function: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
    """Call a function on a node that meets the requirements.

    Raises:
        UserError: The node does not meet them.
    """
    check_node(requirements)
    return function(*arguments)


@cache  # once per worker process
def check_node(requirements: Requirements) -> None:
    """Raise UserError if this node has other code, or does not share the folder. Change to the current folder."""
    node = f"node {socket.gethostname()}"
    ours = installed_versions(tuple(name for name, _ in requirements.versions[1:]))
    for (name, wanted), (_, found) in zip(requirements.versions, ours, strict=True):
        if found != wanted:
            raise UserError(
                f"{node} has another version of {name} ({found}, here {wanted}), which may give other results; install "
                "the same on all nodes, or start Ray on them from the same environment"
            )
    try:
        os.chdir(requirements.current)
    except OSError as error:
        raise UserError(
            f"{node} cannot enter the current folder {requirements.current} ({error.strerror}); start in a folder on a "
            "file system that all nodes share"
        ) from None
    try:
        content = requirements.token.read_text(encoding="utf-8")
    except OSError:
        content = ""
    if content != requirements.content:
        raise UserError(
            f"{node} does not see the files in {requirements.token.parent}; use a folder on a file system that all "
            "nodes share under the same path"
        )
