"""Draws the loss curve of a run from its metrics.jsonl and eval.jsonl."""

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from lm.errors import UserError
from lm.training.metrics import read_lines

# The palette of Okabe and Ito, safe for colour-blind readers.
_BLUE, _GREY = "#0072B2", "#8C8C8C"
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_UNITS = {"bits_per_byte": "bits per byte", "loss": "loss (nats per token)"}


def plot_loss(
    metrics: epath.PathLike, evaluations: epath.PathLike, path: epath.PathLike, name: str
) -> None:
    """Draws the loss curve of the run `name` into the PNG file `path`.

    The unit is bits per byte if the metrics have it, else nats per token. Held-out results of the
    same measure are points with bars of one standard error. The right axis is the learning rate.

    Raises UserError if `metrics` has no steps yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would change a notebook's backend

    lines = read_lines(metrics)
    if not lines:
        raise UserError(f"{metrics} holds no steps yet, so there is nothing to plot.")
    measure = "bits_per_byte" if "bits_per_byte" in lines[0] else "loss"
    steps, values, rates = (_column(lines, key) for key in ("step", measure, "learning_rate"))

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)  # draws the loss above the learning rate
    axes.patch.set_visible(False)

    axes.plot(steps, values, color=_BLUE, alpha=0.22, linewidth=0.8)
    smoothed = smooth(values)
    axes.plot(steps, smoothed, color=_BLUE, linewidth=2, label="training")
    shown = [smoothed]
    sources = _held_out(evaluations, measure)
    for colour, (source, results) in zip(itertools.cycle(_OTHERS), sources.items()):
        at, value, spread = (_column(results, key) for key in ("step", "value", "stderr"))
        spread = np.nan_to_num(spread)
        axes.errorbar(
            at,
            value,
            spread,
            color=colour,
            label=source,
            linewidth=1.2,
            marker="o",
            markeredgecolor="white",
            capsize=2.5,
        )
        shown += [value - spread, value + spread]
    right.plot(steps, rates, color=_GREY, linewidth=0.8, label="learning rate")
    right.fill_between(steps, rates, color=_GREY, alpha=0.06, linewidth=0)

    axes.set(xlabel="step", ylabel=_UNITS[measure], xlim=(0, steps[-1] * 1.01))
    axes.set_ylim(*_limits(np.concatenate(shown)))
    right.set_ylabel("learning rate", color=_GREY)
    right.set_ylim(0, 1.1 * np.nanmax(rates, initial=1e-9))
    right.yaxis.set_major_formatter(lambda x, _: _scientific(x))
    right.tick_params(axis="y", colors=_GREY)
    axes.set_title(name, loc="left", fontweight="bold")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    for side in (axes, right):
        side.spines[["top", "left", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0]
    axes.legend(handles=handles, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)

    image = io.BytesIO()
    figure.savefig(image, format="png")
    _replace(epath.Path(path), image.getvalue())


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a sixtieth of the run to each side, over less near the start, where the
    loss falls steeply. Values that are not finite are left out."""
    index = np.arange(len(values))
    half = np.minimum(len(values) // 60, index // 5)
    first, last = index - half, np.minimum(index + half, len(values) - 1)
    finite = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite)
    )
    total, count = sums[last + 1] - sums[first], counts[last + 1] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _column(lines: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([math.nan if line.get(key) is None else line[key] for line in lines])


def _held_out(path: epath.PathLike, measure: str) -> dict[str, list[dict[str, Any]]]:
    """{source: lines of eval.jsonl with the name SOURCE/MEASURE}."""
    results: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        source, _, name = line["name"].rpartition("/")
        if name == measure:
            results.setdefault(source, []).append(line)
    return results


def _scientific(x: float) -> str:
    """0.00125 -> '1.25e-3', 0.001 -> '1e-3'."""
    mantissa, _, exponent = f"{x:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if x else "0"


def _limits(shown: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that shows these values with a margin."""
    finite = shown[np.isfinite(shown)]
    if not len(finite):
        return 0.0, 1.0
    low, high = finite.min(), finite.max()
    margin = 0.08 * (high - low) or 0.1
    return low - margin, high + margin


def _replace(path: epath.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".new")
    aside.write_bytes(content)
    aside.replace(path)
