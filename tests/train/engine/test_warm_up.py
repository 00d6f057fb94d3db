"""Warm-up leaves no trace, and captured steps equal plain steps.

On the CPU, a replay calls train_step on the captured buffers, which covers everything but CUDA itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import AugConfig, DataConfig, EvalConfig, MixConfig, StageConfig, TrainConfig
from configs.utils.code import load_object
from configs.utils.errors import UserError
from helpers.training import CPU, SmallNet, alone, make_state, random_batch, small_net
from pipelines import build_eval_loader, build_train_loader
from pipelines.augment.mixup import mix_table
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch, MixedBatch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.distributed.process_group import Ranks, is_data_parallel, process_group
from train.engine import cuda_graph, execution, warm_up
from train.engine.epoch import training_steps
from train.engine.evaluate import evaluate
from train.engine.execution import build_plan
from train.engine.losses import identity_mix
from train.engine.state import TrainState, build_state
from train.engine.step import run_step, train_step, update_averages
from train.optim.averaging import build_ema
from train.optim.factory import build_optimizer, set_learning_rate
from train.optim.schedule import Timeline

SGD = {"name": "sgd"}
BATCH = 50
MIX = MixConfig(mixup=0.4, cutmix=1.0, mode="elem", probability=0.9)
LR = 2.0**-6  # exact in float32 as well
Settings = dict[str, Any]


@pytest.fixture
def _process_group() -> Iterator[None]:
    with alone():
        yield


on_the_cpu = pytest.mark.usefixtures("_process_group")


class FakeGraph:
    """A CUDA graph that records calls of train_step instead of kernels."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.calls: list[tuple[TrainState, Batch, bool]] = []

    def replay(self) -> None:
        for state, batch, update in self.calls:
            train_step(state, batch, optimizer_step=update)


@pytest.fixture
def _fake_graphs(monkeypatch: pytest.MonkeyPatch, _process_group: None) -> None:
    @contextmanager
    def capture(graph: FakeGraph, **_: Any) -> Iterator[None]:
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    def step(state: TrainState, batch: Batch, *, optimizer_step: bool = True) -> None:
        if FakeGraph.capturing is None:
            train_step(state, batch, optimizer_step=optimizer_step)
        else:
            FakeGraph.capturing.calls.append((state, batch, optimizer_step))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(warm_up, "train_step", step)
    monkeypatch.setattr(cuda_graph, "train_step", step)
    monkeypatch.setattr(execution, "uses_cuda_graph", lambda config, *_: config.cuda_graph != "off")


def state_of(state: TrainState) -> dict[str, Any]:
    return {
        "network": state.network.state_dict(),
        "optimizer": [dict(values) for values in state.optimizer.state.values()],
        "scaler": state.scaler.state_dict(),
        "sums": state.sums,
        "generator": torch.get_rng_state(),
    }


def assert_equal_trees(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def plain_steps(state: TrainState, count: int, first: int = 0) -> None:
    """Train like training_steps, with the generator seeded for each batch."""
    accumulation = state.config.accumulation_steps
    for step in range(first, first + count):
        torch.manual_seed(step)
        batch = random_batch(8, seed=step)
        if state.plan.mixes:
            batch = MixedBatch(*batch, torch.from_numpy(mix_table(MIX, 0, 0, step, 8, 32)))
        run_step(state, batch, step, optimizer_step=(step + 1) % accumulation == 0)


KINDS: dict[str, Settings] = {
    "adamw": {},
    "sgd": {"optimizer": SGD},
    "adam": {"optimizer": {"name": "adam"}},
    "plain sgd": {"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": False}},
    "clipped": {"clip_grad_norm": 0.1},
    "clipped by value": {"clip_grad_value": 1e-3},
    "clipped adaptively": {"clip_grad_adaptive": 0.01},
    "accumulated": {"accumulation_steps": 3},
    "accumulated sgd": {"accumulation_steps": 2, "optimizer": SGD},
    "mixed": {"mixes": True, "accumulation_steps": 2},
    "mixed bce": {"mixes": True, "loss": "bce"},
}


# Warm-up


@on_the_cpu
@pytest.mark.parametrize("steps", [0, 6], ids=["a new run", "a resumed run"])
@pytest.mark.parametrize("settings", [*KINDS.values(), {"amp": "fp16"}], ids=[*KINDS, "fp16"])
def test_warm_up_changes_neither_state_nor_next_steps(settings: Settings, steps: int) -> None:
    warm, cold = make_state(small_net(), **settings), make_state(small_net(), **settings)
    for state in (warm, cold):
        plain_steps(state, steps)
    before = copy.deepcopy(state_of(warm))
    warm_up.warm_up_training(warm, warm_up.blank_batch(8, 32, CPU))
    after = state_of(warm)
    made = after.pop("optimizer")[len(before["optimizer"]) :]
    assert all(not value.any() for values in made for value in values.values() if value is not None)
    assert_equal_trees(after, {key: value for key, value in before.items() if key != "optimizer"})
    for state in (warm, cold):
        plain_steps(state, 6, first=steps)
    assert_equal_trees(state_of(warm), state_of(cold))


@on_the_cpu
def test_nothing_is_warmed_up_on_cpu_without_compilation(npy_data: Path) -> None:
    state = make_state(small_net())
    calls: list[int] = []
    state.network.register_forward_hook(lambda *_: calls.append(1))
    loader = build_train_loader(DataConfig(path=str(npy_data)), seed=3, device=CPU)
    warm_up.warm_up(state, loader)
    assert calls == []
    assert state.captured_step is None


@on_the_cpu
def test_compiled_training_and_evaluation_are_warmed_up_per_shape(npy_data: Path) -> None:
    state = make_state(small_net())
    state.plan = replace(state.plan, needs_warmup=True)  # like train.compile, but without its minute of compilation
    shapes: set[tuple[bool, tuple[int, ...]]] = set()
    state.network.register_forward_hook(lambda module, images, _: shapes.add((module.training, images[0].shape)))
    section = DataConfig(path=str(npy_data), batch_size=BATCH)
    warm_up.warm_up(
        state,
        build_train_loader(section, seed=3, device=CPU),
        build_eval_loader(section, EvalConfig(batch_size=16), device=CPU),
    )
    assert shapes == {(True, (BATCH, 3, 32, 32)), (False, (16, 3, 32, 32))}
    assert state.network.training


@on_the_cpu
def test_process_compiles_more_models_than_torch_default(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, backend="eager"))
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for classes in range(10, 20):
        train_step(make_state(small_net(classes), compile="default"), random_batch(2))
    assert counters["stats"]["unique_graphs"] == 10


# Captured steps, replayed on the CPU


@pytest.mark.usefixtures("_fake_graphs")
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_captured_steps_equal_plain_steps_bitwise(settings: Settings) -> None:
    captured, plain = (make_state(small_net(), lr=LR, cuda_graph=graph, **settings) for graph in ("on", "off"))
    warm_up.warm_up_training(captured, warm_up.blank_batch(8, 32, CPU))
    assert isinstance(captured.captured_step, cuda_graph.CapturedStep)
    for first, lr in ((0, LR), (6, LR / 4)):
        for state in (captured, plain):
            set_learning_rate(state.optimizer, lr)
            plain_steps(state, 6, first)
    assert_equal_trees(state_of(captured), state_of(plain))


@pytest.mark.usefixtures("_fake_graphs")
def test_gradients_keep_storage_between_captured_steps() -> None:
    state = make_state(small_net(), accumulation_steps=2, cuda_graph="on")
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, CPU))

    def addresses() -> list[int]:
        return [p.grad.data_ptr() for p in state.network.parameters() if p.grad is not None]

    before = addresses()
    plain_steps(state, 4)
    assert addresses() == before != []


def staged_steps(state: TrainState, count: int, shapes: list[tuple[int, int]]) -> None:
    """Train on noise of (samples, image size), one shape after the other."""
    accumulation = state.config.accumulation_steps
    for step in range(count):
        torch.manual_seed(step)
        samples, size = shapes[step * len(shapes) // count]
        batch = resized(random_batch(samples, seed=step), size)
        if state.plan.mixes:
            batch = MixedBatch(*batch, torch.from_numpy(mix_table(MIX, 0, 0, step, samples, size)))
        run_step(state, batch, step, optimizer_step=(step + 1) % accumulation == 0)


def resized(batch: Batch, size: int) -> Batch:
    images = nn.functional.interpolate(batch.images.float(), size).to(torch.uint8)
    return Batch(images.contiguous(memory_format=torch.channels_last), batch.labels)


class PoolingNet(SmallNet):
    """A network for images of any size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.adaptive_avg_pool2d(images.float(), 32))


SHAPES = [(8, 32), (4, 48), (8, 16), (8, 32)]  # the first shape again


@pytest.mark.usefixtures("_fake_graphs")
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_captured_steps_of_several_shapes_equal_plain_steps(settings: Settings) -> None:
    def new(graph: str) -> TrainState:
        torch.manual_seed(0)
        return make_state(PoolingNet(12), lr=LR, cuda_graph=graph, **settings)

    captured, plain = new("on"), new("off")
    before = copy.deepcopy(captured.network.state_dict())
    warm_up.warm_up_training(captured, *(warm_up.blank_batch(*shape, CPU) for shape in dict.fromkeys(SHAPES)))
    assert_equal_trees(captured.network.state_dict(), before)
    for state in (captured, plain):
        staged_steps(state, 24, SHAPES)
    assert_equal_trees(state_of(captured), state_of(plain))
    with pytest.raises(ValueError, match=r"captured for \(8, 3, 32, 32\), \(4, 3, 48, 48\), \(8, 3, 16, 16\)"):
        run_step(captured, resized(random_batch(4), 16), 0, optimizer_step=True)


@pytest.mark.usefixtures("_fake_graphs")
def test_captured_step_refuses_batch_of_another_shape() -> None:
    state = make_state(small_net(), cuda_graph="on")
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, CPU))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) cannot take part in a step captured for \(8, 3, 32, 32\)"):
        run_step(state, random_batch(1), 0, optimizer_step=True)


@pytest.mark.usefixtures("_fake_graphs")
@pytest.mark.parametrize(("then", "now"), [("on", "off"), ("off", "on"), ("on", "on")])
@pytest.mark.parametrize("settings", [{}, {"optimizer": SGD}, {"optimizer": {"name": "adam"}}],
                         ids=["adamw", "sgd", "adam"])  # fmt: skip
def test_checkpoints_move_between_runs_with_and_without_graphs(
    then: str, now: str, settings: Settings, tmp_path: Path
) -> None:
    def new(graph: str) -> TrainState:
        state = make_state(small_net(), lr=LR, cuda_graph=graph, **settings)
        warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, CPU))
        return state

    saved = new(then)
    plain_steps(saved, 3)
    store.save(tmp_path / "last.pt", saved, saved.sums)
    content = store.load(tmp_path / "last.pt")
    assert all(group["lr"] == LR and group.get("capturable") in (None, False)
               for group in content["optimizer"]["param_groups"])  # fmt: skip
    going_on = new(now)
    restore_state(going_on, content, tmp_path / "last.pt")
    assert going_on.captured_step is None  # a graph would use the tensors before the restore
    warm_up.warm_up_training(going_on, warm_up.blank_batch(8, 32, CPU))
    for state in (saved, going_on):
        plain_steps(state, 3, first=3)
    assert_equal_trees(state_of(saved), state_of(going_on))


@on_the_cpu
def test_impossible_cuda_graph_is_user_error() -> None:
    with pytest.raises(UserError, match=r"^train\.cuda_graph=on is not possible, since the device is a cpu; use auto"):
        make_state(small_net(), cuda_graph="on")
    assert not make_state(small_net(), cuda_graph="auto").plan.uses_cuda_graph


@on_the_cpu
@pytest.mark.parametrize(
    ("settings", "amp", "reason"),
    [
        ({}, torch.float16, "fp16 checks gradients"),
        ({"compile": "reduce-overhead"}, None, "reduce-overhead captures its own"),
        (
            {"optimizer": {"name": "lamb"}},
            None,
            r"optimizer lamb is not known .*, unlike muon, adamw, adam, sgd, rmsprop",
        ),
        ({"optimizer": {"name": "sgd", "options": {"foreach": True}}}, None, r"choose an implementation \(foreach\)"),
        ({"optimizer": {"name": "sgd", "options": {"dampening": 0.5}}}, None, "have a dampening"),
    ],
)
def test_graph_obstacles_are_named_and_auto_disables(settings: Settings, amp: torch.dtype | None, reason: str) -> None:
    gpu = torch.device("cuda", 0)
    assert execution.uses_cuda_graph(TrainConfig(), gpu, torch.bfloat16)
    assert not execution.uses_cuda_graph(TrainConfig(cuda_graph="off"), gpu, torch.bfloat16)
    assert not execution.uses_cuda_graph(TrainConfig(**settings), gpu, amp)
    with pytest.raises(UserError, match=reason):
        execution.uses_cuda_graph(TrainConfig(cuda_graph="on", **settings), gpu, amp)


@on_the_cpu
def test_several_ranks_use_graphs_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "get_world_size", lambda: 4)
    gpu = torch.device("cuda", 0)
    assert not execution.uses_cuda_graph(TrainConfig(), gpu, None)
    assert execution.uses_cuda_graph(TrainConfig(cuda_graph="on"), gpu, None)
    with pytest.raises(UserError, match=r"since fp16 checks gradients .*; use auto or off, or a GPU without fp16"):
        execution.uses_cuda_graph(TrainConfig(cuda_graph="on"), gpu, torch.float16)


# On a GPU, with deterministic kernels and SGD: Adam would amplify rounding errors, since it divides by small roots of
# squares. The remaining difference is rounding, since cuDNN chooses among several deterministic kernels.

CLOSE: Settings = {"rtol": 1e-4, "atol": 1e-5}
SMOOTH_RMSPROP: Settings = {"name": "rmsprop", "eps": 1.0}  # does not divide by small roots either
GPU_KINDS: dict[str, Settings] = {
    "float32": {"amp": "off"},
    "bf16": {"amp": "bf16"},
    "clipped": {"amp": "off", "clip_grad_norm": 0.1},
    "clipped by value": {"amp": "off", "clip_grad_value": 1e-3},
    "clipped adaptively": {"amp": "off", "clip_grad_adaptive": 0.01},
    "accumulated": {"amp": "off", "accumulation_steps": 3},
    "compiled": {"amp": "off", "compile": "default"},
    "mixed": {"amp": "off", "mixes": True},
    "weighted": {"amp": "off", "class_weights": tuple(number / 6 for number in range(12))},
    "mixed and compiled": {"amp": "off", "mixes": True, "loss": "bce", "compile": "default"},
    "rmsprop": {"amp": "off", "optimizer": SMOOTH_RMSPROP},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with process_group(Ranks()) as device:
        yield device


def on_gpu(
    device: torch.device, network: nn.Module | None = None, *, mixes: bool = False, **settings: Any
) -> TrainState:
    network = (network or small_net()).to(device).to(memory_format=torch.channels_last)
    config = TrainConfig.model_validate({"compile": "off", "lr": LR, "epochs": 2, "optimizer": SGD, **settings})
    built = build_optimizer(network, config.optimizer, config.lr)
    return build_state(network, built, config, build_plan(config, device, mixes=mixes))


def gpu_loaders(
    data: Path,
    device: torch.device,
    accumulation_steps: int = 1,
    mix: MixConfig | None = None,
    stages: tuple[StageConfig, ...] = (),
) -> tuple[TrainLoader, EvalLoader]:
    section = DataConfig(path=str(data), batch_size=BATCH, stages=stages)
    aug = AugConfig(crop="pad", flip=0.5, mix=mix or MixConfig())
    train = build_train_loader(section, aug, seed=3, device=device, accumulation_steps=accumulation_steps)
    return train, build_eval_loader(section, EvalConfig(batch_size=16), device=device)


def train_epochs(
    state: TrainState, loader: TrainLoader, seed: int = 0, after_step: Callable[[int, float], None] = lambda *_: None
) -> dict[str, torch.Tensor]:
    while loader.position.epoch < 2:
        for step, lr in training_steps(state, loader, seed=seed):
            after_step(step, lr)
    return {**state.network.state_dict(), "sums": state.sums}


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("settings", GPU_KINDS.values(), ids=GPU_KINDS)
def test_captured_epochs_equal_plain_epochs_on_gpu(settings: Settings, npy_data: Path, gpu: torch.device) -> None:
    results = {}
    for graph in ("on", "off"):
        state = on_gpu(gpu, cuda_graph=graph, **settings)
        mix = MIX if state.plan.mixes else None
        loader, _ = gpu_loaders(npy_data, gpu, state.config.accumulation_steps, mix)
        warm_up.warm_up(state, loader)
        assert isinstance(state.captured_step, cuda_graph.CapturedStep) == (graph == "on")
        results[graph] = train_epochs(state, loader)
    torch.testing.assert_close(results["on"], results["off"], **CLOSE)


OWN = """
import torch

def noise(images, generator):
    draws = torch.rand(len(images), generator=generator, device=images.device)
    seen.append(float(draws[0]))  # reading a value could not be captured
    return images + 20 * draws[:, None, None, None]

def loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels).sqrt()

seen = []
"""


def own_code_run(folder: Path, data: Path, device: torch.device, **settings: Any) -> TrainState:
    """Train an epoch with the user's own loss and augmentation."""
    (folder / "own.py").write_text(OWN)
    state = on_gpu(device, loss=f"{folder / 'own.py'}:loss", **settings)
    aug = AugConfig(crop="pad", custom=f"{folder / 'own.py'}:noise")
    loader = build_train_loader(DataConfig(path=str(data), batch_size=BATCH), aug, seed=3, device=device)
    warm_up.warm_up(state, loader)
    for _ in training_steps(state, loader, seed=0):
        pass
    return state


@pytest.mark.gpu
def test_own_augmentation_runs_outside_of_the_captured_step_on_gpu(
    npy_data: Path, gpu: torch.device, tmp_path: Path
) -> None:
    state = own_code_run(tmp_path, npy_data, gpu, cuda_graph="on")
    assert isinstance(state.captured_step, cuda_graph.CapturedStep)
    seen = load_object(f"{tmp_path / 'own.py'}:noise", "aug.custom").__globals__["seen"]
    assert len(seen) == 700 // BATCH


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("settings", [{"amp": "off"}, {"amp": "bf16"}, {"amp": "off", "compile": "default"}])
def test_own_code_gives_the_same_weights_captured_and_plain_on_gpu(
    settings: Settings, npy_data: Path, gpu: torch.device, tmp_path: Path
) -> None:
    captured, plain = (own_code_run(tmp_path, npy_data, gpu, cuda_graph=graph, **settings) for graph in ("on", "off"))
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if settings["amp"] == "bf16" else CLOSE
    torch.testing.assert_close(captured.network.state_dict(), plain.network.state_dict(), **tolerance)


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("kind", ["float32", "accumulated", "compiled", "mixed"])
def test_captured_stages_equal_plain_stages_on_gpu(kind: str, npy_data: Path, gpu: torch.device) -> None:
    stages = (StageConfig(epoch=0, image_size=24), StageConfig(epoch=1, image_size=40, batch_size=20))
    results = {}
    for graph in ("on", "off"):
        torch.manual_seed(0)
        state = on_gpu(gpu, PoolingNet(12), cuda_graph=graph, **GPU_KINDS[kind])
        mix = MIX if state.plan.mixes else None
        loader, _ = gpu_loaders(npy_data, gpu, state.config.accumulation_steps, mix, stages)
        warm_up.warm_up(state, loader)
        results[graph] = train_epochs(state, loader)
    torch.testing.assert_close(results["on"], results["off"], **CLOSE)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_captured_step_skips_non_finite_gradients(gpu: torch.device) -> None:
    state = on_gpu(gpu, cuda_graph="on", on_nonfinite="skip")
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, gpu))
    batch, weight = Batch(*(part.to(gpu) for part in random_batch(8))), state.network.get_parameter("head.weight")
    run_step(state, batch, 0, optimizer_step=True)
    before = copy.deepcopy(state.network.state_dict())
    weight.data[0, 0] = float("inf")
    run_step(state, batch, 0, optimizer_step=True)
    weight.data[0, 0] = before["head.weight"][0, 0]
    before["norm.num_batches_tracked"] += 1  # also counts the skipped batch
    assert_equal_trees(state.network.state_dict(), before)
    assert state.guard is not None
    assert float(state.guard.skipped) == 1
    run_step(state, batch, 0, optimizer_step=True)
    assert not torch.equal(weight, before["head.weight"])
    assert state.network.state_dict()["norm.running_mean"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_warm_up_leaves_no_trace_on_a_gpu(npy_data: Path, gpu: torch.device) -> None:
    state = on_gpu(gpu)
    loaders = gpu_loaders(npy_data, gpu)
    before = copy.deepcopy((state.network.state_dict(), state.sums, torch.cuda.get_rng_state(gpu)))
    warm_up.warm_up(state, *loaders)
    assert_equal_trees((state.network.state_dict(), state.sums, torch.cuda.get_rng_state(gpu)), before)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_captured_dropout_is_function_of_seed(npy_data: Path, gpu: torch.device) -> None:
    def weights(seed: int) -> torch.Tensor:
        state = on_gpu(gpu)
        loader, _ = gpu_loaders(npy_data, gpu)
        warm_up.warm_up(state, loader)
        torch.cuda.manual_seed(seed + 100)
        head: torch.Tensor = train_epochs(state, loader, seed)["head.weight"]
        return head

    first = weights(0)
    torch.testing.assert_close(weights(0), first, **CLOSE)
    assert not torch.allclose(weights(1), first, **CLOSE)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_replayed_dropout_equals_plain_kernels_with_same_seed(gpu: torch.device) -> None:
    class Masked(SmallNet):
        """A network whose weights become the dropout masks, so that a step shows them."""

        def __init__(self) -> None:
            super().__init__(10)
            self.register_buffer("mask", torch.zeros(8, 256))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.mask.copy_(self.dropout(torch.ones_like(self.mask)))
            return super().forward(images)

    state = on_gpu(gpu, Masked())
    batch = Batch(*(part.to(gpu) for part in random_batch(8)))
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, gpu))
    masks = []
    assert state.captured_step is not None
    for step in (state.captured_step, train_step, state.captured_step):
        for seed in (1, 2):
            torch.cuda.manual_seed(seed)
            step(state, batch)
            masks.append(state.network.mask.clone())  # type: ignore[operator, union-attr]
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert torch.equal(masks[0], masks[4])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_evaluation_between_captured_steps_changes_nothing(npy_data: Path, gpu: torch.device) -> None:
    def weights(evaluates: bool) -> dict[str, torch.Tensor]:
        state = on_gpu(gpu)
        loader, val_loader = gpu_loaders(npy_data, gpu)
        warm_up.warm_up(state, loader, val_loader)

        def after_step(*_: Any) -> None:
            if evaluates:
                evaluate(state, val_loader, 107)
                state.forward.train()  # like training_steps at its start

        return train_epochs(state, loader, after_step=after_step)

    torch.testing.assert_close(weights(True), weights(False), **CLOSE)


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("optimizer", [SGD, SMOOTH_RMSPROP], ids=["sgd", "rmsprop"])
@pytest.mark.parametrize(("then", "now"), [("on", "on"), ("on", "off"), ("off", "on")])
def test_run_with_captured_steps_resumes_from_checkpoint(
    then: str, now: str, optimizer: Settings, npy_data: Path, tmp_path: Path, gpu: torch.device
) -> None:
    class Interrupted(Exception):
        pass

    def new(graph: str) -> tuple[TrainState, TrainLoader]:
        return on_gpu(gpu, cuda_graph=graph, optimizer=optimizer), gpu_loaders(npy_data, gpu)[0]

    state, loader = new("on")
    warm_up.warm_up(state, loader)
    whole = train_epochs(state, loader)

    state, loader = new(then)
    warm_up.warm_up(state, loader)

    def save_and_break(update: int, lr: float) -> None:
        if update == 9:
            store.save(tmp_path / "last.pt", state, state.sums, loader_state=asdict(loader.position))
            raise Interrupted

    with pytest.raises(Interrupted):
        train_epochs(state, loader, after_step=save_and_break)
    content = store.load(tmp_path / "last.pt")
    state, loader = new(now)
    restore_state(state, content, tmp_path / "last.pt")
    warm_up.warm_up(state, loader)
    loader.position = Position(**content["loader_state"])
    torch.testing.assert_close(train_epochs(state, loader), whole, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("mixes", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "rmsprop", "muon"])
@pytest.mark.parametrize("clipping", ["clip_grad_norm", "clip_grad_value", "clip_grad_adaptive"])
def test_captured_steps_and_averages_never_wait_for_the_gpu(
    name: str, clipping: str, mixes: bool, gpu: torch.device
) -> None:
    settings: Settings = {clipping: 1.0, "accumulation_steps": 2, "ema": {"decay": 0.9}, "optimizer": {"name": name}}
    settings["mixes"] = mixes
    state = on_gpu(gpu, **settings)
    state.ema = build_ema(state.network, state.config.ema)
    batch = Batch(*(part.to(gpu) for part in random_batch(8)))
    batch = identity_mix(batch) if mixes else batch
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, gpu))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            set_learning_rate(state.optimizer, 0.1 / (step + 1))
            torch.cuda.default_generators[gpu.index].manual_seed(step)
            run_step(state, batch, step, optimizer_step=step % 2 == 1)
            if step % 2 == 1:
                update_averages(state, step // 2, Timeline.even(2, 50))
    finally:
        torch.cuda.set_sync_debug_mode("default")


DDP_KINDS: dict[str, Settings] = {
    "float32": {"amp": "off"},
    "bf16": {"amp": "bf16", "clip_grad_norm": 0.1},
    "accumulated": {"amp": "off", "accumulation_steps": 3, "ema": {"decay": 0.9}},
    "skipping": {"amp": "off", "on_nonfinite": "skip"},
    "compiled": {"amp": "off", "compile": "default"},
}


def data_parallel_on_gpu(device: torch.device, **settings: Any) -> TrainState:
    """Return a state whose model is wrapped in DDP, as with several ranks, although this rank is the only one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        state = on_gpu(device, cuda_graph="on", **settings)
    state.ema = build_ema(state.network, state.config.ema)
    return state


@pytest.mark.gpu
@pytest.mark.parametrize("settings", DDP_KINDS.values(), ids=DDP_KINDS)
def test_steps_with_ddp_are_captured_and_never_wait_for_the_gpu(settings: Settings, gpu: torch.device) -> None:
    state = data_parallel_on_gpu(gpu, **settings)
    assert is_data_parallel(state.forward)
    batch, accumulation = Batch(*(part.to(gpu) for part in random_batch(8))), state.config.accumulation_steps
    warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, gpu))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in range(2 * accumulation):
            run_step(state, batch, index // accumulation, optimizer_step=(index + 1) % accumulation == 0)
        update_averages(state, 1, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(state.captured_step, cuda_graph.CapturedStep)


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("settings", DDP_KINDS.values(), ids=DDP_KINDS)
def test_captured_steps_with_ddp_equal_plain_steps_without(
    settings: Settings, npy_data: Path, gpu: torch.device
) -> None:
    results = []
    for build, graph in ((data_parallel_on_gpu, {}), (on_gpu, {"cuda_graph": "off"})):
        state = build(gpu, **settings, **graph)
        loader, _ = gpu_loaders(npy_data, gpu, state.config.accumulation_steps)
        warm_up.warm_up(state, loader)
        results.append(train_epochs(state, loader))
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if settings["amp"] == "bf16" else CLOSE
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.gpu
def test_run_notes_why_its_steps_are_not_captured(gpu: torch.device) -> None:
    note = "training steps are not replayed as CUDA graphs, since fp16 checks gradients on the host before every step"
    assert on_gpu(gpu, amp="fp16").notes == (note,)
    assert not on_gpu(gpu).notes
    assert not on_gpu(gpu, amp="fp16", cuda_graph="off").notes


@pytest.mark.gpu
def test_model_that_synchronizes_is_refused_with_advice(gpu: torch.device, failed_capture: None) -> None:
    class Reading(SmallNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            return logits * float(logits.max())

    state = on_gpu(gpu, Reading(10))
    with pytest.raises(UserError, match=r"cannot be captured as a CUDA graph .*; set train\.cuda_graph=off"):
        warm_up.warm_up_training(state, warm_up.blank_batch(8, 32, gpu))
