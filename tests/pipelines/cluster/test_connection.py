"""Connecting to a cluster, without one."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from configs.utils.errors import UserError
from pipelines.cluster.connection import Cluster, Task, connect


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:1",
            r"no Ray cluster can be reached at 127.0.0.1:1 \(Connection refused\); start one with `ray start",
        ),
        ("ray://127.0.0.1:10001", "--address ray://127.0.0.1:10001 is not of the form HOST:PORT"),
        ("local", "--address local is not of the form HOST:PORT"),
    ],
)
def test_unreachable_address_is_refused_at_once(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=message), connect(address):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=message), connect(None):
        pass


def test_missing_ray_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(UserError, match="needs the package ray, which is not installed; run: pip install ray"),
        connect(None),
    ):
        pass


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), SystemExit(143), None])
def test_signal_in_the_code_of_ray_is_raised_as_such(cause: BaseException | None) -> None:
    error = SystemError("returned a result with an exception set")
    error.__cause__ = cause

    def fail(*_: object, **__: object) -> object:
        raise error

    ray = ModuleType("ray")
    ray.get = ray.wait = fail  # type: ignore[attr-defined]
    task: Task[Any] = Task("reference")  # type: ignore[arg-type]
    for call in (lambda: Cluster(ray).result(task), lambda: Cluster(ray).finished([task], 1.0)):
        with pytest.raises(type(cause or error)) as raised:
            call()
        assert raised.value is (cause or error)
