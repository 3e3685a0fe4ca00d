"""Draws the loss curve and the metrics of a run from its metrics.jsonl and eval.jsonl."""

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from lm.errors import UserError
from lm.training.metrics import own_metrics, read_lines

# The palette of Okabe and Ito, safe for colour-blind readers.
_BLUE, _GREY = "#0072B2", "#8C8C8C"
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_TOP, _ROW = 5.0, 2.6  # inches, heights of the loss and of a row of panels below it

Lines = Sequence[dict[str, Any]]


def plot_loss(
    metrics: epath.PathLike, evaluations: epath.PathLike, path: epath.PathLike, name: str
) -> None:
    """Draws the loss curve of the run `name` into the PNG file `path`; below it a panel for each of
    the objective's own metrics, such as margin and accuracy.

    The loss is in bits per byte if the metrics have it. Held-out results of the same measure are
    points with bars of one standard error. The right axis is the learning rate.

    Raises UserError if `metrics` has no steps yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would change a notebook's backend

    lines, results = read_lines(metrics), read_lines(evaluations)
    if not lines:
        raise UserError(f"{metrics} holds no steps yet, so there is nothing to plot.")
    measure = "bits_per_byte" if "bits_per_byte" in lines[0] else "loss"
    panels = own_metrics(lines[0])
    rows = -(-len(panels) // 2)

    figure = Figure(figsize=(9, _TOP + rows * _ROW), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[_TOP, *[_ROW] * rows])
    axes = figure.add_subplot(grid[0, :])
    _draw(axes, lines, results, measure)
    axes.set(xlabel="step", ylabel=_words(measure))
    axes.set_title(name, loc="left", fontweight="bold")
    for index, panel in enumerate(panels):
        below = figure.add_subplot(grid[1 + index // 2, index % 2])
        _draw(below, lines, results, panel)
        below.set_title(_words(panel), loc="left", fontsize="medium")
    _draw_learning_rate(axes, lines)
    handles = {label: handle for each in figure.axes for handle, label in _legend(each)}
    axes.legend(
        handles=handles.values(),
        ncols=4,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )

    image = io.BytesIO()
    figure.savefig(image, format="png")
    _replace(epath.Path(path), image.getvalue())


def _draw(axes: Any, lines: Lines, results: Lines, measure: str) -> None:
    """Draws a measure of the training batches, and of the held-out data of each source."""
    steps, values = (_column(lines, key) for key in ("step", measure))
    axes.plot(steps, values, color=_BLUE, alpha=0.22, linewidth=0.8)
    smoothed = smooth(values)
    axes.plot(steps, smoothed, color=_BLUE, linewidth=2, label="training")
    shown = [smoothed]
    for colour, (source, points) in zip(itertools.cycle(_OTHERS), _by_source(results).items()):
        points = [line for line in points if line["name"] == f"{source}/{measure}"]
        if not points:
            continue
        at, value, spread = (_column(points, key) for key in ("step", "value", "stderr"))
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
    axes.set_xlim(-0.01 * steps[-1], 1.01 * steps[-1])  # the first evaluation is at step 0
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(*_limits(np.concatenate(shown)))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "left", "right"]].set_visible(False)


def _legend(axes: Any) -> Iterable[tuple[Any, str]]:
    """(handle, label) of everything drawn."""
    return zip(*axes.get_legend_handles_labels(), strict=True)


def _draw_learning_rate(axes: Any, lines: Lines) -> None:
    """Draws the learning rate behind the loss, with an axis on the right."""
    steps, rates = (_column(lines, key) for key in ("step", "learning_rate"))
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    right.plot(steps, rates, color=_GREY, linewidth=0.8, label="learning rate")
    right.fill_between(steps, rates, color=_GREY, alpha=0.06, linewidth=0)
    right.set_ylabel("learning rate", color=_GREY)
    right.set_ylim(0, 1.1 * np.nanmax(rates, initial=1e-9))
    right.yaxis.set_major_formatter(lambda x, _: _scientific(x))
    right.tick_params(axis="y", colors=_GREY)
    right.spines[["top", "left", "right"]].set_visible(False)


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


def _column(lines: Lines, key: str) -> np.ndarray:
    return np.array([math.nan if line.get(key) is None else line[key] for line in lines])


def _by_source(results: Lines) -> dict[str, list[dict[str, Any]]]:
    """{source: lines of eval.jsonl with a name SOURCE/MEASURE}."""
    sources: dict[str, list[dict[str, Any]]] = {}
    for line in results:
        source, _, _ = line["name"].rpartition("/")
        sources.setdefault(source, []).append(line)
    return sources


def _words(measure: str) -> str:
    """'bits_per_byte' -> 'bits per byte'."""
    return measure.replace("_", " ")


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
