"""The parts of a config fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from helpers.training import CPU, ROOT, Run, alone, run_here
from models import build_from_config
from pipelines.augment.mixup import check_mixing, mixing_enabled
from pipelines.build import open_limited
from pipelines.storage.dataset import ModelDataset
from tools import predict, show
from train import trained_model
from train.build import build_all
from train.checkpoint import store
from train.engine.hard_samples import check_proxy
from train.optim.factory import build_optimizer
from train.optim.freeze import freeze
from train.optim.param_groups import parameter_groups
from train.optim.schedule import Timeline, learning_rate, scale_learning_rates

SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ("sweeps", "base"))
CLASSES = {"cifar10": 10, "digits": 10}  # all others have 200
STORED = {"cifar10": 32, "digits": 32, "medium-imagenet-96": 96}
PIXELS: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def sizes_of(config: Config) -> list[int]:
    """Return the image size of the model, then those of training."""
    size = config.data.image_size or STORED[Path(config.data.path).name]
    return [config.eval.image_size or size, *(stage.image_size or size for stage in config.data.stages), size]


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_parts_of_a_shipped_config_fit_together(path: Path) -> None:
    config = load_config(path)
    train, sizes = config.train, sizes_of(config)
    check_proxy(train, 1, mixing_enabled(config.aug.mix))
    check_mixing(config.data, config.aug.mix)
    classes = CLASSES.get(Path(config.data.path).name, 200)
    # shapes only if possible: the speedruns' networks contain autocast, which does not support the meta device
    with torch.device("cpu" if config.model.name.startswith("speedrun") else "meta"):
        model = build_from_config(config.model, classes, image_size=sizes[0], **PIXELS).eval()
        for size in sizes:
            assert model.network(torch.empty(1, 3, size, size)).shape == (1, classes)
    if config.model.freeze:
        freeze(model, config.model.freeze)
    groups = parameter_groups(model, train.optimizer, train.lr)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    plain = train.optimizer.model_copy(update={"layer_decay": None, "lr_scales": {}})
    build_optimizer(torch.nn.Conv2d(3, 4, 3), plain, train.lr)
    timeline = Timeline.even(train.epochs, 50)
    rates = [learning_rate(update, timeline, train) for update in range(timeline.total)]
    assert max(rates) == pytest.approx(train.lr, rel=0.05)


def test_training_state_has_configured_parts_and_scaled_rates() -> None:
    options = [
        "train.ema.decay=0.9",
        "train.lookahead.every_steps=2",
        "train.proxy.model=lenet",
        "aug.mix.mixup=0",
        "model.freeze=[conv1.*]",
        "train.lr_batch_size=32",
    ]
    config = load_config(ROOT / "configs" / "digits_lenet.yaml", options)
    dataset = ModelDataset("plain", tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    with alone():
        state = build_all(config, dataset, 32, CPU)
        plain = build_all(load_config(ROOT / "configs" / "digits_lenet.yaml"), dataset, 32, CPU)
    assert state.config == scale_learning_rates(config.train, 64)
    assert {group["lr"] for group in state.optimizer.param_groups} == {2 * config.train.lr}
    assert state.ema is not None
    assert state.lookahead is not None
    assert state.proxy is not None
    assert state.notes == ("frozen: 2 of 10 tensors, 456 of 83,126 parameters",)
    assert (plain.ema, plain.lookahead, plain.proxy, plain.notes) == (None, None, None, ())
    for ours, theirs in zip(state.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)  # other parts draw random numbers after the network


def test_balanced_weights_are_those_of_the_limited_training_split(digits_run: Run, tmp_path: Path) -> None:
    digits, options = ROOT / "configs" / "digits_lenet.yaml", ["train.epochs=1", "data.limit=77", "data.batch_size=32"]
    command = ["--cfg", digits, "--data-path", digits_run.data, "--output", tmp_path, "--opts", *options]
    config = load_config(digits, options, **{"data.path": str(digits_run.data)})
    labels = open_limited(config.data, "train").labels
    assert labels is not None
    weights = [len(labels) / (10 * int((labels == label).sum())) for label in range(10)]
    assert len(set(weights)) > 1
    results = {}
    for name, value in (("plain", "null"), ("balanced", "balanced"), ("numbers", str(weights))):
        run_here(*command, f"name={name}", f"train.class_weights={value}")
        results[name] = store.load(tmp_path / name / "last.pt")["model"]["network.fc3.weight"]
    assert torch.equal(results["balanced"], results["numbers"])
    assert not torch.equal(results["balanced"], results["plain"])
    with pytest.raises(UserError, match=r"train\.class_weights has 2 weights, but .* has 10 classes; give one weight"):
        run_here(*command, "train.class_weights=[1, 2]")


def test_results_of_whole_splits_mention_data_limit(
    digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(trained_model, "warn", notes.append)
    command = [ROOT / "configs" / "digits_lenet.yaml", "--data-path", digits_run.data, "--output", tmp_path]
    run_here(*command, "train.epochs=1", "data.limit=77", "name=part")
    run_here(*command, "--resume", tmp_path / "part", "--eval", "data.limit=77")
    assert notes == []
    run_here(*command, "--resume", tmp_path / "part", "--eval")
    show.main(["--checkpoint", str(tmp_path / "part")])
    predict.main(["--checkpoint", str(tmp_path / "part"), "--split", "val"])
    assert notes == ["the run measured a part of val (data.limit=77); this is the result of all of it"] * 3
    predict.main(["--checkpoint", str(tmp_path / "part"), "--split", "train"])
    assert len(notes) == 3
