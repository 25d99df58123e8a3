"Figures: what they promise can be counted in them; they repeat to the byte, need no display, and refuse what cannot be drawn."
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.path import Path as Outline

from pli.core import PliError, generator
from pli.masking import HIDERS
from pli.viz import (Retrieval, hidden_squares, interval_bars, loss_curves, mask_figure, mean_around, rank_change, retrieval_figure, save_figure, see,
                     shares_moved, to_image, to_png, weight_curves)


def noise(*shape): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(0, "noise", *shape))


def squares(axis): return sum(int((patch.get_path().codes == Outline.MOVETO).sum()) for patch in axis.patches if patch.get_gid() == "hidden")


def retrieval(text="in red", right=(False, True, False), **more): return Retrieval(noise(3, 24, 24), text, noise(len(right), 3, 24, 24), right, **more)


FIGURES = {
    "masks": lambda: mask_figure(noise(2, 3, 24, 24), ["random:0.5", "mix:0.5"], (4, 4), captions=["a cat", "$5 or $10"]),
    "retrievals": lambda: retrieval_figure([retrieval(label="before", note="rank 2"), retrieval(right=(False, False))]),
    "bars": lambda: interval_bars({"all": {"start": (3.0, 2.0, 4.0), "tuned": [-1.0, -2.0, 1.0]}, "some": {"tuned": (0, 0, 0)}}, "recall@1 (%)"),
    "weights": lambda: weight_curves({"sum": {0.5: 10.0, 1.0: 20.0, 2.0: 15.0}, "product": {"1": 12.0}}, "recall@10 (%)", best={"sum": 0.5}),
    "losses": lambda: loss_curves({"a": [{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}], "b": []}),
    "ranks": lambda: rank_change([1, 3, 500, 9], torch.tensor([1, 1, 2, 40])),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_repeat_to_the_byte_and_leave_nothing_behind(name):
    before = dict(matplotlib.rcParams)
    data = to_png(FIGURES[name]())
    assert data == to_png(FIGURES[name]()) and data.startswith(b"\x89PNG") and b"matplotlib" not in data
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.facecolor": "red"}): assert to_png(FIGURES[name]()) == data   # a reader's own settings do not matter


@pytest.mark.parametrize("name", ["bars", "weights", "losses", "ranks"])
def test_every_axis_has_a_name(name):
    for axis in FIGURES[name]().axes: assert axis.get_ylabel() and axis.get_xlabel()


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
    code = "import sys, torch; from pli.viz import mask_figure, save_figure; save_figure(mask_figure(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ['random'], (2, 2)), 'a.png'); assert 'matplotlib.pyplot' not in sys.modules"
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
    pixels = noise(*shape)
    hides = [name for name in HIDERS if name != "mix" or shape[0] > 1] + ["recolour:1+random:0.5"]
    figure = mask_figure(pixels, hides, grid, seed=3)
    assert len(figure.axes) == shape[0] * (1 + len(hides))
    for column, hide in enumerate(["none", *hides]):
        view = see(pixels, hide, grid, seed=3)
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


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.5, 20))
@settings(max_examples=50, deadline=None)
def test_mean_around_is_the_formula(values, half_life):
    decay = 0.5 ** (1 / half_life)
    weights = decay ** np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values))))
    assert np.allclose(mean_around(values, half_life), weights @ values / weights.sum(1), atol=0.02)


def test_shares_add_up():
    before, after = (torch.randint(1, 9, (500,), generator=generator(i)) for i in range(2))
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
    (lambda: rank_change([1], [1, 2]), "1 ranks before and 2 after"),
    (lambda: rank_change([0], [1]), "ranks begin at 1"),
])
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(PliError, match=message): call()
