"""Training loops of other projects, with their own loaders and precision, on our models, images and batch size.

A loop is a function that takes a PeerTask and a Config and returns an endless iterator. Each item is one training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from configs.schema import Config
from models import build_from_config
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.peers import PeerSpec, fastest_workload
from tools.benchmarks.peers.task import PeerTask, endless
from tools.benchmarks.peers.torch_loader import PILDataset, data_loader, float_transform
from tools.benchmarks.peers.torch_loader import homework as homework_batches


@contextmanager
def training(
    peer: PeerSpec, task: PeerTask, config: Config, workers: Sequence[int] = (), seconds: float = 0.25
) -> Iterator[dict[str, Workload]]:
    """Build a workload of a peer's end-to-end training. `workers` and `seconds` are as in `loading`."""
    with fastest_workload(peer, task, workers, seconds, config) as workload:
        yield {"": workload}


def _network(task: PeerTask, config: Config) -> nn.Module:
    """Build our model without its normalization layer, since the peers' loaders yield normalized floats."""
    classes = config.model.num_classes or len(task.split.classes)
    torch.manual_seed(config.seed)
    half = (0.5, 0.5, 0.5)
    model = build_from_config(config.model, classes, image_size=task.image_size, mean=half, std=half)
    return model.network.train()


def homework(task: PeerTask, config: Config) -> Iterator[float]:
    """Run the training loop of the homework's main.py.

    Settings: the homework's DataLoader (`task.workers` workers, pinned memory on a GPU); float32; NCHW; AdamW with
    torch's defaults except for the learning rate. The loss and the number of correct predictions are read back after
    every step.
    """
    network = _network(task, config).to(task.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.lr)
    criterion = nn.CrossEntropyLoss()
    loss_sum, correct = 0.0, 0
    for images, labels in homework_batches(task):
        optimizer.zero_grad()
        logits = network(images)
        loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        yield loss_sum


def torchvision_reference(task: PeerTask, config: Config) -> Iterator[float]:
    """Run the training loop of torchvision's references/classification.

    Settings: transforms v2 on PIL images; `task.workers` workers; pinned memory and non_blocking copies; SGD with
    momentum; NCHW; cudnn.benchmark; on a GPU, --amp (float16 with a GradScaler). Loss and accuracy are read back after
    every step, as torchvision's metric logger does.
    """
    device = torch.device(task.device)
    torch.backends.cudnn.benchmark = True
    network = _network(task, config).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.train.lr, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    scaler = torch.amp.GradScaler(device.type, enabled=task.on_gpu)
    loader = data_loader(PILDataset(task, float_transform(task)), task)
    for images, labels in endless(loader, task.device):
        with torch.autocast(device.type, dtype=torch.float16, enabled=task.on_gpu):
            logits = network(images)
            loss = criterion(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        _, best = logits.topk(min(5, logits.shape[1]), 1, True, True)
        correct = (best == labels[:, None])[:, :1].flatten().sum().item()
        yield loss.item() + correct


def timm(task: PeerTask, config: Config) -> Iterator[torch.Tensor]:
    """Run the training loop of timm's train.py with --channels-last --amp --amp-dtype bfloat16 --pin-mem.

    Settings: create_loader with its prefetcher, so that images are collated as uint8 and normalized on the device;
    `task.workers` persistent workers; create_optimizer_v2 with sgd; no torch.compile, the default; on the CPU, float32.
    The loss is read back every 50 steps.

    timm's loader cannot crop from padded images. Unless the crop is random-resized, the loader only resizes and flips.
    """
    from timm.data import create_loader  # type: ignore[attr-defined]
    from timm.optim import create_optimizer_v2

    device, aug, size = torch.device(task.device), task.aug or config.aug, task.image_size
    torch.backends.cudnn.benchmark = True
    network = _network(task, config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(network, opt="sgd", lr=config.train.lr, weight_decay=2e-5, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    random_resized = aug.crop == "random-resized"
    dataset = PILDataset(task, None)
    loader = create_loader(
        dataset,  # type: ignore[arg-type]
        input_size=(3, size, size),
        batch_size=task.batch_size,
        is_training=True,
        scale=aug.scale if random_resized else (1.0, 1.0),
        ratio=aug.ratio if random_resized else (1.0, 1.0),
        hflip=aug.flip,
        color_jitter=0.0,
        mean=task.stats[0],
        std=task.stats[1],
        num_workers=task.workers,
        pin_memory=task.on_gpu,
        device=device,
        persistent_workers=task.workers > 0,
    )
    total = torch.zeros((), device=device)
    for step, (images, labels) in enumerate(endless(loader, "cpu"), 1):  # the loader has copied them to the device
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=task.on_gpu):
            loss = criterion(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if step % 50 == 0:
            total.item()
        yield total
