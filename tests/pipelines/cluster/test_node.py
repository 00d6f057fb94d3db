"""What a node must have in common with the process that submits tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.utils.errors import UserError
from pipelines.cluster.node import Requirements, call, check_node, installed_versions


@pytest.fixture
def requirements(tmp_path: Path) -> Iterator[Requirements]:
    before = os.getcwd()
    (tmp_path / "token").write_text("abc")
    yield Requirements(tmp_path / "token", "abc", str(tmp_path), installed_versions(("numpy", "no-such-package")))
    check_node.cache_clear()
    os.chdir(before)


def test_task_runs_in_the_current_folder_of_the_submitter(requirements: Requirements, tmp_path: Path) -> None:
    assert call(requirements, os.path.abspath, ("x",)) == str(tmp_path / "x")


@pytest.mark.parametrize("content", [None, "of an earlier run"])
def test_folder_that_is_not_shared_is_named(requirements: Requirements, content: str | None) -> None:
    requirements.token.unlink()
    if content is not None:
        requirements.token.write_text(content)
    with pytest.raises(UserError, match=f"node .* does not see the files in {requirements.token.parent}; use a folder"):
        call(requirements, os.getcwd, ())


def test_missing_current_folder_is_named(requirements: Requirements) -> None:
    with pytest.raises(UserError, match=r"cannot enter the current folder /nowhere \(No such file or directory\)"):
        check_node(replace(requirements, current="/nowhere"))


def test_other_code_and_other_libraries_are_named(requirements: Requirements) -> None:
    project, *libraries = requirements.versions
    with pytest.raises(UserError, match=r"another version of this project \(\w{12}, here 0123\), which may give other"):
        check_node(replace(requirements, versions=(("this project", "0123"), *libraries)))
    with pytest.raises(UserError, match=r"another version of numpy \([\d.]+, here 1.0\)"):
        check_node(replace(requirements, versions=(project, ("numpy", "1.0"))))
    assert libraries[1] == ("no-such-package", "none")


def test_hash_covers_every_module_of_the_project() -> None:
    from pipelines.cluster import node

    assert {package.name for package in node.ROOT.iterdir() if (package / "__init__.py").exists()} == {*node.PACKAGES}
