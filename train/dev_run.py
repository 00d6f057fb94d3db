"""Try a config out: train two steps, evaluate, save, resume and train two more, in a temporary folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from configs.schema import Config, WandbConfig
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from train.build import Job
from train.distributed import collectives
from train.report import RunEnd

STEPS = 2  # before and after the resume


def fast_dev_run(job: Job, train: Callable[[Job, str | None], RunEnd]) -> int:
    """Train a new run for STEPS steps, resume it for STEPS more, remove its folder, and return the exit status.

    All ranks must call this function.

    Args:
        job: The job to try out, on its device.
        train: Function that trains or resumes a run, such as `run.train`.

    Raises:
        UserError: The temporary folder cannot be created, or anything that ends a run.
    """
    with temporary_output(job) as output:
        for steps, resume in ((STEPS, None), (2 * STEPS, "auto")):
            ended = train(replace(job, config=dev_config(job.config, output, job.passes, steps)), resume)
            if ended.exit_code:
                return ended.exit_code
    if job.ranks.is_first:
        print(
            f"fast dev run: trained {STEPS} steps, evaluated, saved, resumed, trained {STEPS} more steps and evaluated "
            "again; all worked, and nothing was kept"
        )
    return 0


def dev_config(config: Config, output: Path, passes: int, steps: int) -> Config:
    """Return the config of a run that stops after `steps` steps, with as few samples as an epoch of STEPS steps needs.

    Trackers that send data elsewhere are off. `passes` is `Job.passes`.
    """
    largest = max(data_at(config.data, epoch).batch_size for epoch in stage_starts(config.data))
    changes = {
        "max_steps": steps,
        "first_epoch": 0,
        "epochs": max(2 * STEPS, config.train.epochs),  # at least one step each
        "patience": None,
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"limit": STEPS * largest * passes}),
            "train": config.train.model_copy(update=changes),
            "log": config.log.model_copy(update={"every_steps": 1, "wandb": WandbConfig()}),
            "output": str(output),
        }
    )


@contextmanager
def temporary_output(job: Job) -> Iterator[Path]:
    """Create a folder in OUTPUT, which all machines share, and remove it on exit with all folders made for it.

    All ranks must enter the context.

    Raises:
        UserError: The folder cannot be created.
    """
    output = Path(job.config.output)
    created = [folder for folder in (output, *output.parents) if not folder.exists()]

    def create() -> Path:
        try:
            output.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".fast-dev-run-", dir=output))
        except OSError as error:
            raise UserError(f"cannot write to {output}: {error.strerror}; give another --output") from None

    folder = collectives.from_first_rank(create)
    try:
        yield folder
    finally:
        if job.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created:
                with suppress(OSError):  # another process uses it
                    parent.rmdir()
