"""Data sets written from Python with `write_dataset`."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.schema import DataConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines import build_eval_loader, write_dataset
from pipelines.storage.dataset import load_dataset
from pipelines.storage.verify import verify


def pixels(row: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (size, size, 3), np.uint8)


def as_tensor(row: int) -> torch.Tensor:
    return torch.from_numpy(pixels(row)).permute(2, 0, 1)


def stored(folder: Path, split: str = "val") -> tuple[np.ndarray, list[int]]:
    """Return the stored images of a split, uint8 [N, H, W, 3], and their labels."""
    loader = build_eval_loader(DataConfig(path=str(folder), batch_size=64), split=split, device="cpu")
    batches = [(batch.images.permute(0, 2, 3, 1).numpy().copy(), batch.labels.tolist()) for batch in loader]
    return np.concatenate([images for images, _ in batches]), [label for _, labels in batches for label in labels]


class Images(Dataset[tuple[torch.Tensor, int]]):
    """A torch data set that raises no IndexError."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return as_tensor(row), row % 3


class Stream:
    """Items that can only be iterated over; counts how often this is done."""

    def __init__(self, count: int, length: int | None = None) -> None:
        self.count, self.length, self.passes = count, count if length is None else length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        self.passes += 1
        return ((pixels(row), row % 3) for row in range(self.count))


@pytest.mark.parametrize("items", [Images(70), Stream(70), [(pixels(row), row % 3) for row in range(70)]],
                         ids=["dataset", "iterable", "list"])  # fmt: skip
def test_data_sets_iterables_and_lists_are_stored_in_order(tmp_path: Path, items: Images) -> None:
    info = write_dataset(tmp_path / "mine", {"train": items, "val": items}, encoding="npy")
    images, labels = stored(tmp_path / "mine")
    np.testing.assert_array_equal(images, [pixels(row) for row in range(70)])
    assert labels == [row % 3 for row in range(70)]
    assert (info.name, info.classes, info.image_shape) == ("mine", ("0", "1", "2"), (8, 8, 3))
    assert (info.splits["train"].samples, info.splits["train"].shuffled) == (70, True)
    assert verify(tmp_path / "mine") == []


def test_all_kinds_of_images_are_understood(tmp_path: Path) -> None:
    rgb, file = pixels(0), tmp_path / "a.png"
    grey = rgb[..., 0]
    Image.fromarray(rgb).save(file)
    colored = [rgb, as_tensor(0), Image.fromarray(rgb), Image.fromarray(rgb).convert("RGBA"), file, str(file)]
    greys = [grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)]
    labels = [0, np.int64(1), torch.tensor(2), np.uint8(3), torch.tensor(4), 5, 6, 7, 8, 9, 10]
    items = [*zip([*colored, *greys], labels, strict=True)]
    write_dataset(tmp_path / "out", {"val": items}, encoding="npy")
    images, found = stored(tmp_path / "out")
    np.testing.assert_array_equal(images, [rgb] * len(colored) + [np.repeat(grey[..., None], 3, 2)] * len(greys))
    assert found == [*range(11)]


def test_jpeg_files_are_stored_as_they_are_and_sizes_may_differ(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.fromarray(pixels(0, 20)).save(file)
    write_dataset(tmp_path / "out", {"val": [(file, 0), (pixels(1, 12), 1)]}, classes=["cat", "dog"])
    dataset = load_dataset(str(tmp_path / "out"))
    assert (dataset.classes, dataset.encoding, dataset.image_shape) == (("cat", "dog"), "jpeg", None)
    assert file.read_bytes() in (tmp_path / "out" / dataset.splits["val"].shards[0].file).read_bytes()


def test_images_are_resized(tmp_path: Path) -> None:
    info = write_dataset(tmp_path / "out", {"val": [(pixels(0, 16), 0)]}, encoding="npy", size=8)
    assert info.image_shape == (8, 8, 3)


def test_second_call_has_nothing_to_do_and_other_items_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [(pixels(row), 0) for row in range(3)]
    first = write_dataset(tmp_path, {"val": items})
    capsys.readouterr()
    assert write_dataset(tmp_path, {"val": items}) == first
    assert "already contains this data set: nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="converted from another source"):
        write_dataset(tmp_path, {"val": [(pixels(5), 0), *items[1:]]})


def test_large_data_sets_are_not_held_in_memory(tmp_path: Path) -> None:
    class Large(Images):
        def __getitem__(self, row: int) -> tuple[np.ndarray, int]:  # type: ignore[override]
            return np.full((512, 512, 3), row, np.uint8), 0  # 0.75 MiB

    tracemalloc.start()
    write_dataset(tmp_path / "out", {"val": Large(200)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20


def test_workers_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.convert.writer.SMALL_SOURCE", 1)
    items = [(pixels(row), row % 3) for row in range(600)]
    for workers in (1, 2):
        write_dataset(tmp_path / str(workers) / "mine", {"train": items}, encoding="npy", workers=workers)
    one, two = ([file.read_bytes() for file in sorted((tmp_path / count / "mine").iterdir())] for count in "12")
    assert one == two


FLOAT = torch.zeros(3, 8, 8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (pixels(0), r"splits\['val'\]\[1\] is a ndarray, but must be a pair \(image, label\)"),
        ((pixels(0), 1, 2), r"splits\['val'\]\[1\] is a tuple of 3, but must be a pair"),
        ({"image": pixels(0), "label": 1}, r"\[1\] is a dict, but must be a pair"),
        ((FLOAT, 1), r"image of splits\['val'\]\[1\] is a tensor float32 \[3, 8, 8\], .*\(255 \* image\)\.round\(\)"),
        ((pixels(0).transpose(2, 0, 1), 1), r"is an array uint8 \[3, 8, 8\], but must be .*; arrays have the channels"),
        ((torch.from_numpy(pixels(0)), 1), r"is a tensor uint8 \[8, 8, 3\], but must be .* and tensors first"),
        ((np.zeros((8, 8, 4), np.uint8), 1), r"array uint8 \[8, 8, 4\]"),
        ((np.zeros((0, 8, 3), np.uint8), 1), r"array uint8 \[0, 8, 3\]"),
        (([[1, 2]], 1), r"the image of splits\['val'\]\[1\] is a list, but must be a PIL image, a NumPy array"),
        ((Image.new("I", (8, 8)), 1), r"splits\['val'\]\[1\] is a PIL image of mode 'I', whose range is unknown"),
        (("missing.png", 1), r"missing\.png cannot be read \(No such file or directory\)"),
        ((pixels(0), "cat"), r"the label of splits\['val'\]\[1\] is 'cat' \(str\), but must be an integer from 0 to 1"),
        ((pixels(0), 2), r"is 2 \(int\), but must be an integer from 0 to 1, one per class"),
        ((pixels(0), -1), r"is -1 \(int\)"),
        ((pixels(0), 1.0), r"is 1\.0 \(float\)"),
        ((pixels(0), True), r"is True \(bool\)"),
        ((pixels(0), torch.tensor([1, 0])), r"is tensor\(\[1, 0\]\) \(Tensor\)"),
    ],
)  # fmt: skip
def test_wrong_items_are_explained_before_anything_is_written(tmp_path: Path, item: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "out", {"val": [(pixels(0), 0), item]}, classes=["cat", "dog"])
    assert not (tmp_path / "out").exists()


def test_wrong_collections_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"splits\['val'\] is a generator without a length; use a list, or a class"):
        write_dataset(tmp_path / "out", {"val": (pair for pair in [(pixels(0), 0)])})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"splits\['val'\] ended after 3 items, but its length is 5"):
        write_dataset(tmp_path / "out", {"val": Stream(3, length=5)})
    with pytest.raises(UserError, match=r"workers=2 needs items that can be indexed"):
        write_dataset(tmp_path / "out", {"val": Stream(3)}, workers=2)
    with pytest.raises(UserError, match=r"split 'val' of out has no rows; remove the split or fill it"):
        write_dataset(tmp_path / "out", {"train": Stream(3), "val": []})


def test_splits_that_training_does_not_find_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [(pixels(0), 0)]
    with pytest.raises(UserError, match=r"splits is a list, but must be a dict .*\"train\": train_items"):
        write_dataset(tmp_path / "out", items)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"splits has 'Training'; name this split 'train'"):
        write_dataset(tmp_path / "out", {"Training": items, "val": items})
    assert not (tmp_path / "out").exists()
    warn.cache_clear()  # a warning is printed only once
    write_dataset(tmp_path / "out", {"train": items, "held-out": items})
    assert "splits has no 'val'; training needs train and val" in " ".join(capsys.readouterr().err.split())


def test_images_of_several_sizes_in_npy_name_the_argument(tmp_path: Path) -> None:
    items = [(pixels(0), 0), (pixels(1, 12), 0)]
    with pytest.raises(UserError, match=r"npy stores one shape; .*\(option size\) or use encoding jpeg$"):
        write_dataset(tmp_path / "out", {"train": items, "val": items}, encoding="npy")


def test_items_are_iterated_over_a_few_times_only(tmp_path: Path) -> None:
    stream = Stream(600)
    write_dataset(tmp_path / "out", {"val": stream})
    assert stream.passes <= 3  # to check, to look at a few, to write
