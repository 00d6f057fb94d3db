"""The pictures of the stages ramp and profile; the bar chart of a whole run is in benchmarks.engine.charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from train.reporting.figures import add_legend, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tools.perf.batch_size_search import BatchSizeSearch

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
LOG_FROM = 20.0  # ratio of the largest to the smallest rate from which its axis is logarithmic


def plot_batch_sizes(searches: list[BatchSizeSearch], limit: tuple[float, str] | None, where: str) -> Figure:
    """Draw images/s and peak memory over the batch size; limit: GiB and what it is called, a dashed line.

    A star marks the fastest batch of each model, a diamond the largest that fits.
    """
    figure, (rates, memories) = new_figure(1, 2, size=(13, 5))
    searches = [one for one in searches if one.fitting]
    lines = [_curve(rates, memories, one, COLORS[number % len(COLORS)]) for number, one in enumerate(searches)]
    names = [_legend_text(one) for one in searches]
    every_rate = [size.rate for one in searches for size in one.fitting]
    if max(every_rate) > LOG_FROM * min(every_rate):
        rates.set_yscale("log")
    else:
        rates.set_ylim(bottom=0)
    tallest = max(size.memory_gib or 0.0 for one in searches for size in one.fitting)
    memories.set_ylim(0, 1.15 * max(tallest, limit[0] if limit is not None else 0.0))
    if limit is not None:
        lines.append(memories.axhline(limit[0], color="#333333", linestyle="--", linewidth=1))
        names.append(f"{limit[1]}, {limit[0]:.3g} GiB")
    batches = [size.batch_size for one in searches for size in one.fitting]
    for axis, label in ((rates, "training images/s, median and range of the rounds"), (memories, "peak memory, GiB")):
        _powers_of_two(axis, min(batches), max(batches))
        axis.set_xlabel("batch size, images")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    add_legend(figure, lines, names, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"Training step on a resident batch: {where}", parse_math=False)
    return figure


def plot_profile(facts: dict[str, Any]) -> Figure:
    """A step's phases as parts of one bar, the step without the profiler beside it, and the longest operators."""
    figure, (steps, operators) = new_figure(2, 1, size=(11, 6.5))
    begin = 0.0
    bars = {f"profiled, {facts['steps']} steps": facts["step_ms"]}
    bars |= {
        f"without profiler{f', {name}' if len(facts['unprofiled_step_ms']) > 1 else ''}": ms
        for name, ms in facts["unprofiled_step_ms"].items()
    }
    for part in facts["phases"]:
        label = f"{part['phase']} {part['ms']:.3g} ms, {part['share']:.0%}"
        steps.barh([0], [part["ms"]], left=begin, color=PHASE_COLORS[part["phase"]], label=label, height=0.6)
        begin += part["ms"]
    steps.barh(range(1, len(bars)), list(bars.values())[1:], color="#d9dee2", height=0.6)
    steps.set_yticks(range(len(bars)), list(bars), parse_math=False)
    steps.invert_yaxis()
    steps.set_xlabel("ms per step")
    steps.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9)
    named = [
        (each["name"] if len(each["name"]) <= 48 else f"{each['name'][:45]}…", each["ms"])
        for each in reversed(facts["operators"])
    ]
    operators.barh(range(len(named)), [ms for _, ms in named], color=COLORS[1], height=0.7)
    operators.set_yticks(range(len(named)), [name for name, _ in named], fontsize=8, parse_math=False)
    operators.set_xlabel("ms per step, its own time")
    operators.set_title("operators or kernels that take most", fontsize=10, loc="left")
    for axis in (steps, operators):
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    where = facts["environment"]
    what = f"{facts['name']}, batch {facts['batch_size']}, {facts['precision']}"
    figure.suptitle(f"{what}: {facts['ranks']} x {where['device']}", parse_math=False)
    return figure


def _legend_text(one: BatchSizeSearch) -> str:
    fits = f"{one.target.name}: {'' if one.end == 'memory' else 'at least '}{one.largest:,} images fit"
    return fits if one.best is None else f"{fits}, {one.best.batch_size:,} are fastest"


def _curve(rates: Axes, memories: Axes, one: BatchSizeSearch, color: str) -> Artist:
    """Draw both panels' lines of one model, through its sizes of several rounds to the largest batch.

    Returns the line for the legend.
    """
    shown = [size for size in one.fitting if size in one.reliable or size.batch_size == one.largest]
    batches = [size.batch_size for size in shown]
    ranges = [[s.rate - min(s.rates) for s in shown], [max(s.rates) - s.rate for s in shown]]
    style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "linewidth": 1.5}
    rates.errorbar(batches, [s.rate for s in shown], yerr=ranges, capsize=2, **style)
    (line,) = memories.plot(batches, [s.memory_gib or 0.0 for s in shown], **style)
    marks = [(memories, shown[-1].batch_size, shown[-1].memory_gib or 0.0, "D", 8)]
    if one.best is not None:
        marks.append((rates, one.best.batch_size, one.best.rate, "*", 14))
    for axis, batch, height, marker, size in marks:
        axis.plot([batch], [height], marker=marker, markersize=size, color=color, linestyle="none")
        axis.annotate(
            f"{batch:,}",
            (batch, height),
            textcoords="offset points",
            xytext=(9, 6),
            va="center",
            fontsize=9,
            color=color,
        )
    return line


def _powers_of_two(axis: Axes, least: int, most: int) -> None:
    axis.set_xscale("log", base=2)
    first, last = least.bit_length() - 1, (most - 1).bit_length()
    every = 1 + (last - first) // 20
    ticks = [2**power for power in range(first, last + 1, every)]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, ha="right", fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlim(2 ** (first - 0.4), max(4 * most, 2 * ticks[-1]))
