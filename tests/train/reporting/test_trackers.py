"""W&B and TensorBoard: their data, read back with their own readers, and failures that do not end the run."""

from __future__ import annotations

import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from configs.schema import AugConfig, DataConfig, LogConfig, MixConfig, WandbConfig
from configs.utils.errors import run_main
from helpers.training import CLEAN, DIGITS, Run, alone, lenet, make_state, on_ranks, strict_lines
from pipelines import build_eval_loader, build_train_loader
from pipelines.loader.batches import MixedBatch
from train import ddp
from train.distributed.process_group import Ranks
from train.engine.evaluate import evaluate, predictions
from train.engine.losses import mix_images, swap_pairs
from train.reporting import figures, wandb_tracker
from train.reporting.metrics_file import MetricsLine
from train.reporting.run_log import RunLog
from train.reporting.sample_images import GRID_IMAGES, collect_predictions, show_samples
from train.reporting.trackers import call_with_timeout

PROJECT = WandbConfig(project="zhu")
CURVES = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr", "images_per_s")
PICTURES = ("train_samples", "confusion_matrix", "predictions")


# A whole run with both trackers, which stops after step 56 and resumes from its checkpoint of step 50


@pytest.fixture(scope="module")
def tracked(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder. Do not modify."""

    class Stop(Exception):
        pass

    output = tmp_path_factory.mktemp("tracked")
    opts = [
        "train.epochs=2",
        "train.warmup_epochs=0",
        "train.lr=3e-3",
        "data.batch_size=32",
        "train.save_every_steps=10",
        "log.every_steps=4",
        "log.wandb.project=zhu",
        "log.wandb.mode=offline",
        "log.tensorboard=true",
    ]
    command = ["ddp.py", "--cfg", DIGITS, "--data-path", digits_run.data, "--output", output, "--opts", *opts]
    steps = RunLog.log_step

    def stop(log: RunLog, values: Any, step: int) -> None:
        steps(log, values, step)
        if step == 56:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        without_login(patch, output)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(sys, "argv", [*map(str, command)])
        patch.setattr(RunLog, "log_step", stop)
        with pytest.raises(Stop):
            ddp.main()
        patch.setattr(RunLog, "log_step", steps)
        patch.setattr(sys, "argv", [*map(str, command), "--resume", "auto"])
        with pytest.raises(SystemExit) as ended:
            run_main(ddp.main)
    assert ended.value.code in (None, 0)
    return output / "digits_lenet"


def without_login(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def wandb_records(folder: Path) -> list[Any]:
    """Return the records of an offline run: its file is a LevelDB log of protocol buffers."""
    (path,) = folder.glob("run-*.wandb")
    content, block, found, begun = path.read_bytes(), 32768, [], b""
    at = 7  # the header of the file
    while at + 7 <= len(content):
        if block - at % block < 7:  # too short for the header of a record
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        begun += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(begun))
            begun = b""
    return found


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the logged values, one dict per step."""
    records = [record.history.item for record in wandb_records(folder) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in records]


def wandb_values(folder: Path, field: str) -> dict[str, Any]:
    """Return the last config or summary of an offline run."""
    values: dict[str, Any] = {}
    for record in wandb_records(folder):
        if record.HasField(field):
            for item in getattr(record, field).update:
                values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values


@pytest.mark.slow
def test_wandb_has_a_point_for_every_epoch(tracked: Path) -> None:
    rows = [row for folder in offline_runs(tracked) for row in wandb_rows(folder) if "epoch" in row]
    lines = strict_lines(tracked / "metrics.jsonl")
    assert len(lines) == 2
    assert [row["epoch"] for row in rows] == [line["epoch"] + 1 for line in lines]
    for key in ("step", *CURVES):
        assert [row[key] for row in rows] == [line[key] for line in lines], key
    metrics = [record.metric for record in wandb_records(offline_runs(tracked)[0]) if record.HasField("metric")]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
    assert {axes[name] for name in ("train_loss", "train_top1", "val_loss", "val_top1")} == {"epoch"}
    assert axes["*"] == "step"


def test_wandb_has_a_point_per_log_interval(tracked: Path) -> None:
    first, second = (wandb_rows(folder) for folder in offline_runs(tracked))
    assert [row["step"] for row in first if "step_loss" in row] == list(range(4, 57, 4))
    assert [row["step"] for row in second if "step_loss" in row] == list(range(52, 89, 4))
    assert [row["_step"] for row in first] == [row["step"] for row in first]
    assert {"lr", "images_per_s", "data_wait_fraction", "memory_gib"} <= first[1].keys()
    repeated = [[row["step_loss"] for row in rows if row["step"] == 56] for rows in (first, second)]
    assert repeated[0] == repeated[1]
    losses = [row["step_loss"] for row in first if 0 < row["step"] <= 44]  # of the first epoch
    assert np.mean(losses) == pytest.approx(strict_lines(tracked / "metrics.jsonl")[0]["train_loss"])


def test_wandb_has_config_facts_and_best_values(tracked: Path) -> None:
    first, second = offline_runs(tracked)
    config = {}
    for record in wandb_records(first):
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert config["train"]["optimizer"]["name"] == "adamw"
    assert config["facts"]["classes"] == 10
    assert config["facts"]["parameters"] == 83126
    summary = wandb_values(second, "summary")
    lines = strict_lines(tracked / "metrics.jsonl")
    assert summary["best_val_top1"] == max(line["val_top1"] for line in lines)
    assert summary["best_val_loss"] == min(line["val_loss"] for line in lines)
    assert summary["command_s"] > summary["training_s"] > 0


def test_run_ended_by_an_error_is_marked_failed(tracked: Path) -> None:
    codes = [
        [record.exit.exit_code for record in wandb_records(folder) if record.HasField("exit")]
        for folder in offline_runs(tracked)
    ]
    assert codes == [[1], [0]]


def test_pictures_are_drawn_once_into_the_run_files(tracked: Path) -> None:
    drawn = [
        sorted(path.name.rsplit("_", 2)[0] for path in folder.glob("files/media/images/pictures/*.png"))
        for folder in offline_runs(tracked)
    ]
    assert drawn == [["train_samples"], ["confusion_matrix", "predictions"]]


def test_console_ends_with_the_upload_command(tracked: Path) -> None:
    lines = (tracked / "log.txt").read_text().splitlines()
    _, command = lines[-1].split("upload this run with: ")
    assert command == f"wandb sync {tracked / 'wandb'}"
    dry = [sys.executable, "-m", "wandb", *command.split()[1:], "--dry-run"]
    done = subprocess.run(dry, env=CLEAN, capture_output=True, text=True, check=True)
    assert "2 run(s)" in done.stdout + done.stderr


def test_tensorboard_has_every_point_once_after_resume(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    lines = strict_lines(tracked / "metrics.jsonl")
    assert [event.value for event in events.Scalars("epoch")] == [line["epoch"] + 1 for line in lines]
    for key in ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5"):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        assert points == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines], key
    assert [event.step for event in events.Scalars("step_loss")] == list(range(4, 89, 4))
    assert sorted(events.Tags()["images"]) == sorted(f"pictures/{name}" for name in PICTURES)
    assert [len(events.Images(f"pictures/{name}")) for name in PICTURES] == [1, 1, 1]
    texts = [events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("config", "summary")]
    assert b'"parameters": 83126' in texts[0]
    assert b'"best_val_top1"' in texts[1]


# Calls of W&B


class FakeRun:
    """Records its calls, and fails or hangs on request."""

    def __init__(self, folder: Path, fail_at: str = "", hang: threading.Event | None = None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.summary: dict[str, Any] = {}
        self.settings = SimpleNamespace(mode="online")
        self.id, self.url = "fake", "https://example.org/fake"
        self.dir = str(folder / "wandb" / "run-fake" / "files")
        self._fail_at, self._hang = fail_at, hang

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._fail_at == "log":
            raise ConnectionError("the network is gone")
        self.logged.append({**values, "_step": step})

    def finish(self, exit_code: int) -> None:
        if self._fail_at == "finish":
            raise ConnectionError("the network is gone")
        if self._hang is not None:
            self._hang.wait()
        self.exit_codes.append(exit_code)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Collect the arguments of each wandb.init, which returns a FakeRun; no login."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        return FakeRun(tmp_path)

    monkeypatch.setattr(wandb, "init", init)
    without_login(monkeypatch, tmp_path / "home")
    return calls


@pytest.fixture
def run_log(tmp_path: Path) -> Iterator[RunLog]:
    (tmp_path / "run").mkdir()
    written = RunLog(tmp_path / "run")
    yield written
    written.finish()
    wandb.teardown()


def start(log: RunLog, config: WandbConfig = PROJECT, run_config: dict[str, Any] | None = None) -> None:
    log.start_trackers(LogConfig(wandb=config), run_config or {}, 0)


def said(tmp_path: Path) -> str:
    return (tmp_path / "run" / "log.txt").read_text()


def test_disabled_trackers_are_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from configs.schema import LogConfig\n"
        "from train.reporting.metrics_file import MetricsLine\n"
        "from train.reporting.run_log import RunLog\n"
        "log = RunLog(Path(sys.argv[1])); log.start_trackers(LogConfig(), {}, 0); log.log_epoch(MetricsLine(epoch=0))\n"
        "sys.exit('wandb' in sys.modules or 'tensorboard' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, env=CLEAN, check=False).returncode == 0


@pytest.mark.parametrize(
    ("mode", "environment", "login", "expected"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, "key", "online"),
        ("auto", None, "netrc", "online"),
        ("offline", None, "key", "offline"),
        ("online", None, None, "offline"),
        ("online", "offline", "key", "offline"),
        ("online", "disabled", "key", None),
    ],
)
def test_environment_overrides_config_and_online_needs_login(
    mode: Any,
    environment: str | None,
    login: str | None,
    expected: str | None,
    asked: list[dict[str, Any]],
    run_log: RunLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "home").mkdir()
    if login == "key":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if login == "netrc":
        netrc = tmp_path / "home" / ".netrc"
        host = wandb.Settings().base_url.removeprefix("https://")
        netrc.write_text(f"machine {host} login user password {'0' * 40}\n")
        netrc.chmod(0o600)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    start(run_log, WandbConfig(project="zhu", mode=mode))
    assert [arguments["mode"] for arguments in asked] == ([expected] if expected else [])
    assert ("wandb login" in said(tmp_path)) == (mode == "online" and login is None)


def test_wandb_gets_its_section_and_the_config(asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path) -> None:
    section = WandbConfig(project="zhu", entity="team", group="many", tags=("a", "b"), mode="offline")
    start(run_log, section, {"seed": 3})
    (arguments,) = asked
    assert (arguments["project"], arguments["entity"], arguments["group"]) == ("zhu", "team", "many")
    assert (arguments["tags"], arguments["config"], arguments["name"]) == (("a", "b"), {"seed": 3}, "run")
    assert arguments["dir"] == str(tmp_path / "run")


def test_resumed_run_keeps_its_wandb_id(asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path) -> None:
    (tmp_path / "run" / "wandb_id.txt").write_text("earlier\n")
    start(run_log, WandbConfig(project="zhu", mode="offline"))
    assert (asked[0]["id"], asked[0]["resume"]) == ("earlier", "allow")


def test_sweep_agent_names_project_and_run(
    asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "wandb_id.txt").write_text("earlier\n")
    for name in ("SWEEP_ID", "RUN_ID", "PROJECT", "ENTITY"):
        monkeypatch.setenv(f"WANDB_{name}", "agents")
    start(run_log, WandbConfig(mode="offline"))  # without a project
    assert [asked[0][key] for key in ("id", "project", "entity")] == [None, None, None]
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == "fake\n"


# Failures


def test_missing_wandb_is_reported_and_the_run_continues(
    run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(run_log)
    assert "W&B is off for this run: ModuleNotFoundError" in said(tmp_path)


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_late_wandb_failure_is_reported_once_with_advice(
    failing: str, asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(tmp_path, fail_at=failing))
    start(run_log)
    for epoch in range(2):
        run_log.log_epoch(MetricsLine(epoch=epoch, step=epoch, train_loss=1.5))
    run_log.log_figure("pictures/none", lambda: figures.curves([], "empty"), 2)
    run_log.finish()
    assert len(strict_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert said(tmp_path).count("the network is gone") == 1
    assert f"wandb sync --include-online {tmp_path / 'wandb' / 'run-fake'}" in said(tmp_path)


def test_hanging_finish_is_abandoned(
    asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(tmp_path, hang=hang))
    monkeypatch.setattr(wandb_tracker, "FINISH_TIMEOUT_S", 0.1)
    monkeypatch.setattr(wandb_tracker, "FINISH_GRACE_S", 0.1)
    start(run_log)
    run_log.finish()
    hang.set()
    assert "W&B did not take everything" in said(tmp_path)
    assert "wandb sync --include-online" in said(tmp_path)


def test_hanging_wandb_is_dropped_for_the_rest_of_the_run(
    asked: list[dict[str, Any]], run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = threading.Event()
    run = FakeRun(tmp_path, hang=hang)  # its finish would hang as well
    calls: list[int] = []
    monkeypatch.setattr(run, "log", lambda values, step: calls.append(step) or hang.wait())
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb_tracker, "LOG_TIMEOUT_S", 0.1)
    start(run_log)
    for epoch in range(3):
        run_log.log_epoch(MetricsLine(epoch=epoch, step=epoch, train_loss=1.5))
    run_log.finish()
    assert (calls, run.exit_codes) == ([0], [])
    hang.set()
    assert len(strict_lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert said(tmp_path).count("W&B stops here, the run continues (TimeoutError") == 1
    assert "wandb sync --include-online" in said(tmp_path)


def test_call_with_timeout_raises_the_error_of_the_function() -> None:
    assert call_with_timeout(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(5, lambda: 1 // 0)


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    """Addresses of a server that refuses requests, and of one that never answers."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(401)

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as refusing, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        ports = {"refuses": refusing.server_address[1], "is silent": silent.getsockname()[1]}
        yield {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        refusing.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "key"), [("refuses", "0" * 40), ("is silent", "0" * 40), ("refuses", "garbage")])
def test_broken_server_or_key_makes_the_run_offline(
    case: str,
    key: str,
    server: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_login(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", server[case])
    monkeypatch.setattr(wandb_tracker, "INIT_TIMEOUT_S", 2.0)
    (tmp_path / "run").mkdir()
    with RunLog(tmp_path / "run") as log:
        start(log)
        log.log_epoch(MetricsLine(epoch=0, step=44, train_loss=1.5))
    assert "W&B cannot go online" in said(tmp_path)
    assert f"upload this run with: wandb sync {tmp_path / 'run' / 'wandb'}" in said(tmp_path)
    (folder,) = offline_runs(tmp_path / "run")
    assert [row["train_loss"] for row in wandb_rows(folder)] == [1.5]
    captured = capfd.readouterr()
    assert captured.err == ""
    messages = [line.split(" ", 1)[1] for line in said(tmp_path).splitlines()]
    assert len(set(captured.out.splitlines()) - set(messages)) == 2  # the table of one epoch


# Pictures


def test_showing_samples_keeps_the_stream_position(npy_data: Path) -> None:
    data = DataConfig(path=str(npy_data), batch_size=64)
    shown: list[str] = []
    log = SimpleNamespace(has_trackers=True, log_figure=lambda key, draw, step: shown.append(key) or draw())
    loader, untouched = (build_train_loader(data, AugConfig(crop="pad"), seed=1, device="cpu") for _ in range(2))
    show_samples(log, loader, [str(number) for number in range(100)])
    assert shown == ["pictures/train_samples"]
    for batch, expected in zip(loader, untouched, strict=True):
        assert torch.equal(batch.images, expected.images)


def test_samples_are_shown_mixed_if_the_run_mixes(npy_data: Path) -> None:
    data, aug = DataConfig(path=str(npy_data), batch_size=64), AugConfig(mix=MixConfig(mixup=1.0, mode="pair"))
    drawn: list[Figure] = []
    log = SimpleNamespace(has_trackers=True, log_figure=lambda key, draw, step: drawn.append(draw()))
    loader = build_train_loader(data, aug, seed=1, device="cpu")
    show_samples(log, loader, [str(number) for number in range(100)])
    batch = next(iter(loader))
    assert isinstance(batch, MixedBatch)
    axes = drawn[0].axes[:GRID_IMAGES]
    captions = [
        f"{label} {share:.2f} + {other} {1 - share:.2f}"
        for label, other, share in zip(batch.labels, swap_pairs(batch.labels), batch.mix[:, 0], strict=True)
    ]
    assert [axis.get_title() for axis in axes] == captions[:GRID_IMAGES]
    shown = np.stack([axis.get_images()[0].get_array() for axis in axes])
    expected = mix_images(batch.images, batch.mix)[:GRID_IMAGES].permute(0, 2, 3, 1).numpy()
    assert np.abs(shown - expected).max() <= 0.5


def test_collected_predictions_agree_with_the_evaluation(digits_run: Run) -> None:
    data = DataConfig(path=str(digits_run.data), batch_size=64)
    loader = build_eval_loader(data, device="cpu")
    with alone():
        state = make_state(lenet())
        counts, shown, logits = collect_predictions(state, loader, "none", 10)
        result = evaluate(state, loader, 360)
        all_logits = torch.cat([logits for logits, _ in predictions(state, loader)])
    assert counts.sum() == 360
    assert np.trace(counts) / 360 == pytest.approx(result.top1)
    images = torch.cat([batch.images.clone() for batch in loader])
    wanted = np.linspace(0, 359, GRID_IMAGES).round().astype(int)
    assert torch.equal(shown.images, images[wanted])
    assert torch.equal(logits, all_logits[wanted])


def counts_on(ranks: Ranks, path: str) -> list[int]:
    where = {"device": "cpu", "rank": ranks.rank, "world_size": ranks.world_size}
    loader = build_eval_loader(DataConfig(path=path, batch_size=64), **where)
    counts, shown, logits = collect_predictions(make_state(lenet()), loader, "none", 10)
    return [int(counts.sum()), len(shown.images), len(logits)]


@pytest.mark.slow
def test_all_ranks_together_count_each_sample_once(digits_run: Run) -> None:
    assert on_ranks(2, counts_on, str(digits_run.data)) == [[360, GRID_IMAGES, GRID_IMAGES]] * 2
