"""Report model costs for tools/summary.py, as rows, as Markdown text and as a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tools.common.model_costs import Costs
from tools.common.tables import Row, markdown
from tools.perf.model_cases import ModelCase
from train.reporting import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB, MEGA = 2**20, 1e6
KINDS = ("weights", "gradients", "optimizer", "activations")  # a row has KIND_bytes for each
COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
TOTAL = "total"
MIN_LOG_AXIS_RATIO = 30  # ratio of the largest to the smallest value from which the axis is logarithmic


def summary_row(case: ModelCase, costs: Costs, measured_bytes: int | None, amp: torch.dtype | None) -> Row:
    """Return a row of summary.csv, with FLOPs per image and bytes for the whole batch.

    `measured_bytes` is the measured training memory, or None if it is only estimated.
    """
    batch = case.batch_size
    return {
        "model": case.label,
        "architecture": case.model,
        "image_size": case.image_size,
        "classes": case.classes,
        "parameters": costs.parameters,
        "trainable": costs.trainable,
        "multiply_adds": round(costs.forward_flops / (2 * batch)),
        "forward_flops": round(costs.forward_flops / batch),
        "training_flops": round(costs.training_flops / batch),
        "batch_size": batch,
        "optimizer": case.train.optimizer.name,
        "precision": str(amp or torch.float32).removeprefix("torch."),
        "weights_bytes": costs.weight_bytes,
        "gradients_bytes": costs.gradient_bytes,
        "optimizer_bytes": costs.optimizer_bytes,
        "activations_bytes": costs.activation_bytes,
        "sum_bytes": costs.memory_bytes,
        "training_bytes": costs.memory_bytes if measured_bytes is None else measured_bytes,
        "memory": "estimated" if measured_bytes is None else "measured",
    }


def layer_rows(costs: Costs, batch_size: int) -> list[Row]:
    """Return the rows of layers-NAME.csv: the layers in order of execution, uncalled layers, and the total.

    FLOPs are per image, and bytes are for the whole batch.
    """
    rows: list[Row] = [
        {
            "layer": layer.name.removeprefix("network.") or "(model)",
            "type": layer.type,
            "output_shape": "x".join(map(str, layer.output_shape)) if layer.output_shape else None,
            "parameters": layer.parameters,
            "forward_flops": round(layer.flops / batch_size),
            "activations_bytes": layer.saved_bytes,
        }
        for layer in costs.layers
    ]
    sums = {key: sum(row[key] for row in rows) for key in ("parameters", "forward_flops", "activations_bytes")}
    return [*rows, {"layer": TOTAL, "type": "", "output_shape": None, **sums}]


def layers_table(rows: list[Row]) -> str:
    """Return the rows of `layer_rows` as a Markdown table."""
    table = [
        {
            "layer": row["layer"],
            "type": row["type"],
            "output shape": row["output_shape"],
            "parameters": row["parameters"],
            "MFLOP per image": row["forward_flops"] / MEGA,
            "saved for backward, MiB": row["activations_bytes"] / MIB,
        }
        for row in rows
    ]
    return markdown(table)


def format_report(rows: list[Row]) -> str:
    """Return the report as Markdown: tables of model size and memory, sentences that compare the models, and notes."""
    sizes = [
        {
            "model": row["model"],
            "image size": row["image_size"],
            "classes": row["classes"],
            "parameters": row["parameters"],
            "trainable": row["trainable"],
            "multiply-adds, M": row["multiply_adds"] / MEGA,
            "forward, MFLOP": row["forward_flops"] / MEGA,
            "training, MFLOP": row["training_flops"] / MEGA,
        }
        for row in rows
    ]
    memory = [
        {
            "model": row["model"],
            "batch": row["batch_size"],
            "optimizer": row["optimizer"],
            "precision": row["precision"],
            **{f"{_words(kind)}, MiB": row[f"{kind}_bytes"] / MIB for kind in KINDS},
            "training memory, MiB": row["training_bytes"] / MIB,
            "memory": row["memory"],
        }
        for row in rows
    ]
    how = {
        "estimated": "Estimated memory is the sum of the four kinds, without temporary buffers and the workspaces of "
        "libraries.",
        "measured": "Measured memory is the peak of allocated memory during two uncompiled steps, with temporary "
        "buffers. It may be less than the sum of the four kinds, since gradients replace activations.",
    }
    notes = [
        "FLOPs are per image, 2 per multiply-add of convolutions, matrix products and attention; training is the "
        "forward and the backward pass. Activations are the tensors saved for the backward pass.",
        *(how[kind] for kind in sorted({row["memory"] for row in rows})),
    ]
    return "\n\n".join([markdown(sizes), markdown(memory), *ratio_sentences(rows), " ".join(notes)])


def ratio_sentences(rows: list[Row]) -> list[str]:
    """Return a list with one paragraph that compares each model to the one with the fewest parameters.

    If there is only one model, the list is empty.
    """
    smallest = min(rows, key=lambda row: row["parameters"])
    sentences = []
    for row in rows:
        if row is smallest:
            continue
        quantities = {"parameters": "parameters", "forward_flops": "FLOPs", "training_bytes": "training memory"}
        times = [f"{_times(row[key] / smallest[key])} the {what}" for key, what in quantities.items() if smallest[key]]
        sentences.append(f"{row['model']} has {', '.join(times[:-1])} and {times[-1]} of {smallest['model']}.")
    return ["\n".join(sentences)] if sentences else []


def plot_costs(rows: list[Row]) -> Figure:
    """Plot the parameters, FLOPs and memory of each model as bars, and the shares of the four kinds of memory.

    The shares are plotted on separate axes, since stacked bars on a logarithmic axis would distort them.
    """
    figure, axes = figures.new_figure(2, 2, size=(11, 2.6 + 0.9 * len(rows)), title="Models side by side")
    labels = [f"{row['model']}\n{row['image_size']} x {row['image_size']}" for row in rows]
    for axis in axes:
        axis.set_yticks(range(len(rows)), labels, fontsize=9, parse_math=False)
        axis.invert_yaxis()
    _bars(axes[0], [row["parameters"] / MEGA for row in rows], "parameters, millions")
    _bars(axes[1], [row["forward_flops"] / MEGA for row in rows], "forward pass of one image, MFLOP")
    batches = sorted({row["batch_size"] for row in rows})
    how = " and ".join(sorted({row["memory"] for row in rows}))
    where = f"batch {', '.join(map(str, batches))}, {how}"
    _bars(axes[2], [row["training_bytes"] / MIB for row in rows], f"training memory, MiB ({where})")
    left = [0.0] * len(rows)
    for kind, color in zip(KINDS, COLORS, strict=True):
        shares = [100 * row[f"{kind}_bytes"] / row["sum_bytes"] for row in rows]
        axes[3].barh(range(len(rows)), shares, left=left, color=color, label=_words(kind))
        for place, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 8:
                axes[3].text(
                    start + share / 2, place, f"{share:.0f} %", ha="center", va="center", fontsize=8, color="w"
                )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes[3].set_xlim(0, 100)
    axes[3].set_xlabel("share of the four kinds of memory, %")
    axes[3].legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _bars(axis: Axes, values: list[float], label: str) -> None:
    axis.barh(range(len(values)), values, color=COLORS[0])
    smallest, largest = min(values), max(values)
    if smallest > 0 and largest / smallest >= MIN_LOG_AXIS_RATIO:
        axis.set_xscale("log")
        label += ", logarithmic"
        axis.set_xlim(smallest / 5, largest * 8)  # room for the bars and for the numbers beside them
    else:
        axis.set_xlim(0, largest * 1.2 or 1)
    for place, value in enumerate(values):
        axis.annotate(
            _number(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    figures.style_axes(axis, label, grid="x")
    axis.set_axisbelow(True)


def _words(kind: str) -> str:
    return "optimizer state" if kind == "optimizer" else kind


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.2g} times"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
