"""Malicious files through the commands that users type: their code never runs, nothing outside of them is read or
written, memory and time stay bounded, and each yields one error message. See helpers/hostile.py for how each is made.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from configs.utils.errors import run_main
from helpers.cifar_files import write_cifar10
from helpers.faults import forged
from helpers.hostile import (
    HDF5_IMAGES,
    IMAGES,
    SECRET,
    Touch,
    archive_of,
    cifar_with,
    claiming_archive,
    escaping_archive,
    hdf5_with,
    image_file,
    inflating_archive,
    inflating_images,
    linking_archive,
    many_tags_tiff,
    pickles,
)
from helpers.training import CLEAN, DIGITS
from tools import convert
from tools.sources import cifar

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


@dataclass
class Scene:
    """A folder for malicious files, and targets that they must not reach."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    secret: Path = field(init=False)  # outside of every source
    marker: Path = field(init=False)  # file that malicious code would create

    def __post_init__(self) -> None:
        self.marker = self.folder / "marker"
        self.secret = self.folder / "outside" / "secret"
        self.secret.parent.mkdir()
        self.secret.write_text(SECRET)

    def convert(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Run tools/convert.py in this process; return exit code, stdout and stderr."""
        self.capsys.readouterr()
        command = [*map(str, arguments), "--out", str(self.folder / "out"), "--workers", "1"]
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: convert.main(command))
        captured = self.capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    def check_refused(self, code: int, out: str, error: str) -> None:
        """Check for one error message and no harm."""
        assert (code, out) == (2, ""), error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        self.check_harmless(out, error)
        assert not (self.folder / "out" / "dataset.json").exists()

    def check_harmless(self, *texts: str) -> None:
        assert not self.marker.exists()
        assert not any(SECRET in text or "\x1b" in text for text in texts)
        for file in (self.folder / "out").rglob("*"):
            assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.fixture
def scene(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Scene]:
    made = Scene(tmp_path, capsys)
    yield made
    assert not made.marker.exists()


# Runs a command from a small process, since the peak of a child starts at its parent's size. Prints peak KiB, CPU s.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
open(sys.argv[1], "w").write(f"{usage.ru_maxrss} {usage.ru_utime + usage.ru_stime}")
sys.exit(code)
"""


def bounded(command: list[str], mib: int, seconds: float, folder: Path) -> tuple[int, str, str]:
    """Run a command in a new process and check its peak memory and CPU time."""
    usage = folder / "usage"
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, usage, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**CLEAN, "PYTHONPATH": str(ROOT)},
    )
    peak, spent = map(float, usage.read_text().split())
    assert peak / 1024 < mib
    assert spent < seconds
    return result.returncode, result.stdout, result.stderr


def script(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments), "--workers", "1"]


@pytest.mark.parametrize("name", pickles(Path("marker")))
def test_cifar_pickle_cannot_run_code_or_exhaust_memory(scene: Scene, name: str) -> None:
    source = cifar_with(scene.folder, pickles(scene.marker)[name])
    scene.check_refused(*scene.convert("cifar10", "--source", source))


def test_tiny_pickle_cannot_exhaust_memory_of_a_process(scene: Scene) -> None:
    source = cifar_with(scene.folder, pickles(scene.marker)["memo-of-4-billion"])
    command = script("cifar10", "--source", source, "--out", scene.folder / "out")
    scene.check_refused(*bounded(command, 200, 20, scene.folder))


def test_batch_file_that_is_a_link_elsewhere_is_not_read(scene: Scene) -> None:
    source = write_cifar10(scene.folder)
    scene.secret.write_text(f"I{SECRET}\n.")  # an error of pickle would show its first line
    (source / "data_batch_2").unlink()
    (source / "data_batch_2").symlink_to(scene.secret)
    code, out, error = scene.convert("cifar10", "--source", source)
    scene.check_refused(code, out, error)
    assert "leads out of its folder" in error


@pytest.mark.parametrize("prefix", ["../../", "/", "cifar-10-batches-py/../../../"])
def test_archive_names_cannot_leave_the_folder(scene: Scene, prefix: str) -> None:
    archive = escaping_archive(scene.folder / "x.tar.gz", write_cifar10(scene.folder / "made"), prefix)
    before = {*scene.folder.rglob("*"), *scene.folder.parent.iterdir()}
    code, _, error = scene.convert("cifar10", "--source", archive)
    assert code == 0, error
    after = {*scene.folder.rglob("*"), *scene.folder.parent.iterdir()}
    assert all(path.is_relative_to(scene.folder / "out") for path in after - before)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_only_regular_files_of_an_archive_are_batches(scene: Scene, kind: bytes) -> None:
    archive = linking_archive(scene.folder / "x.tar.gz", kind, scene.secret)
    code, out, error = scene.convert("cifar10", "--source", archive)
    scene.check_refused(code, out, error)
    assert "lacks data_batch_1" in error


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE])
def test_headers_that_claim_gigabytes_use_little_memory(scene: Scene, kind: bytes) -> None:
    archive = claiming_archive(scene.folder / "x.tar.gz", kind, 8 << 30)
    code, out, error = scene.convert("cifar10", "--source", archive)
    scene.check_refused(code, out, error)
    assert "is not a complete .tar.gz archive" in error


def test_endlessly_inflating_archive_is_abandoned_early(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 20 << 20)
    archive = inflating_archive(scene.folder / "x.tar.gz", 30)
    assert archive.stat().st_size < 100_000
    code, out, error = scene.convert("cifar10", "--source", archive)
    scene.check_refused(code, out, error)
    assert "it inflates to more than 20,971,520 bytes" in error


def test_nested_chain_of_long_names_ends(scene: Scene) -> None:
    members = {tarfile.TarInfo("x" * 101): b"" for _ in range(3000)}
    archive = archive_of(scene.folder / "x.tar.gz", members)
    scene.check_refused(*scene.convert("cifar10", "--source", archive))


@pytest.mark.parametrize("name", HDF5_IMAGES)
def test_hdf5_images_outside_the_file_or_too_large_are_refused(scene: Scene, name: str) -> None:
    source = hdf5_with(scene.folder / "x.hdf5", HDF5_IMAGES[name], scene.secret)
    scene.check_refused(*scene.convert("hdf5", "--source", source))


def test_chunk_that_inflates_to_gigabytes_stays_within_bounds(scene: Scene) -> None:
    source = hdf5_with(scene.folder / "x.hdf5", inflating_images, scene.secret)
    command = script("hdf5", "--source", source, "--out", scene.folder / "out")
    scene.check_refused(*bounded(command, 600, 20, scene.folder))


def test_hdf5_loads_no_plugin(scene: Scene) -> None:
    """No plugin is loaded even if the environment names a folder with plugins."""
    source = hdf5_with(scene.folder / "x.hdf5", HDF5_IMAGES["own_filter"], scene.secret)
    code = (
        "import sys, h5py; from pathlib import Path; from configs.utils.errors import UserError\n"
        "from tools.sources.hdf5 import open_hdf5\n"
        "try: open_hdf5(Path(sys.argv[1]), None, 1000)\n"
        "except UserError as error: print(h5py.h5pl.size(), error)"
    )
    environment = {**CLEAN, "PYTHONPATH": str(ROOT), "HDF5_PLUGIN_PATH": str(scene.folder)}
    result = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, env=environment)
    assert result.stdout.startswith("0 "), result.stderr
    assert "filter 32015, which is not read here" in result.stdout


def photos(folder: Path) -> Path:
    """Write a small image folder for further files."""
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_file("JPEG"))
    return folder


@pytest.mark.parametrize("place", ["train/cat/2.jpg", "train/bird", "test", "train/cat/notes.txt"])
def test_links_out_of_an_image_folder_are_refused(scene: Scene, place: str) -> None:
    source = photos(scene.folder / "photos")
    target = scene.secret if "." in place else scene.secret.parent
    (target.parent / "secret.jpg").write_text(SECRET)
    (source / place).symlink_to(target)
    code, out, error = scene.convert("imagefolder", "--source", source)
    scene.check_refused(code, out, error)
    assert "leads out of the source folder" in error


@pytest.mark.parametrize("target", ["nothing", "2.jpg"])
def test_broken_and_circular_links_are_skipped(scene: Scene, target: str) -> None:
    source = photos(scene.folder / "photos")
    (source / "train/cat/2.jpg").symlink_to(target)
    code, out, error = scene.convert("imagefolder", "--source", source)
    assert code == 0, error
    assert "skipped 1 entry: 1 .jpg, link that leads nowhere (train/cat/2.jpg)" in error
    assert "train: 2 samples" in out


def test_pipes_sockets_and_devices_are_skipped_without_waiting(scene: Scene) -> None:
    source = photos(scene.folder / "photos")
    os.mkfifo(source / "train/cat/pipe.jpg")
    if os.geteuid() == 0:
        os.mknod(source / "train/cat/zero.jpg", 0o020666, os.makedev(1, 5))
    code, out, error = scene.convert("imagefolder", "--source", source)
    assert code == 0, error
    assert ".jpg, not a regular file (train/cat/pipe.jpg" in error
    assert "train: 2 samples" in out


def test_file_replaced_by_a_pipe_does_not_block(scene: Scene) -> None:
    from configs.utils.errors import UserError
    from tools.sources.imagefolder import open_imagefolder

    source = photos(scene.folder / "photos")
    rows = open_imagefolder(source).splits["train"]
    (source / "train/cat/1.jpg").unlink()
    os.mkfifo(source / "train/cat/1.jpg")
    with pytest.raises(UserError, match="changed while it was converted"):
        list(rows.read(0, 1))


def test_oversized_image_file_is_refused_before_converting(scene: Scene) -> None:
    source = photos(scene.folder / "photos")
    with (source / "train/cat/2.jpg").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    code, out, error = scene.convert("imagefolder", "--source", source)
    scene.check_refused(code, out, error)
    assert "2.jpg has 1,099,511,627,776 bytes" in error


def test_decompression_bombs_are_quarantined_within_memory_bounds(scene: Scene) -> None:
    source = photos(scene.folder / "photos")
    bombs = [name for name in IMAGES if not name.endswith(".svg")]
    for name in bombs:
        (source / "train/cat" / f"x-{name}").write_bytes(IMAGES[name]())
    (source / "train/cat/tags.tif").write_bytes(many_tags_tiff())
    command = script("imagefolder", "--source", source, "--max-pixels", "5000000", "--out", scene.folder / "out")
    code, out, error = bounded(command, 1000, 60, scene.folder)
    assert code == 0, error
    dataset = json.loads((scene.folder / "out/dataset.json").read_text())
    train = dataset["splits"]["train"]
    quarantined = {Path(entry["name"]).name: entry["reason"] for entry in train["quarantined"]}
    assert {f"x-{name}" for name in bombs} - {"x-text.png", "x-profile.png"} <= quarantined.keys(), quarantined
    assert train["samples"] + len(quarantined) == train["source_rows"] == len(bombs) + 3
    assert "65000 x 65000 pixels exceed the limit" in quarantined["x-claims.jpg"]
    assert "scans" in quarantined["x-scans.jpg"]
    assert all("\n" not in reason and len(reason) < 300 for reason in quarantined.values())
    scene.check_harmless(out, error)


def test_control_characters_in_names_do_not_reach_the_terminal(scene: Scene) -> None:
    source = photos(scene.folder / "photos\x1b[31m")
    for name in (b"red\x1b[31m\n.jpg", b"\xff\xfe.jpg", b"\xc2\x9b31m.jpg", "\u202egpj.jpg".encode(), b"\x1b.txt"):
        Path(os.fsdecode(os.fsencode(source / "train/cat") + b"/" + name)).write_bytes(b"garbage")
    code, out, error = scene.convert("imagefolder", "--source", source, "--name", "x")
    assert code == 0, error
    assert "red\\x1b[31m\\n.jpg" in out
    scene.check_harmless(out, error)
    assert not set("\x9b\u202e") & set(out + error)
    code, out, error = scene.convert("imagefolder", "--source", source, "--name", "x", "--strict")
    scene.check_harmless(out, error)
    assert code == 2
    assert error.count("\n") == 2, error  # the note of skipped entries, and the error


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\x9b2J", "\u202e"])
def test_class_names_with_control_characters_are_refused(scene: Scene, name: str) -> None:
    source = photos(scene.folder / "photos")
    for split in ("train", "val"):
        (source / split / name).mkdir()
        (source / split / name / "1.jpg").write_bytes(image_file("JPEG"))
    code, out, error = scene.convert("imagefolder", "--source", source)
    scene.check_refused(code, out, error)
    assert "control characters" in error
    with h5py.File(scene.folder / "x.hdf5", "w") as file:
        file["images-train"], file["labels-train"] = np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, int)
    (scene.folder / "classes.txt").write_text(name.replace("\n", "\x00"))
    scene.check_refused(
        *scene.convert("hdf5", "--source", scene.folder / "x.hdf5", "--classes", scene.folder / "classes.txt")
    )


CONFIGS = {
    "python-tag": "seed: !!python/object/apply:os.system ['touch MARKER']",
    "python-name": "seed: !!python/name:os.system",
    "python-module": "output: !!python/module:os",
    "own-tag": "seed: !touch MARKER",
    "binary": "output: !!binary c2VjcmV0",
    "aliases": "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]",
    "merge": "x: &x {seed: 1}\ndata: {<<: *x}",
    "deep": "model: {options: {a: " + "[" * 50_000 + "]" * 50_000 + "}}",
    "deep-text": "model: " + "{a: " * 5_000,
    "quadratic": "seed: (1" + " " * 100_000 + "x",
    "megabytes": "# " + "x" * 3_000_000,
    "huge-number": "train: {epochs: " + "9" * 4_000 + "}",
    "huge-power": "train: {lr: 1e999999999}",
    "many-digits": "seed: " + "9" * 100_000,
    "escape": 'name: "\\e[31mred"',
    "escape-in-a-key": '"\\e[31m": 1',
    "8-bit-escape": '"\\x9b31m": 1',
    "name-leads-out": "name: ../../x",
    "base-outside": "base: ../outside/secret.yaml",
    "base-absolute": "base: SECRET.yaml",
    "base-of-another-kind": "base: SECRET",
    "base-through-a-link": "base: link.yaml",
    "base-is-a-pipe": "base: pipe.yaml",
    "base-is-a-folder": "base: folder.yaml",
    "base-is-a-device": "base: /dev/zero",
    "bases-of-bases": "base: [many0.yaml, many0.yaml]",
    "data-in-a-device": "data: {path: /dev/zero}",
    "weights-in-a-device": "model: {name: lenet, pretrained: /dev/zero}",
    "weights-in-a-pipe": "model: {name: lenet, pretrained: pipe.yaml}",
    "weights-in-options": "model: {name: timm/resnet18, options: {checkpoint_path: SECRET}}",
    "model-of-the-hub": "model: {name: 'timm/hf-hub:somebody/else'}",
    "model-of-a-folder": "model: {name: 'timm/local-dir:SECRET'}",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_config_runs_code_reads_other_files_or_hangs(
    scene: Scene, name: str, call: Call, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scene.folder / "configs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    scene.secret.with_suffix(".yaml").write_text(f"{SECRET}: {SECRET}\n")
    (folder / "link.yaml").symlink_to(scene.secret.with_suffix(".yaml"))
    os.mkfifo(folder / "pipe.yaml")
    (folder / "folder.yaml").mkdir()
    for number in range(12):
        (folder / f"many{number}.yaml").write_text(f"base: [many{number + 1}.yaml, many{number + 1}.yaml]")
    text = CONFIGS[name].replace("MARKER", str(scene.marker)).replace("SECRET", str(scene.secret))
    sections = {"data": f"data: {{path: {npy_data}}}", "model": "model: {name: lenet}"}
    given = "".join(f"{line}\n" for key, line in sections.items() if not text.startswith(f"{key}:"))
    (folder / "run.yaml").write_text(given + text)
    code, out, error = call("--cfg", folder / "run.yaml", "--output", scene.folder / "output")
    scene.check_refused(code, out, error)


def checkpoints(scene: Scene) -> dict[str, bytes]:
    """Pickles in place of tensors: plain, saved by torch, and with the end of a checkpoint of ours."""
    plain = pickle.dumps({"format": 1, "model": Touch(scene.marker)}, protocol=2)
    file = scene.folder / "made.pt"
    torch.save({"format": 1, "stream": {}, "model": Touch(scene.marker)}, file)
    saved = file.read_bytes()
    file.unlink()
    return {
        "plain": plain,
        "saved": saved,
        **{f"{name}-sealed": forged(content) for name, content in (("plain", plain), ("saved", saved))},
    }


@pytest.mark.parametrize("name", ["plain", "saved", "plain-sealed", "saved-sealed"])
@pytest.mark.parametrize("option", ["--resume", "model.finetune", "model.pretrained"])
def test_no_file_of_weights_runs_code(scene: Scene, name: str, option: str, call: Call, npy_data: Path) -> None:
    evil = scene.folder / "evil.pt"
    evil.write_bytes(checkpoints(scene)[name])
    arguments: list[Any] = ["--cfg", DIGITS, "--data-path", npy_data, "--output", scene.folder / "output"]
    arguments += [option, evil] if option.startswith("--") else ["--opts", f"{option}={evil}"]
    scene.check_refused(*call(*arguments))
