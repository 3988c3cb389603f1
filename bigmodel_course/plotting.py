"""Figures of the lessons: labelled axes with units, colours that everybody can tell apart, and a sentence under each.

Every function returns a matplotlib Figure that is closed for pyplot, so a notebook shows it once, as the cell's value.
`see` is the sentence that says what to look at; it stands under the picture.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "bars", "budgets", "dots", "histogram", "images", "lines", "paths", "timeline"]

# Okabe and Ito's palette, told apart with every common kind of colour blindness; line styles differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

Series = Mapping[str, tuple[Any, Any]]


def lines(
    series: Series,
    *,
    x: str,
    y: str,
    see: str,
    log: str = "",
    marks: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Curves over one pair of axes: `series` maps a name to its (x values, y values).

    `x` and `y` are the axes' labels with their units; `log` names the logarithmic axes ("", "x", "y" or "xy");
    `marks` is a matplotlib marker such as "o"; `limits` bounds the y axis.
    """
    figure, axes = _canvas(x, y, see, log)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "marker": marks or None}
        axes.plot(_numbers(xs), _numbers(ys), label=name, markersize=4, linewidth=1.8, **style)
    if limits:
        axes.set_ylim(*limits)
    if len(series) > 1 or any(series):
        axes.legend(frameon=False)
    return _finished(figure)


def bars(heights: Mapping[str, float], *, x: str, y: str, see: str, log: str = "") -> Figure:
    """One bar a name, its height written above it."""
    figure, axes = _canvas(x, y, see, log)
    drawn = axes.bar(list(heights), _numbers(list(heights.values())), color=COLOURS[0], width=0.6)
    axes.bar_label(drawn, fmt="{:,.4g}", padding=2, fontsize=9)
    axes.margins(y=0.12)
    return _finished(figure)


def budgets(panels: Mapping[str, tuple[Mapping[str, float], float | None]], *, see: str) -> Figure:
    """What fills each budget: one stacked bar a panel, each with an axis of its own.

    `panels` maps an axis label with its unit to (parts by name, limit); a limit is drawn as a line, None is no limit.
    Parts that are 0 are left out.
    """
    if not panels or not see:
        raise ValueError(f"budgets need panels and a sentence that says what to see, got {len(panels)} and {see=}")
    size = (7, 1.5 * len(panels) + 0.5)
    figure, grid = plt.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained")
    for axes, (label, (parts, limit)) in zip(grid[:, 0], panels.items(), strict=True):
        left = 0.0
        for i, (name, width) in enumerate(parts.items()):
            if width:
                colour = COLOURS[i % len(COLOURS)]
                axes.barh([0], [width], left=left, color=colour, edgecolor="white", label=f"{name} {width:,.3g}")
            left += width
        if limit is not None:
            axes.axvline(limit, color="black", linestyle="--", label=f"limit {limit:,.4g}")
        axes.set(xlabel=label, yticks=[], xlim=(0, 1.05 * max(left, limit or 0) or 1))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(see, fontsize=9, color="0.25", wrap=True)
    return _finished(figure)


def histogram(samples: Mapping[str, Any], *, x: str, y: str, see: str, bins: int = 40) -> Figure:
    """Outlined histograms of several samples on common bins."""
    figure, axes = _canvas(x, y, see)
    edges = np.histogram_bin_edges(np.concatenate([_numbers(v).ravel() for v in samples.values()]), bins)
    for i, (name, values) in enumerate(samples.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.8}
        axes.hist(_numbers(values).ravel(), edges, histtype="step", label=name, **style)
    axes.legend(frameon=False)
    return _finished(figure)


def paths(
    height: Callable[[np.ndarray, np.ndarray], np.ndarray],
    walks: Mapping[str, Any],
    *,
    x: str,
    y: str,
    see: str,
    span: tuple[float, float, float, float],
) -> Figure:
    """Walks over the contour lines of a function of two numbers.

    `height(xs, ys)` is evaluated on a grid over `span` = (left, right, bottom, top); `walks` maps a name to its points,
    one row (x, y) a step.
    """
    figure, axes = _canvas(x, y, see)
    left, right, bottom, top = span
    xs, ys = np.meshgrid(np.linspace(left, right, 120), np.linspace(bottom, top, 120))
    axes.contour(xs, ys, height(xs, ys), levels=18, colors="0.75", linewidths=0.8)
    for i, (name, points) in enumerate(walks.items()):
        points = _numbers(points)
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
        axes.plot(points[:, 0], points[:, 1], marker="o", markersize=3, linewidth=1.5, label=name, **style)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.legend(frameon=False)
    return _finished(figure)


def timeline(rows: Mapping[str, Sequence[tuple[float, float, str, str]]], *, x: str, y: str, see: str) -> Figure:
    """Bars along time, a row a name, the first on top: each bar is (start, end, kind, text), coloured by its kind.

    A text stands only where its bar is wide enough.
    """
    figure, axes = _canvas(x, y, see)
    every = [(r, *bar) for r, bars_of in enumerate(rows.values()) for bar in bars_of]
    wide = 0.014 * (max(bar[2] for bar in every) - min(bar[1] for bar in every))
    kinds = list(dict.fromkeys(bar[3] for bar in every))
    for i, kind in enumerate(kinds):
        places, starts, ends, _, texts = zip(*(bar for bar in every if bar[3] == kind), strict=True)
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        style = {"color": COLOURS[i % len(COLOURS)], "edgecolor": "white", "linewidth": 0.6, "height": 0.8}
        drawn = axes.barh(places, lengths, left=starts, label=kind, **style)
        shown = [text if length >= wide else "" for text, length in zip(texts, lengths, strict=True)]
        axes.bar_label(drawn, shown, label_type="center", fontsize=7, color="white")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=len(kinds), loc="lower right", bbox_to_anchor=(1, 1))
    return _finished(figure)


def dots(
    series: Series, *, x: str, y: str, see: str, log: str = "", events: Mapping[str, float] | None = None
) -> Figure:
    """Points, a colour a name; `events` maps a text to the place on the x axis where it stands beside a line."""
    figure, axes = _canvas(x, y, see, log)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        axes.plot(
            _numbers(xs), _numbers(ys), "o^sDvP*"[i % 7], color=COLOURS[i % len(COLOURS)], markersize=3, label=name
        )
    for text, place in (events or {}).items():
        axes.axvline(place, color="0.4", linestyle="--", linewidth=0.9)
        style = {"rotation": 90, "fontsize": 8, "va": "top", "ha": "right"}
        axes.annotate(text, (place, 0.98), xycoords=("data", "axes fraction"), **style)
    axes.legend(frameon=False, ncols=len(series), loc="lower right", bbox_to_anchor=(1, 1))
    return _finished(figure)


def images(pictures: Any, titles: Sequence[str], *, see: str, columns: int = 8) -> Figure:
    """Grey pictures in a grid, each with its title; `pictures` has shape (N, H, W) or (N, 1, H, W)."""
    pictures = _numbers(pictures)
    pictures = pictures[:, 0] if pictures.ndim == 4 else pictures
    rows = -(-len(pictures) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(7, 1.15 * rows + 0.5), squeeze=False, layout="constrained")
    for axes in grid.ravel():
        axes.axis("off")
    for axes, picture, title in zip(grid.ravel(), pictures, titles, strict=False):
        axes.imshow(picture, cmap="gray_r")
        axes.set_title(title, fontsize=9)
    figure.supxlabel(see, fontsize=9, color="0.25", wrap=True)
    return _finished(figure)


def _canvas(x: str, y: str, see: str, log: str = "") -> tuple[Figure, Axes]:
    if not (x and y and see):
        raise ValueError(f"a figure needs x and y labels and a sentence that says what to see, got {x=}, {y=}, {see=}")
    if not set(log) <= {"x", "y"}:
        raise ValueError(f'log must name axes, one of "", "x", "y", "xy", got {log!r}')
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(see, fontsize=9, color="0.25", wrap=True)
    return figure, axes


def _finished(figure: Figure) -> Figure:
    plt.close(figure)  # or the notebook would show it a second time
    return figure


def _numbers(values: Any) -> np.ndarray:
    """Values as a NumPy array; a tensor that needs gradients is taken as it stands."""
    return values.detach().numpy() if hasattr(values, "detach") else np.asarray(values)
