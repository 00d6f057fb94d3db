"""Report the results of batch size searches: table rows, summaries, and the files ramp.csv, ramp.json and ramp.png."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from tools.benchmarks.engine import process_memory, results
from tools.common.tables import Row, write_csv, write_json
from tools.perf import plots
from tools.perf.batch_size_search import BatchSizeSearch, Trial
from train.reporting.figures import save

NEAR_BEST = 0.95  # minimum share of the best rate that counts as near
NOISY = 2.0  # ratio of the fastest to the slowest round of a size above which the summary mentions noise


def trial_rows(searches: list[BatchSizeSearch]) -> list[Row]:
    """Return a row per trial for the CSV and JSON files, ordered by model and batch size."""
    return [_trial_row(search, trial) for search in searches for trial in search.by_size]


def display_rows(searches: list[BatchSizeSearch]) -> list[Row]:
    """Return a row per trial for the console, ordered by model and batch size."""
    return [_display_row(search, trial) for search in searches for trial in search.by_size]


def _trial_row(search: BatchSizeSearch, trial: Trial) -> Row:
    fits = trial.fits
    return {
        "model": search.target.name,
        "batch": trial.batch_size,
        "images_per_s": _significant(trial.rate) if fits else None,
        "lowest": _significant(min(trial.rates)) if fits else None,
        "highest": _significant(max(trial.rates)) if fits else None,
        "ms_per_step": _significant(1e3 * trial.batch_size / trial.rate) if fits else None,
        "memory_gib": _rounded(trial.memory_gib),
        "reserved_gib": _rounded(trial.reserved_gib),
        "device_memory_gib": _rounded(trial.device_memory_gib),
        "fits": None if trial.is_failure else fits,
        "step": trial.origin,
        "rounds": len(trial.rates),
        "error": trial.error,
    }


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def _rounded(gib: float | None) -> float | None:
    return None if gib is None else round(gib, 4)


def _display_row(search: BatchSizeSearch, trial: Trial) -> Row:
    row = _trial_row(search, trial)
    names = ["model", "batch", "images_per_s", "lowest", "highest", "ms_per_step", "memory_gib"]
    if search.target.on_gpu:
        names.append("device_memory_gib")
    remark = ""
    if trial.is_failure:
        remark = f"failed: {trial.error}"
    elif not trial.fits:
        remark = "does not fit"
    elif trial.batch_size == search.largest and search.end == "memory":
        remark = "largest that fits"
    shown = {name.replace("_per_", "/").replace("_", " ").replace("gib", "GiB"): row[name] for name in names}
    return shown | {"": remark}


def summary(search: BatchSizeSearch) -> Row:
    """Return the results of a search: the reason why it ended, the largest batch size and the best rate.

    `near_best_batch` is the smallest batch size in `search.reliable` with at least NEAR_BEST times the best rate.
    """
    best = search.best
    near_best = (trial.batch_size for trial in search.reliable if best and trial.rate >= NEAR_BEST * best.rate)
    return {
        "model": search.target.name,
        "end": search.end,
        "largest_batch": search.largest,
        "too_large_batch": search.too_large,
        "best_images_per_s": _significant(best.rate) if best else None,
        "best_batch": best.batch_size if best else None,
        "best_lowest": _significant(min(best.rates)) if best else None,
        "best_highest": _significant(max(best.rates)) if best else None,
        "near_best_batch": next(near_best, None),
    }


def summary_sentence(search: BatchSizeSearch) -> str:
    """Return the summary of a search as text."""
    values = summary(search)
    name, largest, too_large = search.target.name, values["largest_batch"], values["too_large_batch"]
    limit_bytes = search.target.limit_bytes
    memory = f"{limit_bytes / process_memory.GIB:.3g} GiB" if limit_bytes else "memory"
    reason = {
        "most": "the last one asked for",
        "time": "the time was over",
        "error": "a larger one failed" if largest else "the first one failed",
        "interrupted": "interrupted",
    }.get(search.end, "")
    if largest is None:
        return f"{name}: no batch was measured ({f'{too_large} does not fit into {memory}' if too_large else reason})."
    bound = f"{too_large:,} does not fit into {memory}" if too_large else reason
    if too_large and search.end != "memory":
        bound += f"; {reason}"
    spread, noisiest = max((max(trial.rates) / min(trial.rates), trial.batch_size) for trial in search.fitting)
    noise = f" The rounds of batch {noisiest:,} differ {spread:.1f} times: the machine is busy." * (spread > NOISY)
    best_range = f"{values['best_lowest']:,.0f} to {values['best_highest']:,.0f}"
    return (
        f"{name}: largest batch {'' if search.end == 'memory' else 'at least '}{largest:,} ({bound}); "
        f"best {values['best_images_per_s']:,.0f} images/s ({best_range}) at batch {values['best_batch']:,}, "
        f"{values['near_best_batch']:,} is the smallest within {100 - 100 * NEAR_BEST:.0f} % of it.{noise}"
    )


def write_results(searches: list[BatchSizeSearch], limit_bytes: int | None, out: Path) -> None:
    """Write ramp.csv and ramp.json, and ramp.png if any batch size fits. Print the paths of the files."""
    environment = results.environment()
    trials = [trial for search in searches for trial in search.trials]
    limit_gib = None if limit_bytes is None else limit_bytes / process_memory.GIB
    gpu_gib = next((trial.gpu_memory_gib for trial in trials if trial.gpu_memory_gib), None)
    rows = trial_rows(searches)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment,
        "memory_limit_gib": _rounded(limit_gib),
        "gpu_memory_gib": _rounded(gpu_gib),
        "models": [summary(search) for search in searches],
        "sizes": rows,
    }
    write_csv(out / "ramp.csv", rows)
    write_json(out / "ramp.json", content, indent=1, ensure_ascii=False)
    written = ["ramp.csv", "ramp.json"]
    if any(search.fitting for search in searches):
        limit_line = (limit_gib, "limit") if limit_gib else (gpu_gib, "the GPU's memory") if gpu_gib else None
        machine = f"{environment['device']}, {environment['cores']} cores, {environment['date']}"
        save(plots.plot_batch_sizes(searches, limit_line, machine), out / "ramp.png")
        written.append("ramp.png")
    with suppress(BrokenPipeError):
        print(f"wrote {', '.join(str(out / name) for name in written)}\n", flush=True)
