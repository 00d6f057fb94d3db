"""Plot the results of the subcommands ramp and profile. `tools.benchmarks.engine.charts` plots those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.reporting.figures import add_legend, new_figure, shorten, style_axes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tools.perf.batch_size_search import BatchSizeSearch
    from tools.perf.step_report import StepReport

COLORS = ("#c1440e", "#1f6f8b", "#6a8532", "#7b4b94", "#b08900", "#8a9ba8")
PHASE_COLORS = {
    "data": "#b08900",
    "host": "#d9dee2",
    "proxy": "#7b4b94",
    "forward": "#1f6f8b",
    "backward": "#c1440e",
    "reduce": "#333333",
    "optimizer": "#6a8532",
}
MAX_NAME_LENGTH = 46  # maximum length of an operator's name
LOG_SCALE_RATIO = 20.0  # ratio of the largest to the smallest rate from which the axis is logarithmic


def plot_batch_sizes(searches: list[BatchSizeSearch], limit: tuple[float, str] | None, machine: str) -> Figure:
    """Plot images/s and peak memory against the batch size.

    A star marks the fastest batch size of each model, and a diamond the largest that fits.

    Args:
        searches: One search per model. Those without a fitting trial are left out.
        limit: Size in GiB and name of the memory limit, drawn as a dashed line, or None for no line.
        machine: Description of the machine, for the title.
    """
    figure, (rate_axis, memory_axis) = new_figure(
        1, 2, size=(13, 5), title=f"Training step on a resident batch: {machine}"
    )
    searches = [search for search in searches if search.fitting]
    trials = [trial for search in searches for trial in search.fitting]
    lines = [
        _curve(rate_axis, memory_axis, search, COLORS[number % len(COLORS)]) for number, search in enumerate(searches)
    ]
    names = [_legend_text(search) for search in searches]
    rates = [trial.rate for trial in trials]
    if max(rates) > LOG_SCALE_RATIO * min(rates):
        rate_axis.set_yscale("log")
    else:
        rate_axis.set_ylim(bottom=0)
    max_memory = max(trial.memory_gib or 0.0 for trial in trials)
    memory_axis.set_ylim(0, 1.15 * max(max_memory, limit[0] if limit is not None else 0.0))
    if limit is not None:
        lines.append(memory_axis.axhline(limit[0], color="#333333", linestyle="--", linewidth=1))
        names.append(f"{limit[1]}, {limit[0]:.3g} GiB")
    sizes = [trial.batch_size for trial in trials]
    rate_label = "training images/s, median and range of the rounds"
    for axis, label in ((rate_axis, rate_label), (memory_axis, "peak memory, GiB")):
        _powers_of_two(axis, min(sizes), max(sizes))
        style_axes(axis, "batch size, images", label)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    add_legend(figure, lines, names, columns=2)
    return figure


def plot_profile(report: StepReport) -> Figure:
    """Plot the phases of a step, the step time without the profiler, and the operators that take the most time."""
    profile, unprofiled = report.profile, report.unprofiled_step_ms
    run = f"{report.config.name}, batch {report.config.data.batch_size}, {report.precision}"
    title = f"{run}: {report.ranks} x {report.environment['device']}"
    figure, (step_axis, operator_axis) = new_figure(2, 1, size=(11, 6.5), title=title)
    names = [f"without profiler{f', {mode}' if len(unprofiled) > 1 else ''}" for mode in unprofiled]
    left = 0.0
    for phase in profile.phases:
        label = f"{phase.phase} {phase.ms:.3g} ms, {phase.share:.0%}"
        step_axis.barh([0], [phase.ms], left=left, color=PHASE_COLORS[phase.phase], label=label, height=0.6)
        left += phase.ms
    step_axis.barh(range(1, len(names) + 1), list(unprofiled.values()), color="#d9dee2", height=0.6)
    step_axis.set_yticks(range(len(names) + 1), [f"profiled, {profile.steps} steps", *names], parse_math=False)
    step_axis.invert_yaxis()
    step_axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    operators = profile.operators[::-1]
    names = [shorten(operator.name, MAX_NAME_LENGTH) for operator in operators]
    operator_axis.barh(range(len(names)), [operator.ms for operator in operators], color=COLORS[1], height=0.7)
    operator_axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    operator_axis.set_title("operators or kernels that take most time", fontsize=10, loc="left")
    for axis, label in ((step_axis, "ms per step"), (operator_axis, "ms per step, without called operators")):
        style_axes(axis, label, grid="x")
        axis.set_axisbelow(True)
    return figure


def _legend_text(search: BatchSizeSearch) -> str:
    fits = f"{search.target.name}: {'' if search.end == 'memory' else 'at least '}{search.largest:,} images fit"
    return fits if search.best is None else f"{fits}, {search.best.batch_size:,} are fastest"


def _curve(rate_axis: Axes, memory_axis: Axes, search: BatchSizeSearch, color: str) -> Artist:
    """Plot the reliable trials and the largest batch size of one model. Return the line, for use in a legend."""
    trials = [trial for trial in search.fitting if trial in search.reliable or trial.batch_size == search.largest]
    sizes = [trial.batch_size for trial in trials]
    rates = [trial.rate for trial in trials]
    memory = [trial.memory_gib or 0.0 for trial in trials]
    errors = [
        [trial.rate - min(trial.rates) for trial in trials],
        [max(trial.rates) - trial.rate for trial in trials],
    ]
    rate_axis.errorbar(sizes, rates, yerr=errors, capsize=2, color=color, marker="o", markersize=4, linewidth=1.5)
    (line,) = memory_axis.plot(sizes, memory, color=color, marker="o", markersize=4, linewidth=1.5)
    _mark(memory_axis, sizes[-1], memory[-1], color, "D", 8)
    if search.best is not None:
        _mark(rate_axis, search.best.batch_size, search.best.rate, color, "*", 14)
    return line


def _mark(axis: Axes, batch_size: int, height: float, color: str, marker: str, size: int) -> None:
    axis.plot([batch_size], [height], color=color, linestyle="none", marker=marker, markersize=size)
    place = (batch_size, height)
    axis.annotate(f"{batch_size:,}", place, (9, 6), textcoords="offset points", va="center", fontsize=9, color=color)


def _powers_of_two(axis: Axes, minimum: int, maximum: int) -> None:
    axis.set_xscale("log", base=2)
    first, last = minimum.bit_length() - 1, (maximum - 1).bit_length()
    stride = 1 + (last - first) // 20
    ticks = [2**power for power in range(first, last + 1, stride)]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, ha="right", fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlim(2 ** (first - 0.4), max(4 * maximum, 2 * ticks[-1]))
