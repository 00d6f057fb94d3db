"""Other training loops on our models: same architecture, same images, same batch size, their loader, precision and
habits.

A loop is a function (source: PeerSource, config: Config) -> endless iterator, one training step per item.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from configs.schema import Config
from models import build_from_config
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.peers import PeerSpec, load_function
from tools.benchmarks.peers.task import PeerTask
from tools.benchmarks.peers.torch_loader import PILDataset, data_loader, float_transform, homework_loader


@contextmanager
def training(peer: PeerSpec, task: PeerTask, config: Config) -> Iterator[dict[str, Workload]]:
    """The peer's whole training, end to end."""
    yield {"": Workload(load_function(peer)(task, config), task.batch_size)}


def _network(task: PeerTask, config: Config) -> nn.Module:
    """The same model as ours, without our normalisation in front: these loaders give normalised floats."""
    classes = config.model.num_classes or len(task.split.classes)
    torch.manual_seed(config.seed)
    half = (0.5, 0.5, 0.5)
    model = build_from_config(config.model, classes, image_size=task.image_size, mean=half, std=half)
    return model.network.train()


def homework(task: PeerTask, config: Config) -> Iterator[float]:
    """The homework's main.py: its DataLoader (8 workers, pinned memory on a GPU), images and labels copied to the
    device, float32, NCHW, AdamW with torch's defaults, loss.item() and the number of correct answers read back after
    every step."""
    device = torch.device(task.device)
    network = _network(task, config).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.lr)
    criterion = nn.CrossEntropyLoss()
    loader = homework_loader(task)
    loss_sum, correct = 0.0, 0
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = network(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            yield loss_sum


def torchvision_reference(task: PeerTask, config: Config) -> Iterator[float]:
    """torchvision's references/classification: transforms v2 on PIL images, DataLoader with a worker per core and
    pinned memory, non_blocking copies, SGD with momentum, NCHW, cudnn.benchmark; on a GPU --amp (float16 with a
    GradScaler); loss.item() and accuracy read back after every step by its metric logger."""
    device = torch.device(task.device)
    torch.backends.cudnn.benchmark = True
    network = _network(task, config).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=config.train.lr, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    scaler = torch.amp.GradScaler(device.type, enabled=task.on_gpu)
    loader = data_loader(PILDataset(task.folder, float_transform(task)), task, task.workers)
    while True:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
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
    """timm's train.py --channels-last --amp --amp-dtype bfloat16 --pin-mem on a GPU (channels_last, float32 on a CPU):
    create_loader with its prefetcher, which collates uint8 and normalises on the device, a worker per core, kept
    between epochs; create_optimizer_v2 with its default sgd; the loss read back every 50 steps; no torch.compile,
    timm's default.

    timm crops from padded images by no option of its loader: there, and without a crop, it resizes and flips only."""
    from timm.data import create_loader  # type: ignore[attr-defined]
    from timm.optim import create_optimizer_v2

    device, aug, size = torch.device(task.device), task.aug or config.aug, task.image_size
    torch.backends.cudnn.benchmark = True
    network = _network(task, config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(network, opt="sgd", lr=config.train.lr, weight_decay=2e-5, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
    resized = aug.crop == "random-resized"
    mean, std = task.stats
    pictures = PILDataset(task.folder, None)
    loader = create_loader(
        pictures,  # type: ignore[arg-type]
        input_size=(3, size, size),
        batch_size=task.batch_size,
        is_training=True,
        scale=aug.scale if resized else (1.0, 1.0),
        ratio=aug.ratio if resized else (1.0, 1.0),
        hflip=aug.flip,
        color_jitter=0.0,
        mean=tuple(mean),
        std=tuple(std),
        num_workers=task.workers,
        pin_memory=task.on_gpu,
        device=device,
        persistent_workers=task.workers > 0,
    )
    step = 0
    total = torch.zeros((), device=device)
    while True:
        for images, labels in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=task.on_gpu):
                loss = criterion(network(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            step += 1
            if step % 50 == 0:
                total.item()
            yield total
