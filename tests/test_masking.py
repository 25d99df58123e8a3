"Masks: counts, shapes and chance. Corruptions: what each one leaves alone. The small language that names them."
import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pli.core import PliError, generator
from pli.masking import HIDERS, Block, Blur, Composed, Crop, Grey, Grid, Mix, Nothing, RandomPatches, Recolour, View, add_mask, dither, hide_highest, parse_hide, to_pixels

MASKS = {"random": RandomPatches, "block": Block, "grid": Grid}
CORRUPTIONS = {"mix": Mix, "recolour": Recolour, "grey": Grey, "blur": Blur, "crop": Crop}
LUMA = torch.tensor([0.2989, 0.587, 0.114])

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)
sides = st.integers(1, 20)


def noise(batch=4, height=48, width=48, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def blank(batch, grid):
    "A view whose pixels do not matter."
    return View(torch.zeros(batch, 3, 2, 2), grid)


def hide(kind, pixels, seed=0, grid=(6, 6), hidden=None, **fields):
    return HIDERS[kind](**fields)(View(pixels, grid, hidden), generator(seed, kind))


# ---- patch masks

@quick
@given(st.sampled_from(sorted(MASKS)), sides, sides, st.floats(0, 0.999), st.integers(1, 5), seeds)
def test_an_exact_number_is_hidden_in_every_row(kind, rows, columns, ratio, batch, seed):
    view = blank(batch, (rows, columns))
    hidden = MASKS[kind](ratio)(view, generator(seed)).hidden
    assert hidden.dtype == torch.bool and hidden.shape == (batch, rows * columns)
    assert (hidden.sum(1) == math.floor(ratio * rows * columns + 1e-9)).all()
    assert hidden.sum(1)[0] < rows * columns                                     # something is left to see


@quick
@given(st.sampled_from(sorted(MASKS)), st.integers(1, 60), st.data())
def test_a_share_that_is_whole_is_met_although_floats_are_not_exact(kind, patches, data):
    "0.29 * 100 is 28.999999999999996 in floating point."
    count = data.draw(st.integers(0, patches - 1))
    hidden = MASKS[kind](count / patches)(blank(2, (1, patches)), generator(0)).hidden
    assert (hidden.sum(1) == count).all()
    assert hide_highest(torch.rand(1, 100), 0.29).sum() == 29


@quick
@given(st.sampled_from(sorted(MASKS)), st.integers(1, 99), st.integers(1, 12), st.integers(1, 12))
def test_percentages_round_down(kind, percent, rows, columns):
    hidden = MASKS[kind](percent / 100)(blank(1, (rows, columns)), generator(0)).hidden
    assert hidden.sum() == math.floor(Fraction(percent, 100) * rows * columns)


@quick
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 0.99), seeds)
def test_the_highest_are_hidden(batch, patches, ratio, seed):
    value = torch.randint(0, 5, (batch, patches), generator=torch.Generator().manual_seed(seed)).float()      # with many ties
    hidden = hide_highest(value, ratio)
    for row, gone in zip(value, hidden):
        if gone.any() and not gone.all(): assert row[gone].min() >= row[~gone].max()


@pytest.mark.parametrize("ratio", [1 - 1e-12, 1 - 2**-53])
def test_the_largest_share_still_leaves_one(ratio):
    for kind in MASKS.values(): assert (kind(ratio)(blank(2, (6, 6)), generator(0)).hidden.sum(1) == 35).all()


@quick
@given(st.sampled_from(sorted(MASKS)), seeds, st.integers(1, 8))
def test_a_mask_depends_on_its_generator_alone(kind, seed, others):
    hider, view = MASKS[kind](0.5), blank(3, (5, 7))
    before = torch.get_rng_state()
    for step in range(others): hider(view, generator(seed, "hide", step + 1))    # other batches, before and in between
    first = hider(view, generator(seed, "hide", 0)).hidden
    torch.rand(others)
    again = hider(View(torch.ones(3, 3, 4, 4), (5, 7)), generator(seed, "hide", 0)).hidden      # other pictures
    torch.set_rng_state(before)
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_rows_and_steps_differ(kind):
    masks = torch.cat([MASKS[kind](0.5)(blank(8, (14, 14)), generator(0, step)).hidden for step in range(4)])
    assert len(masks.unique(dim=0)) >= (28 if kind != "grid" else 2)             # a grid at one half has only two or four faces


def test_random_masks_are_uniform():
    "Every patch is hidden equally often, and every pair of patches; loosely, with a fixed seed."
    rows = torch.cat([RandomPatches(0.5)(blank(500, (4, 4)), generator(0, step)).hidden for step in range(8)]).float()
    n, patches = rows.shape
    each = rows.sum(0)
    chi = ((each - n / 2) ** 2 / (n / 4)).sum().item() * (patches - 1) / patches  # hidden counts are tied together by their sum
    assert 4 < chi < 38                                                          # 15 degrees of freedom: 0.3 and 99.9 percent
    pairs = (rows.T @ rows)[tuple(torch.triu_indices(16, 16, 1))]
    chance = 8 * 7 / (16 * 15)
    assert ((pairs - n * chance).abs() / math.sqrt(n * chance * (1 - chance)) < 5).all()


@quick
@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.05, 0.95), seeds)
def test_a_block_is_compact(rows, columns, ratio, seed):
    "The box around it holds less than one more row or column."
    hidden = Block(ratio)(blank(3, (rows, columns)), generator(seed)).hidden.reshape(3, rows, columns)
    for mask in hidden:
        if not mask.any(): continue
        down, right = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = int(down[-1] - down[0] + 1), int(right[-1] - right[0] + 1)
        assert height * width - int(mask.sum()) < max(height, width)


def test_blocks_lie_everywhere_and_in_several_shapes():
    hidden = Block(0.25)(blank(400, (8, 8)), generator(0)).hidden.reshape(-1, 8, 8)
    assert (hidden.float().mean(0) > 0.05).all()
    tall = hidden.any(2).sum(1) > hidden.any(1).sum(1)
    wide = hidden.any(2).sum(1) < hidden.any(1).sum(1)
    assert tall.sum() > 60 and wide.sum() > 60


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("columns", [2, 4, 8, 16])
def test_a_grid_keeps_one_in_every_two_by_two(rows, columns):
    for seed in range(5):
        kept = ~Grid(0.75)(blank(6, (rows, columns)), generator(seed)).hidden.reshape(6, rows, columns)
        assert (kept.unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)) == 1).all()


@quick
@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.1, 0.75), seeds)
def test_a_grid_leaves_no_large_hole(rows, columns, ratio, seed):
    "No window of four by four is hidden whole, on any grid, seams included."
    hidden = Grid(ratio)(blank(2, (rows, columns)), generator(seed)).hidden.reshape(2, rows, columns)
    if rows >= 4 and columns >= 4: assert not hidden.unfold(1, 4, 1).unfold(2, 4, 1).all(-1).all(-1).any()


@quick
@given(sides, sides)
def test_the_order_of_a_grid_has_no_ties(rows, columns):
    assert len(dither(rows, columns).unique()) == rows * columns


def test_bayers_table():
    assert dither(4, 4).tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_masks_touch_no_pixel(kind):
    pixels = noise()
    view = hide(kind, pixels)
    assert view.pixels is pixels and view.grid == (6, 6)


@quick
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), seeds)
def test_a_mask_blown_up_to_pixels(rows, columns, scale, seed):
    hidden = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    big = to_pixels(hidden, (rows, columns), (rows * scale, columns * 2 * scale))
    assert big.shape == (2, 1, rows * scale, columns * 2 * scale) and big.dtype == torch.bool
    for y in range(rows * scale):
        for x in range(columns * 2 * scale): assert (big[:, 0, y, x] == hidden[:, y // scale * columns + x // (2 * scale)]).all()


# ---- mix

@quick
@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), seeds)
def test_mix_takes_patches_of_one_other_picture_from_the_same_place(batch, rows, columns, ratio, seed):
    patch = 3
    pixels = noise(batch, rows * patch, columns * patch, seed)
    mixed = hide("mix", pixels, seed, (rows, columns), ratio=ratio).pixels
    cut = lambda x: x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(batch, rows * columns, -1)
    own, new, count = cut(pixels), cut(mixed), math.floor(ratio * rows * columns + 1e-9)
    for i in range(batch):
        mine = (new[i] == own[i]).all(1)                                          # to the bit
        assert int((~mine).sum()) == count
        givers = [j for j in range(batch) if j != i and (new[i][~mine] == own[j][~mine]).all()]
        assert len(givers) >= 1 and (count == 0 or len(givers) == 1)


def test_mix_reaches_every_other_picture():
    pixels, givers = noise(4), set()
    for seed in range(30):
        mixed = hide("mix", pixels, seed).pixels
        givers |= {j for j in range(1, 4) if ((mixed[0] == pixels[j]).all(0) & (pixels[j] != pixels[0]).all(0)).float().mean() > 0.4}
    assert givers == {1, 2, 3}


def test_mix_needs_company():
    with pytest.raises(PliError, match="at least two"): hide("mix", noise(1))


def test_mix_with_a_patch_mask_keeps_both():
    view = parse_hide("mix:0.5+random:0.5")(View(noise(), (6, 6)), generator(0))
    assert (view.hidden.sum(1) == 18).all() and not torch.equal(view.pixels, noise())


# ---- recolour

def cards(batch=6, size=24, seed=0):
    "White pictures with a few flat shapes, a grey scale among them."
    chance, pixels = torch.Generator().manual_seed(seed), torch.ones(batch, 3, size, size)
    pixels[:, :, 4:8, 4:20] = torch.rand(batch, 3, 1, 1, generator=chance)
    pixels[:, :, 10:12, 2:20] = torch.linspace(0, 1, 18)
    pixels[:, :, 14:20, 6:12] = torch.rand(batch, 3, 1, 1, generator=chance)
    return pixels


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1), st.floats(0, 4))
def test_recolour_keeps_white_range_and_structure(seed, share, low, more):
    pixels = cards(seed=seed)
    new = hide("recolour", pixels, seed, share=share, low=low, high=low + more).pixels
    assert new.shape == pixels.shape and new.dtype == pixels.dtype and (new >= 0).all() and (new <= 1).all()
    white = (pixels == 1).all(1, keepdim=True).expand_as(pixels)
    assert (new[white] == 1).all()                                                # exactly
    for before, after in zip(pixels, new):                                        # equal pixels stay equal
        flat, image = before.flatten(1).T, after.flatten(1).T
        _, group = flat.unique(dim=0, return_inverse=True)
        for g in group.unique(): assert (image[group == g] == image[group == g][0]).all()


@quick
@given(seeds)
def test_recolour_permutes_and_scales_the_ink(seed):
    "By a slow search over the six orders: one order and three scales explain the whole picture."
    pixels = 0.5 + 0.45 * noise(3, 6, 6, seed)                                    # light enough that nothing is cut off
    new = hide("recolour", pixels, seed, share=1.0).pixels
    for before, after in zip(1 - pixels.double(), 1 - new.double()):
        fits = []
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            scale = (after / before[list(order)]).flatten(1)
            fits.append(bool((scale.amax(1) - scale.amin(1) < 1e-2).all() and (scale > 0.149).all() and (scale < 1.201).all()))
        assert any(fits)


@quick
@given(seeds)
def test_grey_pixels_get_one_tint(seed):
    "The inks of a grey scale stay in proportion: one colour, from none of it to full."
    pixels = torch.linspace(0, 1, 12).expand(2, 3, 4, 12)
    ink = 1 - hide("recolour", pixels, seed, share=1.0, high=1.0).pixels
    assert torch.allclose(ink[..., :1] * torch.linspace(1, 0, 12), ink, atol=1e-6)


def test_pictures_that_are_not_chosen_stay_to_the_bit():
    pixels = noise(400, 4, 4)
    for kind in ("recolour", "grey"):
        same = (hide(kind, pixels, share=0.7).pixels == pixels).flatten(1).all(1)
        assert 80 < same.sum() < 160                                              # three in ten
        assert (hide(kind, pixels, share=0.0).pixels == pixels).all()
        assert not (hide(kind, pixels, share=1.0).pixels == pixels).flatten(1).all(1).any()


def test_recolour_of_a_batch_is_independent():
    new = hide("recolour", cards(1).expand(40, -1, -1, -1), share=1.0).pixels
    assert len(new.flatten(1).unique(dim=0)) == 40


# ---- grey, blur, crop

@quick
@given(seeds, st.integers(1, 5))
def test_grey_keeps_luma(seed, batch):
    pixels = noise(batch, 5, 7, seed)
    new = hide("grey", pixels, seed, grid=(1, 1)).pixels
    assert (new[:, 0] == new[:, 1]).all() and (new[:, 1] == new[:, 2]).all()
    luma = lambda x: (x * LUMA[:, None, None]).sum(1)
    assert torch.allclose(luma(new), luma(pixels), atol=1e-3) and (new >= 0).all() and (new <= 1).all()
    assert torch.allclose(hide("grey", new, seed).pixels, new, atol=1e-3)         # grey stays what it is


@quick
@given(st.floats(0.005, 1), st.integers(2, 40), st.integers(2, 40), seeds)
def test_blur_keeps_constant_pictures_mean_and_range(strength, height, width, seed):
    flat = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(2, 3, height, width)
    assert torch.allclose(hide("blur", flat, strength=strength).pixels, flat, atol=1e-5)
    pixels = noise(2, height, width, seed)
    new = hide("blur", pixels, strength=strength).pixels
    assert new.shape == pixels.shape and (new > -1e-6).all() and (new < 1 + 1e-6).all()
    assert (new.amax((2, 3)) <= pixels.amax((2, 3)) + 1e-5).all() and (new.amin((2, 3)) >= pixels.amin((2, 3)) - 1e-5).all()
    if min(height, width) >= 12: assert torch.allclose(new.mean((2, 3)), pixels.mean((2, 3)), atol=0.06)


def test_blur_takes_detail_and_keeps_layout():
    y = torch.arange(48)
    stripes, halves = ((y // 2) % 2).float(), (y >= 24).float()
    fine, coarse = (line[:, None].expand(1, 3, 48, 48) for line in (stripes, halves))
    contrast = lambda x: float(x[..., 6:-6].amax() - x[..., 6:-6, 6:-6].amin())
    assert hide("blur", fine).pixels[:, :, 8:-8].std() < 0.05 * fine.std()
    assert contrast(hide("blur", coarse).pixels) > 0.95
    widths = [hide("blur", coarse, strength=s).pixels[0, 0, :, 24].diff().abs().max() for s in (0.02, 0.06, 0.2)]
    assert widths[0] > widths[1] > widths[2]                                      # a number that means something


@quick
@given(st.floats(0.01, 1), st.integers(1, 3), st.integers(2, 30), st.integers(2, 30), seeds)
def test_a_crop_shows_nothing_new(area, batch, height, width, seed):
    flat = torch.rand(batch, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(batch, 3, height, width)
    assert torch.allclose(hide("crop", flat, seed, area=area).pixels, flat, atol=1e-5)
    pixels = noise(batch, height, width, seed)
    new = hide("crop", pixels, seed, area=area).pixels
    assert new.shape == pixels.shape and (new >= 0).all() and (new <= 1).all()
    assert (new.amax((2, 3)) <= pixels.amax((2, 3)) + 1e-5).all() and (new.amin((2, 3)) >= pixels.amin((2, 3)) - 1e-5).all()
    assert torch.allclose(hide("crop", pixels, seed, area=1.0).pixels, pixels, atol=1e-4)      # the whole is the whole


@quick
@given(st.floats(0.05, 0.95), seeds)
def test_a_crop_is_a_window_of_that_area_inside_the_picture(area, seed):
    "Pixels that tell their own place: corners of the window, read off a ramp."
    size = 200
    ramp = (torch.arange(size) + 0.5) / size
    pixels = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size)])[None]
    new = hide("crop", pixels, seed, area=area).pixels[0]
    across, down = (new[0, 100, -2] - new[0, 100, 1]) * size / (size - 3), (new[1, -2, 100] - new[1, 1, 100]) * size / (size - 3)
    assert across.item() == pytest.approx(math.sqrt(area), abs=0.02) and down.item() == pytest.approx(math.sqrt(area), abs=0.02)
    assert (new[:2, 1:-1, 1:-1] > 0).all() and (new[:2, 1:-1, 1:-1] < 1).all()


def test_crops_lie_everywhere():
    ramp = torch.arange(48).float()[:, None].expand(1, 3, 48, 48) / 48
    top = torch.stack([hide("crop", ramp, seed, area=0.25).pixels[0, 0, 0, 0] for seed in range(60)])
    assert top.min() < 0.08 and top.max() > 0.42


# ---- all of them

EVERY = ["none", "random", "block", "grid", "mix", "recolour", "grey", "blur", "crop", "recolour+random:0.5", "grey+blur+block", "crop+mix+grid:0.5"]


@pytest.mark.parametrize("text", EVERY)
def test_reproducible_and_the_input_is_left_alone(text):
    pixels = noise(5, 30, 42)
    kept, before = pixels.clone(), torch.get_rng_state()
    one, two = (parse_hide(text)(View(pixels, (5, 7)), generator(3, text)) for _ in range(2))
    assert torch.equal(one.pixels, two.pixels) and torch.equal(pixels, kept)
    assert (one.hidden is None) == (two.hidden is None) and (one.hidden is None or torch.equal(one.hidden, two.hidden))
    assert torch.equal(torch.get_rng_state(), before) and one.grid == (5, 7) and one.pixels.shape == pixels.shape


@pytest.mark.parametrize("text", [text for text in EVERY if "mix" not in text])
def test_batches_of_one(text):
    view = parse_hide(text)(View(noise(1), (6, 6)), generator(0))
    assert view.pixels.shape == (1, 3, 48, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", EVERY)
def test_precision_is_kept(text, dtype):
    view = parse_hide(text)(View(noise().to(dtype), (6, 6)), generator(0))
    exact = parse_hide(text)(View(noise().to(dtype).double(), (6, 6)), generator(0))
    assert view.pixels.dtype == dtype and (view.hidden is None or view.hidden.dtype == torch.bool)
    if dtype in (torch.float32, torch.float64): assert torch.allclose(view.pixels.double(), exact.pixels, atol=1e-4)
    else: assert (view.pixels.double() - exact.pixels).abs().mean() < 0.05      # a window's place is rounded too


@pytest.mark.parametrize("text", [text for text in EVERY if text != "none"])
def test_the_device_is_kept(text):
    "Step by step on torch's `meta`, which refuses to mix with the processor just as an accelerator would."
    view = View(noise().to("meta"), (6, 6))
    for step in parse_hide(text).steps: view = step(view, generator(0))
    assert view.pixels.device.type == "meta" and (view.hidden is None or view.hidden.device.type == "meta")


@pytest.mark.parametrize("text", EVERY)
def test_autocast_changes_nothing(text):
    plain = parse_hide(text)(View(noise(), (6, 6)), generator(0))
    with torch.autocast("cpu", torch.bfloat16): mixed = parse_hide(text)(View(noise(), (6, 6)), generator(0))
    assert mixed.pixels.dtype == torch.float32 and torch.equal(mixed.pixels, plain.pixels)


@pytest.mark.parametrize("name", list(HIDERS))
def test_each_says_what_it_teaches_and_is_a_record(name):
    hider = HIDERS[name]()
    assert len(hider.teaches.split()) > 3 and hider == HIDERS[name]() and hash(hider) == hash(HIDERS[name]())
    with pytest.raises(dataclasses.FrozenInstanceError): hider.ratio = 0.1
    assert parse_hide(name).teaches == hider.teaches
    assert parse_hide(f"{name}+grey").teaches == f"{hider.teaches}; {Grey.teaches}"


# ---- the language

numbers = st.floats(0, 0.99).map(lambda x: round(x, 6))


@quick
@given(st.lists(st.one_of(
    st.builds(Mix, numbers), st.builds(Grey, numbers), st.builds(Crop, numbers.map(lambda x: x + 0.001)), st.builds(Blur, numbers.map(lambda x: x + 0.001)),
    st.builds(lambda a, b, c: Recolour(a, b, b + c), numbers, numbers, numbers), st.just(Nothing())), max_size=4),
    st.one_of(st.none(), *(st.builds(kind, numbers) for kind in MASKS.values())), st.booleans(), st.data())
def test_parse_hide_round_trip(steps, mask, spaced, data):
    steps = steps + [mask] * (mask is not None)
    assume(steps)
    names = {kind: name for name, kind in HIDERS.items()}
    text = (" + " if spaced else "+").join(":".join([names[type(step)], *(repr(value) for value in dataclasses.astuple(step))]) for step in steps)
    hider = parse_hide(text)
    assert hider.steps == tuple(steps) and str(hider) == text and parse_hide(str(hider)) == hider


@pytest.mark.parametrize("text, hider", [
    ("random", RandomPatches(0.75)), ("random:0", RandomPatches(0.0)), (" block : 0.3 ", Block(0.3)), ("grid:1e-1", Grid(0.1)), ("none", Nothing()),
    ("recolour:1", Recolour(1.0)), ("recolour:1:0.5", Recolour(1.0, 0.5)), ("recolour:1:0.5:0.9", Recolour(1.0, 0.5, 0.9)),
])
def test_settings_by_place(text, hider):
    assert parse_hide(text).steps == (hider,)


@pytest.mark.parametrize("text, words", [
    ("", "'' is not a way of hiding"), ("recolor", "'recolor' is not a way"), ("Random", "'Random' is not"), ("random+", "'' is not"), ("+", "'' is not"), ("random,0.5", "is not a way"), ("random:0.5;grey", "setting that is not a number"),
    ("random:half", "'random:half' has a setting that is not a number"), ("random:", "not a number"), ("random:50%", "not a number"), ("random:0.5:2", "random takes at most 1 settings .ratio"),
    ("none:1", "none takes at most 0"), ("recolour:1:2:3:4", "at most 3 settings .share, low, high"),
    ("random:1", "ratio must be in .0, 1., got 1"), ("random:-0.1", "random: ratio"), ("block:2", "block: ratio"), ("grid:nan", "grid: ratio"), ("mix:1", "mix: ratio"), ("random:inf", "random: ratio"),
    ("recolour:1.1", "recolour: share"), ("recolour:1:2:1", "low <= high"), ("recolour:1:-1", "low <= high"), ("recolour:1:nan", "low <= high"), ("recolour:1:0:inf", "low <= high"), ("grey:-1", "grey: share"), ("grey:nan", "grey: share"),
    ("blur:0", "blur: strength"), ("blur:1.5", "blur: strength"), ("blur:nan", "blur: strength"), ("crop:0", "crop: area"), ("crop:1.01", "crop: area"), ("crop:-1", "crop: area"),
    ("random+block", "only one patch mask"), ("grid+recolour+random", "only one patch mask"), ("random+random", "only one patch mask"),
])
def test_what_is_not_understood_is_named(text, words):
    with pytest.raises(PliError, match=words): parse_hide(text)


def test_the_ends_of_the_ranges_are_allowed():
    for text in ("random:0", "recolour:0", "recolour:1:0:0", "grey:0", "blur:1", "crop:1", "mix:0"):
        parse_hide(text)(View(noise(), (6, 6)), generator(0))


# ---- together

@pytest.mark.parametrize("first", sorted(MASKS))
@pytest.mark.parametrize("second", sorted(MASKS))
def test_two_patch_masks_are_refused_also_when_composed_by_hand(first, second):
    both = Composed((MASKS[first](0.3), Grey(), MASKS[second](0.3)), "by hand")
    with pytest.raises(PliError, match="only one patch mask"): both(View(noise(), (6, 6)), generator(0))
    with pytest.raises(PliError, match="only one patch mask"): add_mask(MASKS[first](0.3)(blank(2, (6, 6)), generator(0)), torch.zeros(2, 36, dtype=torch.bool))


def test_steps_follow_each_other_and_share_one_generator():
    heard = []
    @dataclass(frozen=True)
    class Note:
        name: str
        def __call__(self, view, generator):
            heard.append((self.name, float(view.pixels.mean()), torch.rand(1, generator=generator).item()))
            return view.replace(pixels=view.pixels + 1)
    view = Composed((Note("a"), Note("b"), Note("c")), "a+b+c")(View(torch.zeros(1, 3, 4, 4), (2, 2)), generator(5))
    chance = generator(5)
    assert heard == [(name, float(i), torch.rand(1, generator=chance).item()) for i, name in enumerate("abc")]
    assert float(view.pixels.mean()) == 3.0


def test_the_order_of_corruptions_matters_and_is_the_texts():
    pixels = cards(seed=4)
    view = parse_hide("recolour:1+grey")(View(pixels, (6, 6)), generator(9))
    chance = generator(9)
    by_hand = Grey()(Recolour(1.0)(View(pixels, (6, 6)), chance), chance)
    assert torch.equal(view.pixels, by_hand.pixels) and (view.pixels[:, 0] == view.pixels[:, 1]).all()
    assert not (parse_hide("grey+recolour:1")(View(pixels, (6, 6)), generator(9)).pixels[:, 0] == view.pixels[:, 1]).all()


def test_a_mask_before_a_corruption_stays():
    view = parse_hide("block:0.5+crop+recolour")(View(noise(), (6, 6)), generator(0))
    assert (view.hidden.sum(1) == 18).all()


# ---- somebody else's way of hiding

def test_a_users_own_way_is_found(monkeypatch):
    @dataclass(frozen=True)
    class TopRows:
        "Hide the top."
        rows: float = 1
        teaches: ClassVar[str] = "words for skies"
        def __call__(self, view, generator): return add_mask(view, (torch.arange(view.patches) < int(self.rows) * view.grid[1]).expand(len(view.pixels), -1))

    class Dark:
        "No record and no settings; `__call__` and `teaches` are all that a hider needs."
        teaches = "words for day and night"
        def __call__(self, view, generator): return view.replace(pixels=view.pixels * 0)

    monkeypatch.setitem(HIDERS, "top", TopRows)
    monkeypatch.setitem(HIDERS, "dark", Dark)
    hider = parse_hide("dark+top:2")
    view = hider(View(noise(), (6, 6)), generator(0))
    assert hider.steps[1] == TopRows(2.0) and view.hidden[0].tolist() == [True] * 12 + [False] * 24 and (view.pixels == 0).all()
    assert hider.teaches == "words for day and night; words for skies"
    with pytest.raises(PliError, match="only one patch mask"): parse_hide("top+random")(View(noise(), (6, 6)), generator(0))
    with pytest.raises(PliError, match="dark takes at most 0"): parse_hide("dark:1")
    with pytest.raises(PliError, match="known are .*dark"): parse_hide("darker")
