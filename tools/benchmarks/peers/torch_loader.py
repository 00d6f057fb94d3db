"""torch's DataLoader with torchvision's transforms v2, or with transforms v1 as in the homework."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from pipelines.augment.ops import blur_radius
from tools.benchmarks.peers.task import Batches, PeerTask, endless

Sample = tuple[Image.Image | torch.Tensor, int]
Transform = Callable[..., torch.Tensor]
MAX_PICKLED_SIDE = 64  # the homework reads CIFAR from pickles, and larger images from HDF5


class PILDataset(torch.utils.data.Dataset):
    """Samples as (transform(PIL image), label), or as PIL images if `transform` is None."""

    def __init__(self, task: PeerTask, transform: v2.Compose | None) -> None:
        self.task, self.transform = task, transform
        self.targets = task.labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        image = self.task.pil_image(index)
        return image if self.transform is None else self.transform(image), self.targets[index]


class PickledImages(torch.utils.data.Dataset):
    """Images from a pickle file, kept in memory and converted to PIL images on access, as in torchvision's CIFAR10."""

    def __init__(self, path: Path, transform: v1.Compose) -> None:
        content = pickle.loads(path.read_bytes())  # written by `homework_dataset`
        self.images, self.labels, self.transform = content["data"], content["labels"], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Hdf5Rows(torch.utils.data.Dataset):
    """Images [3, H, W] and labels from an HDF5 file, as in the homework's loader for MediumImageNet."""

    def __init__(self, path: Path, samples: int, transform: v1.Compose) -> None:
        self.path, self.samples, self.transform = path, samples, transform
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        return self.transform(torch.from_numpy(self.file["images-train"][index])), int(self.file["labels-train"][index])


def torchvision_v2(task: PeerTask) -> Batches:
    """Yield batches of uint8 images [B, 3, H, W].

    Settings: torchvision's transforms v2 on PIL images; `task.workers` persistent workers with 2 batches prefetched
    each; on a GPU, pinned memory and non_blocking copies.
    """
    dataset = PILDataset(task, v2.Compose(uint8_transforms(task)))
    return endless(data_loader(dataset, task), task.device)


def homework(task: PeerTask) -> Batches:
    """Yield batches of the homework's DataLoader, with images [B, 3, H, W].

    Images are float32 and normalized on the CPU. Without augmentation (`task.aug` is None) they are uint8.

    Settings: torchvision's transforms v1; `task.workers` workers (8 in the homework's config), restarted in every
    epoch; on a GPU, pinned memory and blocking copies.
    """
    loader = data_loader(homework_dataset(task), task, keep=False)
    for images, labels in endless(loader, "cpu"):
        yield images.to(task.device), labels.to(task.device)


def homework_dataset(task: PeerTask) -> torch.utils.data.Dataset:
    """Build the homework's dataset, and write its pickle file or HDF5 file if necessary.

    Images with a height of up to MAX_PICKLED_SIDE pixels are pickled. Larger images are read from HDF5 and, as in the
    homework, their pixels are divided by 256 instead of 255. Without augmentation, pixels stay uint8.
    """
    split = task.split
    is_small = split.heights.max() <= MAX_PICKLED_SIDE
    path = task.file(".pickle" if is_small else ".hdf5")
    after = [] if task.aug is None else [*crop_and_flip(v1, task), v1.Normalize(*task.stats)]
    if is_small:
        if not path.exists():
            images = np.stack([task.pixels(index) for index in range(len(split))])
            path.write_bytes(pickle.dumps({"data": images, "labels": task.labels.tolist()}, protocol=4))
        return PickledImages(path, v1.Compose([v1.PILToTensor() if task.aug is None else v1.ToTensor(), *after]))
    if not path.exists():
        with h5py.File(path, "w") as file:
            images = file.create_dataset("images-train", (len(split), 3, *split.image_size(0)), np.uint8)
            for index in range(len(split)):
                images[index] = task.pixels(index).transpose(2, 0, 1)
            file["labels-train"] = task.labels
    to_float = [] if task.aug is None else [v1.Lambda(_divided_by_256)]
    return Hdf5Rows(path, len(split), v1.Compose([*to_float, *after]))


def _divided_by_256(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 256


def data_loader(dataset: torch.utils.data.Dataset, task: PeerTask, keep: bool = True) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=task.batch_size,
        shuffle=True,
        num_workers=task.workers,
        pin_memory=task.on_gpu,
        drop_last=True,
        persistent_workers=keep and task.workers > 0,
    )


def crop_and_flip(transforms: ModuleType, task: PeerTask) -> list[Transform]:
    """Build the crop and flip of the task. `transforms` is torchvision.transforms or torchvision.transforms.v2."""
    aug, size = task.aug, task.image_size
    if task.evaluation is not None:
        return [transforms.Resize(task.resized_side, antialias=True), transforms.CenterCrop(size)]
    if aug is None:
        return []
    steps: list[Transform] = []
    if aug.crop == "pad":
        if task.split.image_shape != (size, size, 3):
            steps += [transforms.Resize(size, antialias=True), transforms.CenterCrop(size)]
        steps.append(transforms.RandomCrop(size, padding=aug.padding))
    elif aug.crop == "random-resized":
        steps.append(transforms.RandomResizedCrop(size, scale=aug.scale, ratio=aug.ratio, antialias=True))
    else:
        steps.append(transforms.Resize((size, size), antialias=True))
    return [*steps, transforms.RandomHorizontalFlip(aug.flip)] if aug.flip > 0 else steps


def uint8_transforms(task: PeerTask) -> list[Transform]:
    """Build the augmentation of the task, which takes a PIL image and returns a tensor, uint8 [3, H, W].

    The policy, color and blur transforms are applied to PIL images, since they are slower on single-image tensors.
    Random erasing accepts only tensors.

    Raises:
        ValueError: torchvision does not have the policy.
    """
    aug, steps = task.aug, crop_and_flip(v2, task)
    if aug is None:
        return [*steps, v2.PILToTensor()]
    auto, jitter = aug.auto, aug.color_jitter
    if auto.policy == "randaugment":
        steps.append(v2.RandAugment(auto.num_ops, auto.magnitude, auto.bins))
    elif auto.policy == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(auto.bins))
    elif auto.policy.startswith("autoaugment-"):
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy(auto.policy.removeprefix("autoaugment-"))))
    elif auto.policy != "none":
        raise ValueError(f"torchvision has no policy {auto.policy}")
    if any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)):
        steps.append(v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    if aug.grayscale > 0:
        steps.append(v2.RandomGrayscale(aug.grayscale))
    if aug.blur.probability > 0:
        kernel = 2 * blur_radius(aug.blur.sigma[1]) + 1
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, aug.blur.sigma)], aug.blur.probability))
    steps.append(v2.PILToTensor())
    if aug.erase.probability > 0:
        steps.append(v2.RandomErasing(aug.erase.probability, aug.erase.scale, aug.erase.ratio))
    return steps


def tensor_transform(task: PeerTask) -> v2.Compose:
    """Build the crop and flip of the task.

    The transform takes an array, uint8 [H, W, 3], or a tensor, uint8 [3, H, W], and returns a tensor, uint8 [3, H, W].
    """
    return v2.Compose([ToPlanes(), *crop_and_flip(v2, task)])


class ToPlanes(torch.nn.Module):
    """Convert a uint8 array [H, W, 3] to a tensor [3, H, W]. Return a tensor unchanged."""

    def forward(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(pixels, torch.Tensor):
            return pixels
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def float_transform(task: PeerTask) -> v2.Compose:
    """Build the augmentation of torchvision's reference training.

    The transform takes a PIL image and returns a normalized tensor, float32 [3, H, W].
    """
    return v2.Compose([*uint8_transforms(task), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*task.stats)])
