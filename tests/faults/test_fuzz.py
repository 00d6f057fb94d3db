"""Reading any file succeeds or raises a one-line UserError, in bounded time and memory.

`make test` draws a few examples of each kind, always the same ones. `make fuzz` draws others for ZHU_FUZZ_MINUTES in
total. A failure shows how to repeat it: ZHU_FUZZ_SEED for the round, and Hypothesis's own line for the example.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import helpers.fuzz as kinds
from configs.utils.errors import UserError, printable
from pipelines import memory_limit

EXAMPLE_SECONDS = 20  # limit of one example on a busy machine
EXAMPLE_BYTES = 1 << 30
ROUND_EXAMPLES = 200
MINUTES = float(os.environ.get("ZHU_FUZZ_MINUTES", 0))


@dataclass(frozen=True)
class Target:
    examples: st.SearchStrategy[Any]
    read: Callable[[Any], None]
    quick: int = 40  # examples in `make test`
    apart: bool = False  # in a separate process, since a C library may crash


def targets(folder: Path) -> dict[str, Target]:
    def own(name: str) -> Path:
        (folder / name).mkdir(exist_ok=True)
        return folder / name

    tar = kinds.cifar_tar(own("cifar"))
    npy, jpeg = kinds.make_data(own("npy"), "npy"), kinds.make_data(own("jpeg"), "jpeg")
    run, weights = kinds.run_files(own("config")), kinds.weights_files()
    configs = st.tuples(kinds.config_texts(), kinds.OVERRIDES)
    saved = kinds.saved(kinds.STATE)
    return {
        "batch": Target(kinds.damaged(kinds.batch_pickle(), kinds.batch_of_protocol_5()), kinds.read_batch, 80),
        "names": Target(kinds.damaged(kinds.official_pickle({"label_names": [b"cat", b"dog"]})), kinds.read_names, 80),
        "opcodes": Target(kinds.OPCODES, kinds.read_batch, 80),
        "tar": Target(kinds.damaged(tar).map(kinds.zipped), kinds.read_archive(own("cifar"))),
        "gzip": Target(kinds.damaged(kinds.zipped(tar)), kinds.read_archive(own("cifar"))),
        "hdf5": Target(kinds.damaged(*kinds.hdf5_files(own("hdf5"))), kinds.read_hdf5(own("hdf5")), apart=True),
        "image": Target(kinds.damaged(*kinds.image_files()), kinds.read_image, 60, apart=True),
        "config": Target(configs, kinds.read_config(own("config")), 50),
        "npy data set": Target(kinds.damaged_data(npy), kinds.read_data(own("npy"), npy), 60),
        "jpeg data set": Target(kinds.damaged_data(jpeg), kinds.read_data(own("jpeg"), jpeg)),
        "checkpoint": Target(kinds.damaged(saved), kinds.read_checkpoint(own("checkpoint"), is_sealed=True)),
        "unsealed checkpoint": Target(
            kinds.damaged(kinds.forged(saved, 1, 0)), kinds.read_checkpoint(own("checkpoint"), is_sealed=False)
        ),
        **{
            f"weights {suffix}": Target(kinds.damaged(content), kinds.read_weights_file(own("weights"), suffix))
            for suffix, content in weights.items()
        },
        "run folder": Target(kinds.damaged_run(run), kinds.read_run_folder(own("run"), run)),
    }


NAMES = [
    "batch",
    "names",
    "opcodes",
    "tar",
    "gzip",
    "hdf5",
    "image",
    "config",
    "npy data set",
    "jpeg data set",
    "checkpoint",
    "unsealed checkpoint",
    "weights .safetensors",
    "weights .pth",
    "run folder",
]


class Hang(BaseException):
    """Raised when an example takes too long."""


@contextmanager
def watched() -> Iterator[None]:
    """Limit time and memory of one example; a hang in C ends the process with a traceback."""

    def stop(*_: object) -> None:
        raise Hang(f"no end within {EXAMPLE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, EXAMPLE_SECONDS)
    faulthandler.dump_traceback_later(EXAMPLE_SECONDS + 20, exit=True)
    try:
        with memory_limit.at_most(EXAMPLE_BYTES):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def hold(read: Callable[[Any], None], example: Any) -> None:
    with watched():
        try:
            read(example)
        except UserError as error:
            assert len(printable(str(error))) < 5_000  # noqa: PT017 - any other exception fails by itself


def run_isolated(read: Callable[[Any], None], example: Any) -> None:
    """Run an example in a forked process, whose death by a signal counts as a failure."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(receiver)
            hold(read, example)
            code = 0
        except BaseException:
            os.write(sender, traceback.format_exc()[-4_000:].encode(errors="replace"))
        finally:
            os._exit(code)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, said or f"ended by {signal.Signals(-code).name}"


def run(target: Target, examples: int, round_seed: int | None) -> None:
    """Draw examples; the same ones each time if `round_seed` is None."""

    @settings(
        max_examples=examples,
        derandomize=round_seed is None,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.examples)
    def holds(example: Any) -> None:
        (run_isolated if target.apart else hold)(target.read, example)

    (holds if round_seed is None else seed(round_seed)(holds))()


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_damaged_file_is_read_or_refused(all_targets: dict[str, Target], name: str) -> None:
    assert set(NAMES) == all_targets.keys()
    run(all_targets[name], all_targets[name].quick, None)


@pytest.mark.skipif(not MINUTES, reason="runs for ZHU_FUZZ_MINUTES (make fuzz)")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_of_new_kinds_are_read_or_refused(all_targets: dict[str, Target], name: str) -> None:
    given_seed = int(os.environ.get("ZHU_FUZZ_SEED", 0))
    chance, rounds, end = random.SystemRandom(), 0, time.monotonic() + 60 * MINUTES / len(NAMES)
    while time.monotonic() < end and (rounds == 0 or not given_seed):
        round_seed = given_seed or chance.randrange(1, 2**32)
        print(f"ZHU_FUZZ_SEED={round_seed}")
        run(all_targets[name], ROUND_EXAMPLES, round_seed)
        rounds += 1
    print(f"{name}: {rounds} rounds of {ROUND_EXAMPLES} examples")


def test_watchdog_ends_hanging_and_memory_hungry_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.EXAMPLE_SECONDS", 0.2)
        with pytest.raises(Hang):
            hold(lambda _: time.sleep(5), None)
    with pytest.raises(MemoryError):
        hold(lambda _: print(len(bytearray(2 << 30))), None)
    with pytest.raises(AssertionError, match="ended by SIGKILL"):
        run_isolated(lambda _: os.kill(os.getpid(), signal.SIGKILL), None)
    with pytest.raises(AssertionError, match="KeyError: 'x'"):
        run_isolated(lambda example: example["x"], {})
