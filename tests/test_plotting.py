"""Every figure has labelled axes and a sentence, colours told apart by everybody, and is shown once."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from bigmodel_course import plotting

X = torch.linspace(0, 1, 5, requires_grad=True)
SAYS = {"x": "step", "y": "loss (units of y²)", "see": "It falls."}
FIGURES = {
    "lines": lambda says: plotting.lines({"a": (range(5), X), "b": ([0, 1], [1, 2])}, **says),
    "bars": lambda says: plotting.bars({"a": 1.0, "b": 2}, **says),
    "histogram": lambda says: plotting.histogram({"a": X, "b": [1.0, 2.0]}, **says),
    "paths": lambda says: plotting.paths(
        lambda x, y: x**2 + y**2, {"walk": np.ones((3, 2))}, span=(-1, 1, -2, 2), **says
    ),
    "timeline": lambda says: plotting.timeline({"rank 0": [(0, 1, "F", "0")], "rank 1": [(1, 3, "B", "0")]}, **says),
}


@pytest.mark.verifies(
    "plotting.lines",
    "plotting.bars",
    "plotting.histogram",
    "plotting.paths",
    "plotting.timeline",
    kind="invariant",
    against="the labels and the sentence asked for",
    on="one figure each",
)
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_has_its_labels_and_its_sentence_and_is_closed(draw):
    figure = draw(SAYS)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.get_supxlabel()) == tuple(SAYS.values())
    assert plt.get_fignums() == []  # or a notebook would show it twice


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("missing", SAYS)
def test_a_figure_without_a_label_or_sentence_is_refused(draw, missing):
    with pytest.raises(ValueError, match="needs x and y labels and a sentence"):
        draw({**SAYS, missing: ""})
    assert plt.get_fignums() == []


@pytest.mark.verifies(
    "plotting.lines", kind="message", against="the argument's name in the message", on="a wrong scale"
)
def test_a_wrong_scale_is_refused():
    with pytest.raises(ValueError, match="log must name axes"):
        plotting.lines({"a": ([1], [1])}, log="z", **SAYS)


@pytest.mark.verifies("plotting.lines", kind="invariant", against="the numbers given", on="tensors that need gradients")
def test_a_line_holds_the_numbers_that_were_given():
    (line,) = plotting.lines({"a": (range(5), X)}, log="xy", limits=(0.1, 2), **SAYS).axes[0].lines
    assert line.get_ydata().tolist() == X.tolist()


@pytest.mark.verifies(
    "plotting.timeline", kind="invariant", against="the times given", on="two rows, two kinds; the first row on top"
)
def test_a_timeline_holds_the_times_that_were_given():
    rows = {"rank 0": [(0, 1, "F", "0"), (4, 6, "B", "0")], "rank 1": [(1, 2, "F", "0"), (2, 4, "B", "0")]}
    axes = plotting.timeline(rows, **SAYS).axes[0]
    found = {(bar.get_x(), bar.get_x() + bar.get_width(), to_rgb(bar.get_facecolor())) for bar in axes.patches}
    colours = dict(zip("FB", map(to_rgb, plotting.COLOURS), strict=False))
    assert found == {(start, end, colours[kind]) for bars in rows.values() for start, end, kind, _ in bars}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    assert axes.yaxis_inverted()


@pytest.mark.verifies(
    "plotting.images", kind="invariant", against="the pictures given", on="(N, H, W) and (N, 1, H, W)"
)
@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 1, 8, 8)])
def test_pictures_stand_in_a_grid_with_their_titles(shape):
    pictures = torch.arange(5.0).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    figure = plotting.images(pictures, list("abcde"), see="Five.", columns=3)
    assert [axes.get_title() for axes in figure.axes] == [*"abcde", ""]
    assert [int(axes.images[0].get_array().max()) for axes in figure.axes[:5]] == [0, 1, 2, 3, 4]


@pytest.mark.verifies(
    "plotting.budgets",
    kind="invariant",
    against="the parts given",
    on="two panels, one with a limit, a part of 0 left out",
)
def test_a_budget_stacks_its_parts_and_draws_its_limit():
    panels = {
        "memory (GB)": ({"weights": 2.0, "nothing": 0.0, "states": 3.0}, 4.0),
        "time (s)": ({"compute": 1.0}, None),
    }
    memory, time = plotting.budgets(panels, see="It does not fit.").axes
    assert [(bar.get_x(), bar.get_width()) for bar in memory.patches] == [(0.0, 2.0), (2.0, 3.0)]
    assert list(memory.lines[0].get_xdata()) == [4.0, 4.0]
    assert not time.lines
    assert [axes.get_xlabel() for axes in (memory, time)] == list(panels)
    with pytest.raises(ValueError, match="budgets need panels and a sentence"):
        plotting.budgets({}, see="x")
    assert plt.get_fignums() == []


@pytest.mark.verifies(
    "plotting.dots", kind="invariant", against="the points and events given", on="two names, one event"
)
def test_dots_show_every_point_and_a_line_at_each_event():
    series = {"a": ([0.0, 1.0], [2.0, 3.0]), "b": ([2.0], [5.0])}
    (axes,) = plotting.dots(series, x="time (s)", y="took (s)", see="It stops.", events={"killed": 0.5}).axes
    points, event = axes.lines[:2], axes.lines[2]
    assert [list(line.get_ydata()) for line in points] == [[2.0, 3.0], [5.0]]
    assert list(event.get_xdata()) == [0.5, 0.5]
    assert [text.get_text() for text in axes.texts] == ["killed"]
    assert plt.get_fignums() == []


# How the colours look to eyes without one kind of cone: the matrices of Viénot, Brettel and Mollon (1999), which act on
# linear RGB, for protanopia and deuteranopia.
BLIND = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.verifies(
    "plotting.COLOURS", kind="invariant", against="Vienot et al. 1999", on="each pair, as two kinds of colour blindness"
)
@pytest.mark.parametrize("kind", BLIND)
def test_each_pair_of_colours_stays_apart_for_colour_blind_eyes(kind):
    seen = [np.array(BLIND[kind]) @ (np.array(to_rgb(colour)) ** 2.2) for colour in plotting.COLOURS]
    gaps = [
        np.abs(np.clip(a, 0, 1) ** (1 / 2.2) - np.clip(b, 0, 1) ** (1 / 2.2)).max()
        for i, a in enumerate(seen)
        for b in seen[:i]
    ]
    assert min(gaps) > 0.08
