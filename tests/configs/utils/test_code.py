"""Own code: functions and classes that settings name as path/to/file.py:NAME or package.module:NAME."""

from __future__ import annotations

import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from configs.utils.code import is_reference, load_object, source_file
from configs.utils.errors import UserError


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, and restore the modules and the import path afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("net.py:Net", True),
        ("/a/b c/net.py:Net", True),
        ("../net.py:build", True),
        ("package.module:Net", True),
        ("lenet", False),
        ("net.py", False),
        ("net.py:", False),
        ("net.py:a.b", False),
        ("timm/resnet18.a1_in1k", False),
        ("timm/hf-hub:timm/resnet18", False),
        (":Net", False),
        ("a..b:Net", False),
    ],
)
def test_references_are_told_from_names(text: str, expected: bool) -> None:
    assert is_reference(text) is expected


def test_file_can_import_neighbors_and_define_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "neighbor_of_a.py").write_text("value = 5\n")
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbor_of_a import value\n"
        "@dataclass\nclass A:\n    size: int = value\n"
    )
    (tmp_path / "code" / "a.py").write_text(text)
    found = load_object("code/a.py:A", "model.name")
    assert is_dataclass(found)
    assert found().size == 5


def test_file_is_executed_again_only_after_a_change(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f(): return 1\n")
    first = load_object("a.py:f", "train.loss")
    assert load_object(f"{file}:f", "train.loss") is first
    file.write_text("def f(): return 2\n")
    second = load_object("a.py:f", "train.loss")
    assert (first(), second()) == (1, 2)


def test_module_is_found_in_the_working_directory_and_in_packages(tmp_path: Path) -> None:
    (tmp_path / "own_module_b.py").write_text("def f(): return 3\n")
    assert load_object("own_module_b:f", "train.loss")() == 3
    assert load_object("torch.nn:Linear", "train.loss").__name__ == "Linear"
    assert source_file("own_module_b:f") == tmp_path / "own_module_b.py"
    assert source_file("no_such_module.a:f") is None
    assert source_file("sys:exit") is None
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise RuntimeError\n")
    assert source_file("broken_package.a:f") is None


def test_file_of_the_user_does_not_hide_a_package(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise RuntimeError\n")
    (tmp_path / "a.py").write_text("import yaml\nload = yaml.safe_load\n")
    assert load_object("a.py:load", "train.loss")("3") == 3


@pytest.mark.parametrize(
    ("text", "reference", "message"),
    [
        (None, "a.py:f", r"train\.loss=a\.py:f: cannot read a\.py \(No such file or directory\); give path/to/"),
        (None, "no_such_m.b:f", r"ModuleNotFoundError: No module named 'no_such_m'; install the module"),
        ("import no_such_m", "a.py:f", r"No module named 'no_such_m' \(.*a\.py, line 1\); install the module"),
        ("def f(:\n", "a.py:f", r"importing a\.py failed: SyntaxError: .*\(.*a\.py, line 1\)"),
        ("\nx = 1 / 0\n", "a.py:f", r"importing a\.py failed: ZeroDivisionError: division by zero \(.*a\.py, line 2\)"),
        ("def focal(): 0\n", "a.py:focl", r"has nothing named focl; did you mean focal\? it defines focal$"),
        ("from json import loads\nf = 3\n", "a.py:f", r"cannot call f; it defines nothing$"),
    ],
)  # fmt: skip
def test_bad_references_are_explained(tmp_path: Path, text: str | None, reference: str, message: str) -> None:
    if text is not None:
        (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_object(reference, "train.loss")


@pytest.mark.parametrize("reference", ["torch.hub:load", "subprocess:run", "builtins:exec", "os:system"])
def test_code_of_python_and_downloads_are_refused(reference: str) -> None:
    with pytest.raises(UserError, match="name own code"):
        load_object(reference, "model.name")


def test_installed_packages_are_named_as_modules_not_as_files(tmp_path: Path) -> None:
    import torch.nn.functional

    assert load_object("torch.nn.functional:cross_entropy", "train.loss") is torch.nn.functional.cross_entropy
    with pytest.raises(UserError, match="name own code"):
        load_object(f"{torch.hub.__file__}:load", "model.name")
