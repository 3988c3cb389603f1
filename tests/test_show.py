"""What a lesson shows of the package is the package: its source, its certificate, numbers rounded one way."""

import json
from importlib import resources

import ipywidgets
import pytest
from IPython.core.formatters import DisplayFormatter

from bigmodel_course import plotting, show
from bigmodel_course.schedules import constant


@pytest.mark.verifies("show.source", kind="invariant", against="the file's own text", on="two functions")
def test_source_is_the_files_own_text():
    text = resources.files("bigmodel_course").joinpath("schedules.py").read_text(encoding="utf-8")
    shown = show.source(constant, show.rounded).data
    blocks = [block.removeprefix("python\n") for block in shown.split("```")[1::2]]
    assert blocks[0] in text
    assert blocks[0].startswith("def constant")
    assert blocks[1].startswith("def rounded")


@pytest.mark.verifies(
    "show.certificate", kind="invariant", against="the stored verification table", on="every name in it"
)
def test_a_certificate_holds_each_row_of_its_name():
    rows = json.loads(resources.files("bigmodel_course").joinpath("verification.json").read_text(encoding="utf-8"))
    for name in {row["name"] for row in rows}:
        mine = [row for row in rows if row["name"] == name]
        text = show.certificate(name).data
        assert text.count(f"- **{name}**") == len(mine)
        assert all(row["against"] in text and row["on"] in text for row in mine)


@pytest.mark.verifies("show.certificate", kind="message", against="the name in the message", on="an unknown name")
def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"names must have a row .*, got optim\.Sgd"):
        show.certificate("optim.Sgd")


@pytest.mark.verifies("show.rounded", kind="invariant", against="round, without minus zero", on="numbers and tensors")
@pytest.mark.parametrize(("value", "shown"), [(0.12345, 0.123), (-0.0001, 0.0), (2, 2.0), (1e-9, 0.0)])
def test_rounded_has_no_minus_zero(value, shown):
    assert repr(show.rounded(value)) == repr(shown)


@pytest.mark.verifies("show.table", kind="invariant", against="the rows given", on="each kind of entry")
def test_a_table_has_one_row_a_mapping_and_one_way_to_write_numbers():
    rows = [
        {"rule": "a", "n": 12345, "x": 0.12345},
        {"rule": "b", "n": None, "x": 2e-9},
        {"rule": "c", "n": True, "x": 0.0},
    ]
    table = show.table(rows)
    assert list(table.index) == ["a", "b", "c"]
    assert table.columns.name == "rule"
    assert table.to_numpy().tolist() == [["12,345", "0.123"], ["", "2.0e-09"], ["True", "0.000"]]
    assert "at 0x" not in repr(table) + table.to_html()


@pytest.mark.verifies("show.explore", kind="invariant", against="calls of the drawing function", on="a slider moved")
def test_a_control_draws_at_once_and_when_it_is_let_go(monkeypatch):
    drawn, displayed = [], []
    monkeypatch.setattr(show, "display", displayed.append)

    def draw(step_size):
        drawn.append(step_size)
        return step_size

    show.explore(draw, step_size=(0.0, 1.0, 0.25))
    (widget,) = [shown for shown in displayed if isinstance(shown, ipywidgets.Widget)]
    slider = widget.children[0]
    assert drawn == [0.5]
    assert slider.description == "step size"
    assert slider.continuous_update is False
    slider.value = 0.75
    assert drawn == [0.5, 0.75]
    assert displayed[-1] == 0.75


def test_a_figure_reaches_a_notebook_as_a_picture_and_a_stable_text():
    figure = plotting.lines({"a": ([1, 2], [1, 2])}, x="x", y="y", see="A line.")
    data, _ = DisplayFormatter().format(figure, include={"text/plain"})
    assert data["text/plain"] == "<Figure size 700x400 with 1 Axes>"
