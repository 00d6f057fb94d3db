"""Log to Weights & Biases, online if possible and offline otherwise.

Network failures, server failures and invalid API keys never block the run. In these cases, starting takes at most about
half a minute, finishing takes less than a minute, the data stays on disk, and the log shows the command to upload it.
wandb is imported only if it is used.
"""

from __future__ import annotations

import os
import shlex
import signal
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.schema import WandbConfig
from configs.utils.files import read_small_text
from train.reporting.trackers import call_with_timeout, single_line

if TYPE_CHECKING:
    import wandb

ID_FILE = "wandb_id.txt"  # in the run folder
OFFLINE_MODES = ("offline", "dryrun")
INIT_TIMEOUT_S = 20.0  # for an answer from the server
LOG_TIMEOUT_S = 10.0  # for wandb's process to accept a point or an image, normally immediate
FINISH_TIMEOUT_S = 30.0  # for uploading the remaining data
FINISH_GRACE_S = 15.0  # in addition, for wandb to notice its timeout
FAST_FINISH_S = 5.0  # replaces the sum of these two limits if finishing fast, e.g. after a signal
TEARDOWN_TIMEOUT_S = 5.0
EPOCH_METRICS = (
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "ema_val_loss",
    "ema_val_top1",
    "ema_val_top5",
    "epoch_time_s",
)


class WandbTracker:
    """Sends values and images to a W&B run.

    Args:
        run: The run that `wandb.init` returned.
    """

    title = "W&B"

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._is_offline = run.settings.mode in OFFLINE_MODES
        folder = Path(run.dir).parent
        # a resumed run has several offline folders
        which = [str(folder.parent)] if self._is_offline else ["--include-online", str(folder)]
        self._is_stuck = False
        self._sync_command = f"wandb sync {shlex.join(which)}"
        self.advice = f"upload the data so far with: {self._sync_command}"
        run.define_metric("step")
        run.define_metric("epoch")
        run.define_metric("*", step_metric="step")
        for name in EPOCH_METRICS:
            run.define_metric(name, step_metric="epoch")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        # With these steps as W&B's own steps, the server ignores points that a resumed run repeats.
        self._give(lambda: self._run.log({"step": step, **values}, step=step))

    def log_image(self, key: str, pixels: np.ndarray, step: int) -> None:
        import wandb

        self._give(lambda: self._run.log({"step": step, key: wandb.Image(pixels)}, step=step))

    def update_summary(self, values: Mapping[str, float]) -> None:
        self._give(lambda: self._run.summary.update(dict(values)))

    def finish(self, *, failed: bool, fast: bool = False) -> str | None:
        limit_s, grace_s = (FAST_FINISH_S, 0.0) if fast else (FINISH_TIMEOUT_S, FINISH_GRACE_S)
        try:
            if not self._is_stuck:
                call_with_timeout(limit_s + grace_s, lambda: self._run.finish(exit_code=int(failed)))
        except TimeoutError:
            return f"W&B did not take everything within {limit_s:.0f} s; upload the rest with: {self._sync_command}"
        finally:
            end_service()
        return f"W&B was offline; upload this run with: {self._sync_command}" if self._is_offline else None

    def _give(self, call: Callable[[], object]) -> None:
        """Execute `call` with a timeout.

        If wandb's process is stopped or waits for a disk, its pipe fills up and writing to the pipe blocks.

        Raises:
            TimeoutError: `call` takes longer than LOG_TIMEOUT_S. `finish` then does not wait for wandb's process.
        """
        try:
            call_with_timeout(LOG_TIMEOUT_S, call)
        except TimeoutError:
            self._is_stuck = True
            raise


def start_wandb(
    config: WandbConfig, folder: Path, run_config: Mapping[str, object], log: Callable[[str], None]
) -> WandbTracker | None:
    """Start the W&B tracker of a run. A resumed run keeps its W&B run id.

    Args:
        config: W&B settings.
        folder: The run folder.
        run_config: Plain nested values to show as the config of the run.
        log: Function that prints a message for the user.

    Returns:
        The tracker, or None if W&B is off.
    """
    mode = os.environ.get("WANDB_MODE") or config.mode
    if (config.project is None and "WANDB_SWEEP_ID" not in os.environ) or mode == "disabled":
        return None
    # wandb's own error reports go to the server as well, and finishing would wait for them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )
    wandb.setup(settings=settings)
    options = {**_init_options(config, folder, run_config), "settings": settings}
    run = None
    if mode not in OFFLINE_MODES:
        try:
            if wandb.login(prompt=False, verify=False):  # does not prompt, and does not check the key
                run = wandb.init(**{**options, "mode": "online" if mode == "auto" else mode})
            elif mode != "auto":
                raise PermissionError("not logged in; run `wandb login`")
        except Exception as error:
            log(f"W&B cannot go online ({single_line(error)}); this run is recorded offline")
            end_service()
            wandb.setup(settings=settings)
    run = run or wandb.init(**options, mode="offline")
    (folder / ID_FILE).write_text(run.id + "\n", encoding="utf-8")
    if run.url and run.settings.mode != "offline":
        log(f"W&B shows this run at {run.url}")
    return WandbTracker(run)


def _init_options(config: WandbConfig, folder: Path, run_config: Mapping[str, object]) -> dict[str, Any]:
    """Return options of wandb.init. None is taken from the environment, as set by `wandb agent`."""
    id_file = folder / ID_FILE
    run_id = read_small_text(id_file).strip() if id_file.exists() else uuid.uuid4().hex[:8]
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    return {
        "id": None if "WANDB_RUN_ID" in os.environ else run_id,
        "name": None if "WANDB_NAME" in os.environ else folder.name,
        "project": None if in_sweep else config.project,
        "entity": None if in_sweep else config.entity,
        "group": config.group,
        "tags": config.tags or None,
        "resume": "allow",
        "dir": str(folder),
        "config": run_config,
    }


def end_service() -> None:
    """End wandb's service process. Otherwise this process could wait for it indefinitely at exit.

    Data that has not been uploaded yet stays on disk.
    """
    import wandb

    with suppress(Exception, SystemExit):  # raised if the service has failed
        call_with_timeout(TEARDOWN_TIMEOUT_S, wandb.teardown)
    with suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split():
            command = Path(f"/proc/{child}/comm").read_text(encoding="utf-8", errors="replace")
            if command.strip().startswith("wandb-core"):
                os.kill(int(child), signal.SIGKILL)
