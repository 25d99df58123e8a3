"Figures: what they promise can be counted in them; they repeat to the byte, need no display, and refuse what cannot be drawn."
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.path import Path as Outline

from pli.core import PliError, rng_for
from pli.evaluation.significance import NOT_SIGNIFICANT, SIGNIFICANCE_OF_QUERIES, SIGNIFICANT
from pli.hiding.language import CORRUPTIONS
from pli.viz.gains import MUTED, gain_bars, gain_lines, gain_map, move_apart, format_signed, tint, width_of
from pli.viz.rankings import Retrieval, rank_change, retrieval_figure, shares_moved
from pli.viz.masks import hidden_squares, mask_figure, masked_view, words_left
from pli.viz.curves import interval_bars, loss_curves, mean_around, weight_curves
from pli.viz.style import save_figure, to_image, to_png


def noise(*shape): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng_for(0, "noise", *shape))


def squares(axis): return sum(int((patch.get_path().codes == Outline.MOVETO).sum()) for patch in axis.patches if patch.get_gid() == "hidden")


def retrieval(text="in red", right=(False, True, False), **more): return Retrieval(noise(3, 24, 24), text, noise(len(right), 3, 24, 24), right, **more)


@pytest.mark.parametrize("hides, captions", [(["random"], None), (["random"], ["a cat", "a dog"]), (["random", "only:colour"], ["a red cat", "a dog"]), (["random", "block", "mix", "crop"], None)])
def test_notes_under_masked_pictures_stay_inside_the_figure(hides, captions):
    figure = mask_figure(noise(2, 3, 24, 24), hides, (4, 4), captions=captions)
    to_png(figure)
    notes = [text for text in figure.texts if text.get_style() == "italic"]
    assert notes and "Hatched" in notes[0].get_text()
    for note in notes:
        place = note.get_window_extent()
        assert place.x0 >= 0 and place.y0 >= 0 and place.x1 <= figure.bbox.width


FIGURES = {
    "masks": lambda: mask_figure(noise(2, 3, 24, 24), ["random:0.5", "mix:0.5"], (4, 4), captions=["a cat", "$5 or $10"]),
    "retrievals": lambda: retrieval_figure([retrieval(label="before", note="rank 2"), retrieval(right=(False, False))]),
    "bars": lambda: interval_bars({"all": {"start": (3.0, 2.0, 4.0), "tuned": [-1.0, -2.0, 1.0]}, "some": {"tuned": (0, 0, 0)}}, "recall@1 (%)"),
    "weights": lambda: weight_curves({"sum": {0.5: 10.0, 1.0: 20.0, 2.0: 15.0}, "product": {"1": 12.0}}, "recall@10 (%)", best={"sum": 0.5}),
    "losses": lambda: loss_curves({"a": [{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}], "b": []}),
    "map": lambda: gain_map([[1.0, -2.0], [None, 0.5]], [[0.5, -3.0], [None, -1.0]], [[2.0, -1.0], [None, 1.0]], ["one\nand more", "two"], ["$a$", "colour"], "a title", "100 queries."),
    "lines": lambda: gain_lines([100, 1000, 2500], {"a $b$": ([1, 2, 3], [0, 1, 2], [2, 3, 4]), "b": ([3, 2, None],) * 3}, "pairs", "gain", "a title", "100 queries.", True, {"control": 0.5}),
    "lying bars": lambda: gain_bars(["one\nand more", "two"], {"a": ([1.0, -2.0], [0.5, -3.0], [2.0, 1.0]), "b": ([None, 0.0],) * 3}, "gain", "a title", "100 queries.", {"control": 0.5}, gains=True),
    "ranks": lambda: rank_change([1, 3, 500, 9], torch.tensor([1, 1, 2, 40])),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_repeat_to_the_byte_and_leave_nothing_behind(name):
    before = dict(matplotlib.rcParams)
    data = to_png(FIGURES[name]())
    assert data == to_png(FIGURES[name]()) and data.startswith(b"\x89PNG") and b"matplotlib" not in data
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.facecolor": "red"}): assert to_png(FIGURES[name]()) == data   # a reader's own settings do not matter


@pytest.mark.parametrize("name", ["bars", "weights", "losses", "ranks", "lines", "lying bars"])
def test_every_axis_has_a_name(name):
    for axis in FIGURES[name]().axes: assert axis.get_ylabel() and axis.get_xlabel()


def test_a_map_names_its_rows_columns_and_scale():
    cells, scale = FIGURES["map"]().axes
    assert cells.get_xlabel() == "query" and cells.get_ylabel() == "way" and scale.get_xlabel() == "gain over control (points of recall@10)"


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".PNG"])
def test_files_are_whole_and_repeat(tmp_path, ending):
    for name in ("one", "two"): save_figure(FIGURES["ranks"](), tmp_path / "made" / f"{name}{ending}")
    one, two = ((tmp_path / "made" / f"{name}{ending}").read_bytes() for name in ("one", "two"))
    assert one == two and len(one) > 1000 and len(list((tmp_path / "made").iterdir())) == 2


@pytest.mark.parametrize("name", ["figure.bmp", "figure", "figure.png.part"])
def test_unknown_files_are_refused(tmp_path, name):
    with pytest.raises(PliError, match="a figure is written as .png, .svg, .pdf"): save_figure(FIGURES["ranks"](), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_fewer_colours_make_smaller_files():
    figure = mask_figure(noise(1, 3, 96, 96), [], (4, 4))
    assert len(to_png(figure, colours=32)) < len(to_png(figure)) / 2 and to_png(figure, colours=32) == to_png(figure, colours=32)


def test_no_display_and_no_pyplot(tmp_path):
    code = "import sys, torch; from pli.viz.masks import mask_figure; from pli.viz.style import save_figure; save_figure(mask_figure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ['random'], (2, 2)), 'a.png'); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# masks

@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 9), data=st.data())
@settings(max_examples=40, deadline=None)
def test_squares_lie_on_the_hidden_patches(rows, columns, seed, data):
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    if not hidden.any(): return
    outline = hidden_squares(hidden, (rows, columns))
    assert (outline.codes == Outline.MOVETO).sum() == hidden.sum()
    for patch in range(rows * columns): assert outline.contains_point((patch % columns + 0.5, patch // columns + 0.5)) == bool(hidden[patch])


@pytest.mark.parametrize("shape, grid", [((2, 3, 24, 24), (4, 4)), ((3, 3, 24, 36), (2, 3)), ((1, 3, 30, 20), (3, 2))])
def test_a_figure_shows_the_view_and_nothing_else(shape, grid):
    pixels, captions = noise(*shape), ["a red shirt for men", "a blue dress", "socks in red"][: shape[0]]
    hides = [name for name in CORRUPTIONS if name not in ("mix", "swap", "only", "without") or shape[0] > 1 and name in ("mix", "swap")]
    hides += ["only:colour", "without:colour", "recolour:1+random:0.5", "random:0.25|recolour:1", "grid>random:0.75"]
    figure = mask_figure(pixels, hides, grid, seed=3, captions=captions)
    assert len(figure.axes) == shape[0] * (1 + len(hides))
    for column, hide in enumerate(["none", *hides]):
        view = masked_view(pixels, hide, grid, seed=3, captions=captions)
        for row in range(shape[0]):
            axis = figure.axes[row * (1 + len(hides)) + column]
            assert (np.asarray(axis.images[0].get_array()) == to_image(view.pixels[row])).all()
            assert squares(axis) == (0 if view.hidden is None else int(view.hidden[row].sum()))
    assert (np.asarray(figure.axes[0].images[0].get_array()) == to_image(pixels[0].float() / 255)).all()


def test_a_column_does_not_depend_on_the_others():
    pixels = noise(2, 3, 24, 24)
    one, two = mask_figure(pixels, ["random:0.5"], (4, 4)), mask_figure(pixels, ["mix", "crop", "random:0.5"], (4, 4))
    paths = [next(patch.get_path() for patch in axis.patches if patch.get_gid() == "hidden") for axis in (one.axes[1], two.axes[3])]
    assert (paths[0].vertices == paths[1].vertices).all()
    assert to_png(mask_figure(pixels, ["random:0.5"], (4, 4), seed=1)) != to_png(one)


def test_words_are_shown_where_some_are_hidden_and_only_there():
    captions = ["a red shirt", "a shirt"]
    written = lambda hides: [" ".join(text.get_text().split()) for text in mask_figure(noise(2, 3, 24, 24), hides, (4, 4), captions=captions).texts]
    assert "\N{LEFT DOUBLE QUOTATION MARK}red\N{RIGHT DOUBLE QUOTATION MARK}" in written(["only:colour"])
    assert sum(text.startswith("\N{LEFT DOUBLE QUOTATION MARK}") for text in written(["only:colour", "random", "without:colour"])) == 2   # the second caption stays as it is
    assert any("left of its caption" in text for text in written(["only:colour"])) and not any("left of its caption" in text for text in written(["random"]))
    view = masked_view(noise(2, 3, 24, 24), "only:colour", (4, 4), captions=captions)
    assert words_left(view, 1, captions) == words_left(view, 0, None) == "" != words_left(view, 0, captions)


@pytest.mark.parametrize("hide, title", [("random:0.5", "random:0.5"), ("recolour:1 + random:0.5", "recolour:1\n+ random:0.5"), ("grid|block>random:0.75+drop", "grid\n| block\n> random:0.75\n+ drop")])
def test_every_step_of_a_way_has_its_line(hide, title):
    from pli.viz.masks import hide_title
    assert hide_title(hide) == title


def test_a_printed_grey_is_not_a_hidden_patch():
    plain = torch.full((1, 3, 24, 24), 236, dtype=torch.uint8)          # the very tone of the squares
    assert to_png(mask_figure(plain, ["random:0.5"], (4, 4))) != to_png(mask_figure(plain, ["none"], (4, 4)))


# rankings

def test_right_answers_are_seen_without_colour():
    figure = retrieval_figure([retrieval(right=(True, False, True)), retrieval(right=(False,))])
    assert len(figure.axes) == 4 + 2
    assert [axis.get_title() for axis in figure.axes] == ["", "1 \N{CHECK MARK}", "2", "3 \N{CHECK MARK}", "", "1"]
    widths = [axis.spines["left"].get_linewidth() for axis in figure.axes]
    assert [width > 2 for width in widths] == [False, True, False, True, False, False]
    assert any("no right answer among the first 1" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("text", ["", "$5 and $10", "a_b^c \\frac{", "word " * 200, "x" * 300, "in zwei\nZeilen"])
def test_any_words_can_be_drawn(text): to_png(retrieval_figure([retrieval(text, label=text[:20], note=text[:80])]))


# numbers

def test_all_bars_have_their_value():
    figure = interval_bars({kind: {f"arm {i}": (10.0 * i, 10.0 * i - 1, 10.0 * i + 1) for i in range(9)} for kind in "abcdef"}, "recall@10 (%)")
    assert sorted({text.get_text() for text in figure.axes[0].texts}) == sorted(f"{10.0 * i:.1f}" for i in range(9))
    assert len(figure.axes[0].patches) == 54 and figure.get_size_inches()[0] <= 13
    to_png(figure)


def test_the_chosen_weight_is_ringed_and_not_the_luckiest():
    curve = {0.25: 10.0, 1.0: 20.0, 4.0: 15.0}
    ring = lambda figure: [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert ring(weight_curves({"sum": curve}, "recall")) == [1.0] and ring(weight_curves({"sum": curve}, "recall", {"sum": 4.0})) == [4.0]


# many ways at once

def cells_of(figure): return {(text.get_position()[1] - 0.5, text.get_position()[0] - 0.5): text for text in figure.axes[0].texts if text.get_text()[-1:].isdigit() and text.get_gid() is None and text.get_ha() == "center"}


def test_a_map_tells_what_is_significant():
    values, low, high = np.array([[3.0, 2.0, -1.0], [0.04, np.nan, -2.5]]), np.array([[1.0, -0.5, -2.0], [-1, np.nan, -4.0]]), np.array([[5.0, 4.0, -0.1], [1, np.nan, 0.0]])
    cells = cells_of(gain_map(values, low, high, ["a", "b"], ["x", "y", "z"]))
    assert {place: text.get_text() for place, text in cells.items()} == {(0, 0): "+3.0", (0, 1): "+2.0", (0, 2): "\N{MINUS SIGN}1.0", (1, 0): "0.0", (1, 2): "\N{MINUS SIGN}2.5"}   # the missing one is blank
    assert {place for place, text in cells.items() if text.get_weight() == "bold"} == {(0, 0), (0, 2)}
    assert {place for place, text in cells.items() if text.get_color() == MUTED} == {(0, 1), (1, 0), (1, 2)}                # an interval that ends at 0 contains it


def test_the_caller_says_what_is_significant():
    values, low, high = np.array([[3.0, 2.0]]), np.array([[1.0, 1.0]]), np.array([[5.0, 4.0]])
    figure = gain_map(values, low, high, ["a"], ["x", "y"], significant=[[True, False]])
    assert {place: text.get_weight() for place, text in cells_of(figure).items()} == {(0, 0): "bold", (0, 1): "normal"}
    words = lambda figure: {text.get_text() for text in figure.axes[1].texts}
    assert words(figure) == words(gain_map(values, low, high, ["a"], ["x", "y"])) == {SIGNIFICANT, NOT_SIGNIFICANT}
    note = lambda figure: " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert SIGNIFICANCE_OF_QUERIES in note(gain_map(values, low, high, ["a"], ["x", "y"])) and SIGNIFICANCE_OF_QUERIES not in note(figure)


def test_colours_of_gains():
    assert np.allclose(tint(0.0, 2, True), 1) and np.allclose(tint(np.nan, 2, True), 1) and np.allclose(tint(9.0, 2, True), tint(2.0, 2, True))
    blue, orange = tint(2.0, 2, True), tint(-2.0, 2, True)
    assert blue[2] > blue[0] and orange[0] > orange[2]
    assert (tint(2.0, 2, False) > blue).all() and (tint(1.0, 2, True) > blue).all()
    shown = lambda **more: np.asarray(gain_map([[2.0]], [[1.0]], [[3.0]], ["a"], ["b"], **more).axes[0].images[0].get_array())[0, 0]
    assert np.allclose(shown(), blue) and np.allclose(shown(limit=4), tint(2.0, 4, True))


def test_blanks_are_explained():
    notes = lambda figure: " ".join(" ".join(text.get_text().split()) for text in figure.texts)
    whole = gain_map([[1.0]], [[0.5]], [[2.0]], ["a"], ["b"], caption="Seven queries.")
    assert "Seven queries." in notes(whole) and "Blank" not in notes(whole) and "Blank: not measured." in notes(FIGURES["map"]())
    assert "No bar: not measured." in notes(FIGURES["lying bars"]()) and "Grey number" in notes(FIGURES["lying bars"]())
    assert "95 % intervals" in notes(FIGURES["lines"]())


LONG = ["recolour + random 0.5 + only colour words, and what else there is to be said " * 2, "x" * 200, "", "in\nthree\nlines", "\N{SNOWMAN} $5 and $10 \\frac{"]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_names_and_numbers_stay_inside_the_figure(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    names, columns = [f"{LONG[i % 5]}{i}" for i in range(count)], ["image", "text, weighted by words", "sum:0.25", "y" * 40][: min(count, 4)]
    values = np.linspace(-99, 99, count * len(columns)).reshape(count, -1) if count > 1 else np.ones((1, 1))
    series = {f"{LONG[i]}{i}": (values[:, i], values[:, i] - 9, values[:, i] + 9) for i in range(len(columns))}
    for figure in (gain_map(values, values - 9, values + 9, names, columns, "a title " * 30, "a caption " * 80), gain_bars(names, series, "gain", "a title " * 30, "a caption " * 80, {"control": 3.0}),
                   gain_lines(range(1, count + 1), series, "x", "gain", "a title " * 30, "a caption " * 80, baselines={LONG[0]: 3.0})):
        box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
        across, down = figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= across and box.y1 <= down and across < 14


@given(st.lists(st.tuples(st.floats(-2, 12), st.floats(0.1, 1)), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_moved_names_do_not_overlap_and_stay(wanted):
    places, heights = zip(*wanted)
    moved = move_apart(places, heights, 10)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    assert all(moved[b] - moved[a] >= (heights[a] + heights[b]) / 2 - 1e-9 for a, b in zip(order, order[1:]))
    assert all(heights[i] / 2 - 1e-9 <= moved[i] <= 10 - heights[i] / 2 + 1e-9 for i in order)
    assert [places[i] for i in order] == sorted(places)                                     # in the order of what they name


def test_a_name_moves_no_further_than_it_must():
    assert move_apart([3.0, 8.0, 5.0], [1.0, 1.0, 1.0], 10) == [3.0, 8.0, 5.0]
    assert np.allclose(move_apart([5.0, 5.0, 9.0], [1.0, 2.0, 1.0], 10), [4.25, 5.75, 9.0])


def test_lines_end_where_their_values_end():
    figure = FIGURES["lines"]()
    drawn = {tuple(line.get_xdata()): np.asarray(line.get_ydata(), float) for line in figure.axes[0].lines if line.get_transform() == figure.axes[0].transData}
    assert len(figure.axes[0].collections) == 2 and list(drawn) == [(100.0, 1000.0, 2500.0)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["control", "a $b$", "b"] and [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["100", "1,000", "2,500"]
    ties = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert len(ties) == 3 and ties[2] < ties[1] == ties[0]


def test_lying_bars_are_as_long_as_their_values():
    figure = gain_bars(["a", "b"], {"x": ([1.0, -2.0], [0.5, -3.0], [2.0, 1.0]), "y": ([None, 4.0],) * 3}, "gain", baselines={"control": 0.5}, gains=True)
    bars = [(patch.get_width(), patch.get_y() + patch.get_height() / 2) for patch in figure.axes[0].patches if patch.get_hatch() is not None and patch.get_height() < 0.9]
    assert [width for width, _ in bars] == [1.0, -2.0, 4.0] and [int(y) for _, y in bars] == [0, 1, 1]
    numbers = [text for text in figure.axes[0].texts if text.get_gid() == "value"]
    assert [text.get_text() for text in numbers] == ["+1.0", "\N{MINUS SIGN}2.0", "+4.0"] and [text.get_color() == MUTED for text in numbers] == [False, True, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "control"]
    same = gain_bars(["a"], {"control": ([1.0],) * 3}, "recall", baselines={"control": 0.5})
    assert len(same.legends[0].get_texts()) == 2


def test_what_is_not_measured_has_no_say_in_the_axes():
    low = [0.5, float("-inf")]
    assert to_png(gain_bars(["a", "b"], {"x": ([1.0, None], low, [2.0, 900.0])}, "gain")) == to_png(gain_bars(["a", "b"], {"x": ([1.0, None], [0.5, None], [2.0, None])}, "gain"))
    assert low == [0.5, float("-inf")]


def test_texts_are_measured():
    assert width_of("ii", 9) < width_of("WW", 9) < width_of("WW", 18) and width_of("a\nlong line", 9) == width_of("long line", 9) and width_of("", 9) == width_of(" \n", 9) == 0
    assert format_signed(0.0, 9) == "0.0" and format_signed(-0.049, 9) == "0.0" and format_signed(-0.05001, 9) == "\N{MINUS SIGN}0.1" and format_signed(0.2, 1) == "+0.20"


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.5, 20))
@settings(max_examples=50, deadline=None)
def test_mean_around_is_the_formula(values, half_life):
    decay = 0.5 ** (1 / half_life)
    weights = decay ** np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values))))
    assert np.allclose(mean_around(values, half_life), weights @ values / weights.sum(1), atol=0.02)


def test_shares_add_up():
    before, after = (torch.randint(1, 9, (500,), generator=rng_for(i)) for i in range(2))
    assert abs(sum(shares_moved(before, after)) - 1) < 1e-9


@pytest.mark.parametrize("call, message", [
    (lambda: to_image(noise(1, 24, 24)), r"\(3, height, width\)"),
    (lambda: mask_figure(noise(3, 24, 24), ["random"], (4, 4)), "at least one"),
    (lambda: mask_figure(noise(0, 3, 24, 24), ["random"], (4, 4)), "at least one"),
    (lambda: mask_figure(noise(2, 3, 24, 24), ["shuffle"], (4, 4)), "'shuffle' is not a way of hiding"),
    (lambda: mask_figure(noise(2, 3, 24, 24), ["random"], (4, 4), captions=["one"]), "1 captions for 2 pictures"),
    (lambda: Retrieval(noise(3, 8, 8), "in red", noise(2, 3, 8, 8), (True,)), "'in red'"),
    (lambda: retrieval_figure([]), "nothing to draw"),
    (lambda: interval_bars({}, "recall"), "nothing to draw"),
    (lambda: interval_bars({"all": {"start": (1.0, None, 2.0)}}, "recall"), "all, start"),
    (lambda: weight_curves({}, "recall"), "nothing to draw"),
    (lambda: weight_curves({"sum": {1.0: 2.0}, "slerp": {}}, "recall"), "slerp"),
    (lambda: weight_curves({"sum": {0: 1.0}}, "recall"), "weight 0"),
    (lambda: weight_curves({"sum": {1.0: 2.0}}, "recall", {"sum": 3.0}), "the chosen weight 3 is not on its curve"),
    (lambda: loss_curves({"a": []}), "nothing to draw"),
    (lambda: gain_map([], [], [], [], []), "a map of 0 rows and 0 columns"),
    (lambda: gain_map([[1.0]], [[0.0]], [[2.0]], ["a", "b"], ["x"]), r"a map of 2 rows and 1 columns .* got \(1, 1\)"),
    (lambda: gain_map([[1.0]], [[None]], [[2.0]], ["a"], ["x"]), "a, x: a gain needs low <= high, all finite, got 1 with nan and 2"),
    (lambda: gain_map([[float("inf")]], [[0.0]], [[2.0]], ["a"], ["x"]), "a, x: a gain needs low <= high, all finite, got inf"),
    (lambda: gain_map([[1.0]], [[0.0]], [[2.0]], ["a"], ["x"], limit=-1), "limit"),
    (lambda: gain_map([[1.0]], [[-1.0]], [[2.0]], ["a"], ["x"], significant=[[True]]), "significant only where its interval is clear of 0"),
    (lambda: gain_map([[1.0]], [[0.5]], [[2.0]], ["a"], ["x"], significant=[True]), r"got \(1,\)"),
    (lambda: gain_lines([], {"a": ([], [], [])}, "x", "y"), "nothing to draw"),
    (lambda: gain_lines([1], {}, "x", "y"), "nothing to draw"),
    (lambda: gain_lines([2, 1], {"a": ([1, 2],) * 3}, "x", "y"), "x has to rise from point to point, got 2, 1"),
    (lambda: gain_lines([0, 1], {"a": ([1, 2],) * 3}, "x", "y", logx=True), "x = 0 has no place"),
    (lambda: gain_lines([1, 2], {"a": ([1, 2], [1, 2], [1, 1])}, "x", "y"), "a, point 2: a mean needs low <= high, all finite, got 2 with 2 and 1"),
    (lambda: gain_lines([1, 2], {"a": ([None, None],) * 3}, "x", "y"), "a: no value is a number"),
    (lambda: gain_lines([1], {"a": ([1],) * 3}, "x", "y", baselines={"b": float("nan")}), "b: a baseline is a number, got nan"),
    (lambda: gain_bars([], {"a": ([], [], [])}, "y"), "nothing to draw"),
    (lambda: gain_bars(["one"], {"a": ([1, 2],) * 3}, "y"), "a: a series needs mean, low and high for 1 rows"),
    (lambda: gain_bars(["one"], {"a": ([1],) * 2}, "y"), "a: a series needs"),
    (lambda: gain_bars(["one"], {"a": ([1],) * 3}, "y", baselines={"b": None}), "b: a baseline is a number"),
    (lambda: rank_change([1], [1, 2]), "1 ranks before and 2 after"),
    (lambda: rank_change([0], [1]), "ranks begin at 1"),
])
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(PliError, match=message): call()
