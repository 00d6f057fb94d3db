"""Weights & Biases as a tracker: online where it can be, else offline; never in the way of the run.

Whatever the network, the server or the key do, a start takes half a minute at most and an end little longer, the points
lie on disk, and the run is told the command that uploads them. wandb is imported only when it is on.
"""

from __future__ import annotations

import os
import shlex
import signal
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import WandbConfig
from configs.utils.files import read_small_text
from train.reporting.trackers import call_with_timeout, single_line

INIT_S = 20.0  # for the server to answer
LOG_S = 10.0  # for wandb's own process to take a point or a picture, which it does at once as long as it is well
FINISH_S = 30.0  # for what is left to be uploaded
GRACE_S = 15.0  # on top, for wandb to notice that this time is over
HURRY_S = 5.0  # instead of both, when the run was told to end
TEARDOWN_S = 5.0
BY_EPOCH = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "ema_val_loss", "ema_val_top1",
            "ema_val_top5", "epoch_time_s")  # fmt: skip


class WandbTracker:
    title = "W&B"

    def __init__(self, run: Any, wandb: Any) -> None:
        self._run = run
        self._wandb = wandb
        self._is_offline = bool(run.settings.mode in ("offline", "dryrun"))
        folder = Path(run.dir).parent
        # a run that was resumed has several offline folders, which belong together
        which = [str(folder.parent)] if self._is_offline else ["--include-online", str(folder)]
        self._is_stuck = False
        self._sync_command = f"wandb sync {shlex.join(which)}"
        self.advice = f"what it got until here is uploaded by: {self._sync_command}"
        run.define_metric("step")
        run.define_metric("epoch")
        run.define_metric("*", step_metric="step")
        for name in BY_EPOCH:
            run.define_metric(name, step_metric="epoch")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        # Steps of W&B's own are ours: the server leaves out what a resumed run repeats.
        self._give(lambda: self._run.log({"step": step, **values}, step=step))

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        self._give(lambda: self._run.log({"step": step, key: self._wandb.Image(pixels)}, step=step))

    def update_summary(self, values: Mapping[str, float]) -> None:
        self._give(lambda: self._run.summary.update(dict(values)))

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        limit_s, grace_s = (HURRY_S, 0.0) if fast else (FINISH_S, GRACE_S)
        try:
            if not self._is_stuck:
                call_with_timeout(limit_s + grace_s, lambda: self._run.finish(exit_code=int(failed)))
        except TimeoutError:
            return f"W&B did not take everything within {limit_s:.0f} s; upload the rest with: {self._sync_command}"
        finally:
            end_service(self._wandb)
        return f"W&B was offline; upload this run with: {self._sync_command}" if self._is_offline else None

    def _give(self, call: Callable[[], object]) -> None:
        """wandb's process may be stopped or wait for a disk: then the pipe to it fills up, and a write would hang."""
        try:
            call_with_timeout(LOG_S, call)
        except TimeoutError:
            self._is_stuck = True
            raise


def start_wandb(
    config: WandbConfig, folder: Path, run_config: dict[str, Any], say: Callable[[str], None]
) -> WandbTracker | None:
    """The tracker of the run in `folder`, or None where W&B is off. A resumed run goes on under its id."""
    mode = os.environ.get("WANDB_MODE") or config.mode
    if (config.project is None and "WANDB_SWEEP_ID" not in os.environ) or mode == "disabled":
        return None
    # wandb's reports on itself go to the server as well, and an end would wait for them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        console="off", silent=True, init_timeout=INIT_S, finish_timeout=FINISH_S, finish_timeout_raises=True
    )
    wandb.setup(settings=settings)
    id_file = folder / "wandb_id.txt"
    run_id = read_small_text(id_file).strip() if id_file.exists() else uuid.uuid4().hex[:8]

    def init(mode: Any) -> Any:
        return wandb.init(
            # None: what the environment says, as it is set by `wandb agent`
            id=None if "WANDB_RUN_ID" in os.environ else run_id,
            name=None if "WANDB_NAME" in os.environ else folder.name,
            project=None if "WANDB_SWEEP_ID" in os.environ else config.project,
            entity=None if "WANDB_SWEEP_ID" in os.environ else config.entity,
            group=config.group, tags=config.tags or None, mode=mode, resume="allow", dir=str(folder),
            config=run_config, settings=settings,
        )  # fmt: skip

    run = None
    if mode not in ("offline", "dryrun"):
        try:
            if wandb.login(prompt=False, verify=False):  # never asks, and is not there to look at the key
                run = init("online" if mode == "auto" else mode)
            elif mode != "auto":
                raise PermissionError("there is no login, which `wandb login` makes")
        except Exception as error:
            say(f"W&B cannot go online ({single_line(error)}); this run is recorded offline")
            end_service(wandb)
            wandb.setup(settings=settings)
    run = run or init("offline")
    id_file.write_text(run.id + "\n", encoding="utf-8")
    if run.url and run.settings.mode != "offline":
        say(f"W&B shows this run at {run.url}")
    return WandbTracker(run, wandb)


def end_service(wandb: Any) -> None:
    """End wandb's service process, for which this one would else wait at its own end, however long.

    What it has not uploaded lies in its files.
    """
    with suppress(Exception, SystemExit):  # which is how a service that failed is reported
        call_with_timeout(TEARDOWN_S, wandb.teardown)
    with suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split():
            if (
                Path(f"/proc/{child}/comm")
                .read_text(encoding="utf-8", errors="replace")
                .strip()
                .startswith("wandb-core")
            ):
                os.kill(int(child), signal.SIGKILL)
