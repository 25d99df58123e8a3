"Masks: counts, shapes and chance. Corruptions: what each one leaves alone. The small language that names them."
import contextlib
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pli import world
from pli.core import PliError, rng_for
from pli.hiding.language import CORRUPTIONS, Chain, Mixture, Schedule, parse_hide, pick_rows
from pli.hiding.patches import PATCH_MASKS, BlockPatches, GridPatches, GroundPatches, ObjectPatches
from pli.hiding.patches import RandomPatches, SimilarPatches, bayer_order, draw_distance, with_mask
from pli.hiding.words import WORD_LISTS, DropWords, OnlyWords, SwapBlock, WithoutWords, closest_captions, normalize_word
from pli.hiding.pixels import Band, Blur, Crop, Grey, MixPatches, Recolour, smooth
from pli.hiding.views import Nothing, View, hide_highest, kept_patches, upsample_mask

MASKS = {"random": RandomPatches, "block": BlockPatches, "grid": GridPatches, "object": ObjectPatches, "ground": GroundPatches, "similar": SimilarPatches}
PLACED = ("random", "block", "grid", "object", "ground")   # masks that do not look at the pixels
SAID = ("a red heart", "a blue heart, striped", "the red arrow", "a large circle", "blue")
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
    return CORRUPTIONS[kind](**fields)(View(pixels, grid, hidden), rng_for(seed, kind))


def released(patches, ratio):
    "What the released code of masked tuning keeps, except that something always stays."
    return max(1, int(patches * (1 - ratio)))


# ---- patch masks

@quick
@given(st.sampled_from(sorted(MASKS)), sides, sides, st.floats(0, 0.999), st.integers(1, 5), seeds)
def test_an_exact_number_is_hidden_in_every_row(kind, rows, columns, ratio, batch, seed):
    view = blank(batch, (rows, columns))
    hidden = MASKS[kind](ratio)(view, rng_for(seed)).hidden
    assert hidden.dtype == torch.bool and hidden.shape == (batch, rows * columns)
    assert ((~hidden).sum(1) == released(rows * columns, ratio)).all()
    assert hidden.sum(1)[0] < rows * columns                                     # something is left to see


COUNTS = {   # patches: kept at 0.25, 0.5, 0.75, 0.9, by the rule of the released code, worked out by hand
    49: (36, 24, 12, 4), 64: (48, 32, 16, 6), 196: (147, 98, 49, 19), 256: (192, 128, 64, 25)}


@pytest.mark.parametrize("kind", [*sorted(MASKS), "mix", "swap"])
@pytest.mark.parametrize("patches", COUNTS)
def test_the_released_codes_count_whatever_is_hidden(kind, patches):
    "Masks leave tokens out; mix and swap put another picture's patches in their place: one rule for both."
    side = math.isqrt(patches)
    view = View(noise(3, 2 * side, 2 * side), (side, side), captions=SAID[:3])
    for ratio, kept in zip((0.25, 0.5, 0.75, 0.9), COUNTS[patches], strict=True):
        seen = CORRUPTIONS[kind](ratio)(view, rng_for(0))
        if seen.hidden is not None: count = (~seen.hidden).sum(1)
        else: count = torch.nn.functional.avg_pool2d((seen.pixels == view.pixels).all(1, keepdim=True).float(), 2).flatten(1).eq(1).sum(1)
        assert count.tolist() == [kept] * 3
        later = parse_hide(f"none>{kind}:{ratio}")(view.replace(progress=1.0), rng_for(0))
        assert later.hidden is None or ((~later.hidden).sum(1) == kept).all()


@pytest.mark.parametrize("patches, ratio, kept", [(100, 0.29, 71), (10, 0.9, 1), (10, 0.7, 3), (36, 0.4, 21), (64, 0.4, 38), (1, 0.5, 1), (3, 0.9, 1), (49, 0.0, 49), (20, 0.95, 1)])
def test_floats_are_cut_as_the_released_code_cuts_them_but_one_patch_stays(patches, ratio, kept):
    "10 * (1 - 0.9) is 0.9999999999999998: the released code would keep none."
    assert kept_patches(patches, ratio) == kept == max(1, int(patches * (1 - ratio)))
    assert (~hide_highest(torch.rand(2, patches), ratio)).sum(1).tolist() == [kept, kept]


@quick
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 0.99), seeds)
def test_the_highest_are_hidden(batch, patches, ratio, seed):
    value = torch.randint(0, 5, (batch, patches), generator=torch.Generator().manual_seed(seed)).float()      # with many ties
    hidden = hide_highest(value, ratio)
    for row, gone in zip(value, hidden):
        if gone.any() and not gone.all(): assert row[gone].min() >= row[~gone].max()


@pytest.mark.parametrize("ratio", [1 - 1e-12, 1 - 2**-53])
def test_the_largest_share_still_leaves_one(ratio):
    for kind in MASKS.values(): assert (kind(ratio)(blank(2, (6, 6)), rng_for(0)).hidden.sum(1) == 35).all()


@quick
@given(st.sampled_from(PLACED), seeds, st.integers(1, 8))
def test_a_mask_depends_on_its_generator_alone(kind, seed, others):
    corruption, view = MASKS[kind](0.5), blank(3, (5, 7))
    before = torch.get_rng_state()
    for step in range(others): corruption(view, rng_for(seed, "hide", step + 1))    # other batches, before and in between
    first = corruption(view, rng_for(seed, "hide", 0)).hidden
    torch.rand(others)
    again = corruption(View(torch.ones(3, 3, 4, 4), (5, 7)), rng_for(seed, "hide", 0)).hidden      # other pictures
    torch.set_rng_state(before)
    assert torch.equal(first, again)


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_rows_and_steps_differ(kind):
    masks = torch.cat([MASKS[kind](0.5)(blank(8, (14, 14)), rng_for(0, step)).hidden for step in range(4)])
    assert len(masks.unique(dim=0)) >= (28 if kind != "grid" else 2)             # a grid at one half has only two or four faces


def test_every_mask_is_known_as_one():
    assert set(MASKS.values()) == set(PATCH_MASKS)
    for name, kind in CORRUPTIONS.items():
        hidden = kind()(View(noise(5), (6, 6), captions=SAID), rng_for(0)).hidden if name not in MASKS else None
        assert hidden is None


def test_random_masks_are_uniform():
    "Every patch is hidden equally often, and every pair of patches; loosely, with a fixed seed."
    rows = torch.cat([RandomPatches(0.5)(blank(500, (4, 4)), rng_for(0, step)).hidden for step in range(8)]).float()
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
    hidden = BlockPatches(ratio)(blank(3, (rows, columns)), rng_for(seed)).hidden.reshape(3, rows, columns)
    for mask in hidden:
        if not mask.any(): continue
        down, right = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = int(down[-1] - down[0] + 1), int(right[-1] - right[0] + 1)
        assert height * width - int(mask.sum()) < max(height, width)


def test_blocks_lie_everywhere_and_in_several_shapes():
    hidden = BlockPatches(0.25)(blank(400, (8, 8)), rng_for(0)).hidden.reshape(-1, 8, 8)
    assert (hidden.float().mean(0) > 0.05).all()
    tall = hidden.any(2).sum(1) > hidden.any(1).sum(1)
    wide = hidden.any(2).sum(1) < hidden.any(1).sum(1)
    assert tall.sum() > 60 and wide.sum() > 60


# ---- object and ground

@quick
@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.05, 0.95), seeds)
def test_the_thing_is_near_and_the_ground_is_far(rows, columns, ratio, seed):
    "One generator, one centre: what goes first in the one goes last in the other."
    thing, ground = (kind(ratio)(blank(3, (rows, columns)), rng_for(seed)).hidden for kind in (ObjectPatches, GroundPatches))
    far = draw_distance(blank(3, (rows, columns)), rng_for(seed), middle=True)
    for distance, near, away in zip(far, thing, ground):
        if not near.any(): continue
        assert distance[near].max() <= distance[~near].min() and distance[away].min() >= distance[~away].max()


def test_things_stand_near_the_middle_and_not_always_at_one_place():
    for ratio in (0.1, 0.25, 0.5):
        hidden = ObjectPatches(ratio)(blank(600, (10, 10)), rng_for(1)).hidden.reshape(-1, 10, 10).float()
        where = (torch.arange(10) + 0.5) / 10
        for axis in (1, 2):
            centre = (hidden.sum(3 - axis) * where).sum(1) / hidden.sum((1, 2))
            assert abs(centre.mean() - 0.5) < 0.02 and 0.05 < centre.std() < 0.12
        assert len(hidden.flatten(1).unique(dim=0)) > 100


def test_the_rim_goes_first():
    kept = ~GroundPatches(0.5)(blank(400, (8, 8)), rng_for(0)).hidden.reshape(-1, 8, 8)
    rim = torch.ones(8, 8, dtype=torch.bool); rim[1:-1, 1:-1] = False
    assert kept[:, rim].float().mean() < 0.25 and kept[:, 3:5, 3:5].float().mean() > 0.97


# ---- similar

def by_loop(pixels, rows, columns, drawn):
    "Distances of every patch to the drawn one, patch by patch."
    high, wide = pixels.shape[1] // rows, pixels.shape[2] // columns
    looks = []
    for y in range(rows):
        for x in range(columns):
            patch = pixels[:, y * high:(y + 1) * high, x * wide:(x + 1) * wide].flatten(1)
            looks.append([*patch.mean(1).tolist(), *patch.std(1, unbiased=False).tolist()])
    return torch.tensor([math.dist(look, looks[drawn]) for look in looks])


@quick
@given(st.integers(1, 6), st.integers(2, 6), st.floats(0.05, 0.95), seeds)
def test_what_looks_most_like_one_patch_is_hidden(rows, columns, ratio, seed):
    pixels = noise(3, rows * 4, columns * 5, seed) * noise(3, 1, 1, seed + 1) ** 2
    hidden = SimilarPatches(ratio)(View(pixels, (rows, columns)), rng_for(seed)).hidden
    for picture, gone in zip(pixels, hidden):
        if not gone.any(): continue
        fits = [drawn for drawn in gone.nonzero()[:, 0].tolist() if (far := by_loop(picture, rows, columns, drawn))[gone].max() <= far[~gone].min() + 3e-4]
        assert fits                                                               # one of the hidden ones explains all


def test_the_drawn_patch_is_any_patch_and_always_hidden():
    "With a share of just one patch the drawn one is what goes; on flat pictures, where all are equal, too."
    for pixels in (noise(400, 8, 8), torch.full((400, 3, 8, 8), 0.5)):
        hidden = SimilarPatches(1 / 16)(View(pixels, (4, 4)), rng_for(0)).hidden
        assert (hidden.sum(1) == 1).all() and (hidden.sum(0) > 8).all()


def disc_on_white(radius=18, size=64):
    "A red disc in the middle of a white page, and where it is."
    inside = ((torch.arange(size) - size / 2 + 0.5)[:, None] ** 2 + (torch.arange(size) - size / 2 + 0.5) ** 2) < radius**2
    pixels = torch.ones(1, 3, size, size); pixels[:, 1:, inside] = 0
    return pixels, inside


def test_it_starts_on_the_thing_and_not_on_the_page():
    "A uniform draw would start on the white page two times in three and leave the whole disc in view."
    pixels, inside = disc_on_white()
    red = torch.nn.functional.avg_pool2d(inside[None].float(), 8).flatten() > 0
    assert red.float().mean() < 0.4
    one = SimilarPatches(1 / 64)(View(pixels.expand(500, -1, -1, -1), (8, 8)), rng_for(0)).hidden
    assert one[:, red].sum() > 450                                                # the drawn patch alone
    half = SimilarPatches(0.5)(View(pixels.expand(500, -1, -1, -1), (8, 8)), rng_for(1)).hidden
    assert half[:, red].float().mean() > 0.8


def test_the_start_is_drawn_in_proportion_to_its_distance_from_the_border():
    "One picture of two inner patches, one three times as far from the white border as the other."
    pixels = torch.ones(4000, 3, 3, 4)
    pixels[:, :, 1, 1], pixels[:, :, 1, 2] = 0.8, 0.4
    drawn = SimilarPatches(1 / 12)(View(pixels, (3, 4)), rng_for(0)).hidden.float().mean(0).reshape(3, 4)
    assert drawn[1, 2].item() == pytest.approx(0.75, abs=0.03) and drawn[1, 1].item() == pytest.approx(0.25, abs=0.03)


def test_equals_go_at_random():
    hidden = SimilarPatches(0.5)(View(torch.ones(500, 3, 8, 8), (4, 4)), rng_for(0)).hidden.float().mean(0)
    assert (hidden > 0.4).all() and (hidden < 0.6).all()


def test_black_is_not_white_and_stripes_are_stripes():
    "An angle could not tell three greys apart, and pixels in their places could not tell that stripes are out of step."
    column = torch.cat([torch.full((1, 3, 8, 8), value) for value in (0.05, 0.05, 0.5, 0.5, 1.0, 1.0)], 2)
    for seed in range(10):
        hidden = SimilarPatches(1 / 3)(View(column, (6, 1)), rng_for(seed)).hidden[0]
        assert hidden[0] == hidden[1] and hidden[2] == hidden[3] and hidden[4] == hidden[5]
    stripe = (torch.arange(32) // 2 % 2).float()
    cloth = torch.cat([stripe, 1 - stripe, torch.full((64,), 0.5)])[:, None].expand(1, 3, 128, 16)   # stripes, stripes out of step, plain of the same mean
    for seed in range(10):
        hidden = SimilarPatches(0.5)(View(cloth, (8, 1)), rng_for(seed)).hidden[0].tolist()
        assert hidden in ([True] * 4 + [False] * 4, [False] * 4 + [True] * 4)


def test_after_a_corruption_similar_looks_at_what_is_there():
    flag = torch.zeros(30, 3, 8, 8); flag[:, 0, :, :4] = 1; flag[:, 1, :, 4:] = 0.2989 / 0.587   # red and green of one brightness
    halves = lambda hide: parse_hide(hide)(View(flag, (4, 4)), rng_for(2)).hidden.reshape(30, 4, 4)[:, :, :2].float().mean((1, 2))
    assert set(halves("similar:0.5").tolist()) == {0.0, 1.0} and not set(halves("grey+similar:0.5").tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("columns", [2, 4, 8, 16])
def test_a_grid_keeps_one_in_every_two_by_two(rows, columns):
    for seed in range(5):
        kept = ~GridPatches(0.75)(blank(6, (rows, columns)), rng_for(seed)).hidden.reshape(6, rows, columns)
        assert (kept.unfold(1, 2, 2).unfold(2, 2, 2).sum((-1, -2)) == 1).all()


@quick
@given(st.integers(2, 20), st.integers(2, 20), st.floats(0.1, 0.75), seeds)
def test_a_grid_leaves_no_large_hole(rows, columns, ratio, seed):
    "No window of four by four is hidden whole, on any grid, seams included."
    hidden = GridPatches(ratio)(blank(2, (rows, columns)), rng_for(seed)).hidden.reshape(2, rows, columns)
    if rows >= 4 and columns >= 4: assert not hidden.unfold(1, 4, 1).unfold(2, 4, 1).all(-1).all(-1).any()


@quick
@given(sides, sides)
def test_the_order_of_a_grid_has_no_ties(rows, columns):
    assert len(bayer_order(rows, columns).unique()) == rows * columns


def test_bayers_table():
    assert bayer_order(4, 4).tolist() == [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]


@pytest.mark.parametrize("kind", sorted(MASKS))
def test_masks_touch_no_pixel(kind):
    pixels = noise()
    view = hide(kind, pixels)
    assert view.pixels is pixels and view.grid == (6, 6)


@quick
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), seeds)
def test_a_mask_blown_up_to_pixels(rows, columns, scale, seed):
    hidden = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    big = upsample_mask(hidden, (rows, columns), (rows * scale, columns * 2 * scale))
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
    own, new, count = cut(pixels), cut(mixed), rows * columns - released(rows * columns, ratio)
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
    view = parse_hide("mix:0.5+random:0.5")(View(noise(), (6, 6)), rng_for(0))
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


# ---- band

@quick
@given(st.floats(0, 0.3), st.floats(0.01, 0.7), st.integers(2, 40), st.integers(2, 40), seeds)
def test_a_band_is_the_difference_of_two_blurs(fine, more, height, width, seed):
    pixels = noise(2, height, width, seed)
    new = hide("band", pixels, fine=fine, coarse=fine + more).pixels
    kept = hide("blur", pixels, strength=fine).pixels if fine else pixels
    assert kept.isfinite().all()
    assert torch.allclose(new, (0.5 + kept - hide("blur", pixels, strength=fine + more).pixels).clamp(0, 1), atol=1e-5)
    assert new.shape == pixels.shape and (new >= 0).all() and (new <= 1).all()


def test_a_band_keeps_outlines_and_loses_print_and_colour():
    y = torch.arange(96)
    lines = {"print": y // 2 % 2, "outline": (y > 44) & (y < 52), "slope": y / 96}
    left = {name: hide("band", line.float()[:, None].expand(1, 3, 96, 96)).pixels[..., 24:-24, :].std() / line.float()[24:-24].std() for name, line in lines.items()}
    assert left["print"] < 0.05 and left["slope"] < 0.1 and left["outline"] > 0.5
    red, blue = (hide("band", torch.tensor(colour)[:, None, None].expand(1, 3, 48, 48)).pixels for colour in ([0.9, 0.1, 0.1], [0.1, 0.1, 0.9]))
    assert torch.allclose(red, blue, atol=1e-5) and torch.allclose(red, torch.full_like(red, 0.5), atol=1e-5)


def test_a_wider_band_keeps_more():
    disc = ((torch.arange(64) - 32)[:, None] ** 2 + (torch.arange(64) - 32) ** 2 < 300).float().expand(1, 3, 64, 64)
    left = [hide("band", disc, coarse=coarse).pixels.std() for coarse in (0.04, 0.1, 0.3)]
    assert left[0] < left[1] < left[2]


def test_a_band_keeps_some_colour_of_a_thing_and_grey_before_it_keeps_none():
    pixels, inside = disc_on_white()
    chroma = lambda hide: (view := parse_hide(hide)(View(pixels, (8, 8)), rng_for(0)).pixels[0, :, inside]).amax(0).sub(view.amin(0)).mean().item()
    assert chroma("none") == 1 and 0.2 < chroma("band") < 0.6 and chroma("band:0.02:0.05") < chroma("band") / 2 < chroma("band:0.02:0.3")
    assert chroma("grey+band") < 1e-6
    page = parse_hide("band")(View(pixels, (8, 8)), rng_for(0)).pixels[0, :, inside]
    assert (page[0] > page[1]).all()                                              # what stays is its own colour


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (2, 9)])
@pytest.mark.parametrize("strength", [0.001, 0.02, 0.15, 1.0])
def test_two_routes_to_one_blur(size, strength):
    pixels = noise(2, *size)
    assert torch.allclose(smooth(pixels, strength), smooth(pixels, strength, product=True), atol=1e-5)
    assert torch.equal(smooth(pixels, strength), hide("blur", pixels, strength=strength).pixels)


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


# ---- words

plain_words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Z", "C")), min_size=1, max_size=6)
sentences = st.lists(st.one_of(plain_words, st.sampled_from("red Red, (BLUE) heart striped women's Women\u2019s 100%".split())), max_size=7).map(" ".join)


def words_of(corruption, captions, seed=0):
    return corruption(View(torch.zeros(len(captions), 3, 2, 2), (1, 1), captions=tuple(captions)), rng_for(seed)).captions


def is_part(few, many):
    "Whether the words come in this order in the others."
    rest = iter(many.split())
    return all(word in rest for word in few.split())


@quick
@given(st.lists(sentences, min_size=1, max_size=5), st.floats(0, 1), seeds)
def test_dropping_keeps_order_and_leaves_one(captions, ratio, seed):
    for before, after in zip(captions, words_of(DropWords(ratio), captions, seed), strict=True):
        assert is_part(after, before) and bool(after.split()) == bool(before.split())
        if ratio == 0: assert after.split() == before.split()


def test_words_are_dropped_independently_at_their_rate():
    caption = " ".join("abcdefgh")
    left = words_of(DropWords(0.3), [caption] * 2000)
    for letter in "abcdefgh": assert 0.66 < sum(letter in words for words in left) / 2000 < 0.74
    both = sum("a" in words and "b" in words for words in left) / 2000
    assert abs(both - 0.49) < 0.04
    alone = words_of(DropWords(1.0), [caption, "one two"] * 500)
    assert {len(words.split()) for words in alone} == {1} and {words for words in alone[::2]} == set("abcdefgh") and {words for words in alone[1::2]} == {"one", "two"}


@quick
@given(st.lists(sentences, min_size=1, max_size=5), st.sampled_from(sorted(WORD_LISTS)), seeds)
def test_only_and_without_split_a_caption(captions, what, seed):
    kept, rest = words_of(OnlyWords(what), captions, seed), words_of(WithoutWords(what), captions, seed + 1)         # nothing is drawn
    for caption, listed, others in zip(captions, kept, rest, strict=True):
        inside = [word for word in caption.split() if normalize_word(word) in WORD_LISTS[what]]
        outside = [word for word in caption.split() if normalize_word(word) not in WORD_LISTS[what]]
        assert listed == (" ".join(inside) or caption) and others == (" ".join(outside) or caption)


@pytest.mark.parametrize("word, same", [("Red", "red"), ("red,", "red"), ("(Navy-Blue)", "navy-blue"), ("Women\u2019s", "women's"), ("kids'", "kids"), ("\u201cTop\u201d", "top"), ("&", ""), ("\u00c9cru!", "\u00e9cru"), ("T-shirt", "t-shirt")])
def test_words_as_they_are_compared(word, same):
    assert normalize_word(word) == same


def test_word_lists_are_bare_and_cover_the_drawn_world():
    for name, words in WORD_LISTS.items(): assert words and all(normalize_word(word) == word and len(word.split()) == 1 for word in words), name
    assert WORD_LISTS["colour"] >= {*world.COLOURS, *world.BACKGROUNDS} and WORD_LISTS["shape"] == set(world.SHAPES) and WORD_LISTS["pattern"] >= {"plain", "striped", "dotted", "checked"}
    rows = world.sample(50, rng_for(0))
    said = world.caption(rows, world.SPARSE, rng_for(1))
    colours, shapes = [list(world.COLOURS)[row[1]] for row in rows.tolist()], [list(world.SHAPES)[row[0]] for row in rows.tolist()]
    assert list(words_of(OnlyWords("colour"), said)) == colours and list(words_of(OnlyWords("shape"), said)) == shapes
    assert not any(set(words.split()) & WORD_LISTS["colour"] for words in words_of(WithoutWords("colour"), said))


def test_users_add_their_own_lists(monkeypatch):
    with pytest.raises(PliError, match="only: 'sport' is not a list of words; known are colour"): OnlyWords("sport")
    monkeypatch.setitem(WORD_LISTS, "sport", frozenset({"cricket", "running"}))
    assert words_of(parse_hide("only:sport"), ["Puma Cricket Shoe"]) == ("Cricket",)


@pytest.mark.parametrize("name", ["drop", "only", "without", "ask", "swap"])
def test_hiders_of_words_need_words(name):
    with pytest.raises(PliError, match=f"{name} reads the captions"): parse_hide(name)(View(noise(), (6, 6)), rng_for(0))
    with pytest.raises(PliError, match="got 3 for 4 pictures"): parse_hide(name)(View(noise(), (6, 6), captions=("a", "b", "c")), rng_for(0))


def test_words_and_pictures_are_taken_away_in_one_go():
    view = parse_hide("recolour:1+only:colour+random:0.5")(View(noise(5), (6, 6), captions=SAID), rng_for(0))
    assert view.captions == ("red", "blue", "red", "a large circle", "blue") and (view.hidden.sum(1) == 18).all() and not torch.equal(view.pixels, noise(5))


# ---- swap

def best_givers(captions, i):
    "Slowly: who may give to picture i."
    bags = [{normalize_word(word) for word in caption.split()} - {""} for caption in captions]
    lists = [[normalize_word(word) for word in caption.split() if normalize_word(word)] for caption in captions]
    others = [j for j in range(len(captions)) if j != i]
    value = {j: 0.5 if lists[i] == lists[j] else len(bags[i] & bags[j]) for j in others}
    return {j for j in others if value[j] == max(value.values())}


@quick
@given(st.lists(st.lists(st.sampled_from("red Red, blue shirt cap &".split()), max_size=4).map(" ".join), min_size=2, max_size=7), seeds)
def test_the_closest_caption_by_a_slow_search(captions, seed):
    found = closest_captions(captions, rng_for(seed)).tolist()
    for i, giver in enumerate(found): assert giver in best_givers(captions, i)


def test_ties_are_drawn():
    shop = ["red cap", "blue cap", "green cap", "a boot", "boots"]
    found = torch.stack([closest_captions(shop, rng_for(seed)) for seed in range(200)])
    assert set(found[:, 0].tolist()) == {1, 2} and 60 < (found[:, 0] == 1).sum() < 140
    assert set(found[:, 3].tolist()) == {0, 1, 2, 4}                              # nobody shares a word: anybody else


@quick
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.99), seeds)
def test_swap_takes_one_block_of_the_giver_from_the_same_place(batch, rows, columns, ratio, seed):
    patch, captions = 3, SAID[:batch]
    pixels = noise(batch, rows * patch, columns * patch, seed)
    view = SwapBlock(ratio)(View(pixels, (rows, columns), captions=captions), rng_for(seed))
    cut = lambda x: x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(batch, rows * columns, -1)
    own, new, count = cut(pixels), cut(view.pixels), rows * columns - released(rows * columns, ratio)
    assert view.hidden is None and view.captions == captions
    for i in range(batch):
        mine = (new[i] == own[i]).all(1)
        assert int((~mine).sum()) == count
        assert count == 0 or {j for j in range(batch) if (new[i][~mine] == own[j][~mine]).all()} & best_givers(captions, i)
        down, right = (~mine).reshape(rows, columns).any(1).sum(), (~mine).reshape(rows, columns).any(0).sum()
        assert down * right - count < max(rows, columns)                          # compact


def test_swap_needs_company():
    with pytest.raises(PliError, match="swap needs at least two"): SwapBlock()(View(noise(1), (6, 6), captions=("a",)), rng_for(0))


# ---- all of them

EVERY = ["none", "random", "block", "grid", "mix", "recolour", "grey", "blur", "crop", "recolour+random:0.5", "grey+blur+block", "crop+mix+grid:0.5",
         "object", "ground", "similar", "band", "swap", "drop", "only:colour", "without:colour", "ask", "only:colour+ask", "swap+drop+similar:0.3", "random:0.5|blur", "mix|swap|grey+object", "grey>recolour:1+random:0.5", "drop|none>similar:0.2|swap>ground"]
ALONE = [text for text in EVERY if "mix" not in text and "swap" not in text]      # what needs no other picture


def seen(pixels, grid=(6, 6), progress=0.4):
    "A view with words, in the middle of a run."
    return View(pixels, grid, captions=(SAID * 2)[:len(pixels)], progress=progress)


@pytest.mark.parametrize("text", EVERY)
def test_reproducible_and_the_input_is_left_alone(text):
    pixels = noise(5, 30, 42)
    kept, before = pixels.clone(), torch.get_rng_state()
    one, two = (parse_hide(text)(seen(pixels, (5, 7)), rng_for(3, text)) for _ in range(2))
    assert torch.equal(one.pixels, two.pixels) and torch.equal(pixels, kept) and one.captions == two.captions and len(one.captions) == 5 and one.progress == 0.4
    assert (one.hidden is None) == (two.hidden is None) and (one.hidden is None or torch.equal(one.hidden, two.hidden))
    assert torch.equal(torch.get_rng_state(), before) and one.grid == (5, 7) and one.pixels.shape == pixels.shape


@pytest.mark.parametrize("text", ALONE)
def test_batches_of_one(text):
    view = parse_hide(text)(seen(noise(1)), rng_for(0))
    assert view.pixels.shape == (1, 3, 48, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", EVERY)
def test_precision_is_kept(text, dtype):
    view = parse_hide(text)(seen(noise().to(dtype)), rng_for(0))
    exact = parse_hide(text)(seen(noise().to(dtype).double()), rng_for(0))
    assert view.pixels.dtype == dtype and (view.hidden is None or view.hidden.dtype == torch.bool)
    if dtype in (torch.float32, torch.float64): assert torch.allclose(view.pixels.double(), exact.pixels, atol=1e-4)
    else: assert (view.pixels.double() - exact.pixels).abs().mean() < 0.05      # a window's place is rounded too


@pytest.mark.parametrize("text", [text for text in EVERY if text != "none"])
def test_pixels_stay_on_their_device_and_masks_on_the_cpu(text, monkeypatch):
    "On torch's `meta`, which refuses to mix with the processor just as an accelerator would, but knows no autocast."
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    if "similar" in text:      # its mask follows from the pixels, and is fetched from there
        with pytest.raises(NotImplementedError, match="meta"): parse_hide(text)(seen(noise().to("meta")), rng_for(0))
        return
    view = parse_hide(text)(seen(noise().to("meta")), rng_for(0))
    assert view.pixels.device.type == "meta" and (view.hidden is None or view.hidden.device.type == "cpu")     # a mask is looked at: on the CPU that waits for nothing


@pytest.mark.parametrize("text", EVERY)
def test_autocast_changes_nothing(text):
    plain = parse_hide(text)(seen(noise()), rng_for(0))
    with torch.autocast("cpu", torch.bfloat16): mixed = parse_hide(text)(seen(noise()), rng_for(0))
    assert mixed.pixels.dtype == torch.float32 and torch.equal(mixed.pixels, plain.pixels) and (plain.hidden is None or torch.equal(mixed.hidden, plain.hidden))


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_each_says_what_it_teaches_and_is_a_record(name):
    corruption = CORRUPTIONS[name]()
    assert len(corruption.teaches.split()) > 3 and corruption == CORRUPTIONS[name]() and hash(corruption) == hash(CORRUPTIONS[name]())
    with pytest.raises(dataclasses.FrozenInstanceError): corruption.ratio = 0.1
    assert parse_hide(name).teaches == corruption.teaches
    assert parse_hide(f"{name}+grey").teaches == f"{corruption.teaches}; {Grey.teaches}"


# ---- the language

numbers = st.floats(0, 0.99).map(lambda x: round(x, 6))


@quick
@given(st.lists(st.one_of(
    st.builds(MixPatches, numbers), st.builds(Grey, numbers), st.builds(Crop, numbers.map(lambda x: x + 0.001)), st.builds(Blur, numbers.map(lambda x: x + 0.001)),
    st.builds(lambda a, b, c: Recolour(a, b, b + c), numbers, numbers, numbers), st.just(Nothing())), max_size=4),
    st.one_of(st.none(), *(st.builds(kind, numbers) for kind in MASKS.values())), st.booleans(), st.data())
def test_parse_hide_round_trip(steps, mask, spaced, data):
    steps = steps + [mask] * (mask is not None)
    assume(steps)
    names = {kind: name for name, kind in CORRUPTIONS.items()}
    text = (" + " if spaced else "+").join(":".join([names[type(step)], *(repr(value) for value in dataclasses.astuple(step))]) for step in steps)
    corruption = parse_hide(text)
    assert corruption.steps == tuple(steps) and str(corruption) == text and parse_hide(str(corruption)) == corruption


@pytest.mark.parametrize("text, corruption", [
    ("random", RandomPatches(0.75)), ("random:0", RandomPatches(0.0)), (" block : 0.3 ", BlockPatches(0.3)), ("grid:1e-1", GridPatches(0.1)), ("none", Nothing()),
    ("recolour:1", Recolour(1.0)), ("recolour:1:0.5", Recolour(1.0, 0.5)), ("recolour:1:0.5:0.9", Recolour(1.0, 0.5, 0.9)),
])
def test_settings_by_place(text, corruption):
    assert parse_hide(text).steps == (corruption,)


@pytest.mark.parametrize("text, words", [
    ("", "'' is not a way of hiding"), ("recolor", "'recolor' is not a way"), ("Random", "'Random' is not"), ("random+", "'' is not"), ("+", "'' is not"), ("random,0.5", "is not a way"), ("random:0.5;grey", "setting that is not a number"),
    ("random:half", "'random:half' has a setting that is not a number"), ("random:", "not a number"), ("random:50%", "not a number"), ("random:0.5:2", "random takes at most 1 settings .ratio"),
    ("none:1", "none takes at most 0"), ("recolour:1:2:3:4", "at most 3 settings .share, low, high"),
    ("random:1", "ratio must be in .0, 1., got 1"), ("random:-0.1", "random: ratio"), ("block:2", "block: ratio"), ("grid:nan", "grid: ratio"), ("mix:1", "mix: ratio"), ("random:inf", "random: ratio"),
    ("recolour:1.1", "recolour: share"), ("recolour:1:2:1", "low <= high"), ("recolour:1:-1", "low <= high"), ("recolour:1:nan", "low <= high"), ("recolour:1:0:inf", "low <= high"), ("grey:-1", "grey: share"), ("grey:nan", "grey: share"),
    ("object:1", "object: ratio"), ("ground:-1", "ground: ratio"), ("similar:nan", "similar: ratio"), ("swap:1", "swap: ratio"), ("drop:1.01", "drop: ratio"), ("drop:nan", "drop: ratio"),
    ("band:0.2:0.1", "0 <= fine < coarse <= 1"), ("band:0.1:0.1", "fine < coarse"), ("band:-1", "0 <= fine"), ("band:0.1:1.1", "coarse <= 1"), ("band:nan", "fine < coarse"), ("band:0.1:nan", "fine < coarse"),
    ("only:color", "only: 'color' is not a list of words; known are colour, wearer"), ("without:", "without: '' is not a list"), ("only:0.5", "'0.5' is not a list"), ("only:colour:tone", "only takes at most 1 settings .what"),
    ("random|", "--hide 'random|': '' is not"), ("|", "'' is not"), (">", "'' is not"), ("random>", "--hide 'random>': '' is not"), ("random>>blur", "'' is not"), ("grey|blurr>none", "--hide 'grey|blurr>none': 'blurr' is not"),
    ("random:2|grey", "--hide 'random:2|grey': random: ratio"), ("grey>random:half", "--hide 'grey>random:half': 'random:half' has a setting"), ("grey|random+block>none", "only one patch mask .*'random.block' has more"), ("similar+object", "only one patch mask"),
    ("blur:0", "blur: strength"), ("blur:1.5", "blur: strength"), ("blur:nan", "blur: strength"), ("crop:0", "crop: area"), ("crop:1.01", "crop: area"), ("crop:-1", "crop: area"),
    ("random+block", "only one patch mask"), ("grid+recolour+random", "only one patch mask"), ("random+random", "only one patch mask"),
])
def test_what_is_not_understood_is_named(text, words):
    with pytest.raises(PliError, match=words): parse_hide(text)


def test_the_ends_of_the_ranges_are_allowed():
    for text in ("random:0", "recolour:0", "recolour:1:0:0", "grey:0", "blur:1", "crop:1", "mix:0", "object:0", "ground:0", "similar:0", "swap:0", "drop:0", "drop:1", "band:0:1", "band:0:0.001"):
        parse_hide(text)(seen(noise()), rng_for(0))


# ---- together

@pytest.mark.parametrize("first", sorted(MASKS))
@pytest.mark.parametrize("second", sorted(MASKS))
def test_two_patch_masks_are_refused_also_when_composed_by_hand(first, second):
    both = Chain((MASKS[first](0.3), Grey(), MASKS[second](0.3)), "by hand")
    with pytest.raises(PliError, match="only one patch mask"): both(View(noise(), (6, 6)), rng_for(0))
    with pytest.raises(PliError, match="only one patch mask"): with_mask(MASKS[first](0.3)(blank(2, (6, 6)), rng_for(0)), torch.zeros(2, 36, dtype=torch.bool))


def test_steps_follow_each_other_and_share_one_generator():
    heard = []
    @dataclass(frozen=True)
    class Note:
        name: str
        def __call__(self, view, generator):
            heard.append((self.name, float(view.pixels.mean()), torch.rand(1, generator=generator).item()))
            return view.replace(pixels=view.pixels + 1)
    view = Chain((Note("a"), Note("b"), Note("c")), "a+b+c")(View(torch.zeros(1, 3, 4, 4), (2, 2)), rng_for(5))
    chance = rng_for(5)
    assert heard == [(name, float(i), torch.rand(1, generator=chance).item()) for i, name in enumerate("abc")]
    assert float(view.pixels.mean()) == 3.0


def test_the_order_of_corruptions_matters_and_is_the_texts():
    pixels = cards(seed=4)
    view = parse_hide("recolour:1+grey")(View(pixels, (6, 6)), rng_for(9))
    chance = rng_for(9)
    by_hand = Grey()(Recolour(1.0)(View(pixels, (6, 6)), chance), chance)
    assert torch.equal(view.pixels, by_hand.pixels) and (view.pixels[:, 0] == view.pixels[:, 1]).all()
    assert not (parse_hide("grey+recolour:1")(View(pixels, (6, 6)), rng_for(9)).pixels[:, 0] == view.pixels[:, 1]).all()


def test_a_mask_before_a_corruption_stays():
    view = parse_hide("block:0.5+crop+recolour")(View(noise(), (6, 6)), rng_for(0))
    assert (view.hidden.sum(1) == 18).all()


# ---- one of several

def rows_that_are(view, other):
    "Which rows of a view are those of another, in pixels and mask."
    same = (view.pixels == other.pixels).flatten(1).all(1)
    mask = torch.zeros_like(view.hidden) if other.hidden is None else other.hidden
    return same & (view.hidden == mask).all(1)


def test_a_mixture_takes_each_row_whole_from_one_way_and_uniformly():
    pixels, ways = noise(300, 12, 12), ["random:0.5", "grey", "recolour:1+block:0.25"]
    view = parse_hide("|".join(ways))(View(pixels, (6, 6)), rng_for(4))
    chance = rng_for(4)
    choice = torch.randint(3, (300,), generator=chance)
    parts = [parse_hide(way)(View(pixels, (6, 6)), chance) for way in ways]
    for number, part in enumerate(parts): assert torch.equal(rows_that_are(view, part), choice == number) and 70 < (choice == number).sum() < 130
    assert set(view.hidden.sum(1).tolist()) == {0, 9, 18}


def test_a_way_named_twice_comes_twice_as_often():
    view = parse_hide("none|none|grey")(View(noise(600, 4, 4), (2, 2)), rng_for(0))
    assert view.hidden is None and 340 < (view.pixels == noise(600, 4, 4)).flatten(1).all(1).sum() < 460


def test_words_of_a_mixture_follow_the_picture():
    captions = ("a red heart",) * 200
    view = parse_hide("grey+only:colour|without:colour")(View(noise(200, 4, 4), (2, 2), captions=captions), rng_for(0))
    grey = (view.pixels[:, 0] == view.pixels[:, 1]).flatten(1).all(1).tolist()
    assert view.captions == tuple("red" if one else "a heart" for one in grey) and 60 < sum(grey) < 140
    assert parse_hide("grey|none")(View(noise(4, 4, 4), (2, 2)), rng_for(0)).captions is None


def test_rows_of_another_mask_are_kept_by_hand():
    view = View(noise(2, 4, 4), (1, 2))
    masks = [view, view.replace(hidden=torch.tensor([[True, False], [False, True]]))]
    assert pick_rows(view, masks, torch.tensor([1, 0])).hidden.tolist() == [[True, False], [False, False]]
    assert pick_rows(view, masks[:1] * 2, torch.tensor([1, 0])).hidden is None


# ---- from easy to hard

@pytest.mark.parametrize("stages", [["grey", "random:0.5"], ["none", "blur", "recolour:1+random:0.75"], ["random:0.1", "random:0.2", "random:0.3", "random:0.4"], ["grey|random:0.5", "blur"]])
def test_a_schedule_begins_and_ends_as_its_stages(stages):
    "Number for number, as if they stood alone; so too at the stages in between."
    view = View(noise(), (6, 6))
    for number, stage in enumerate(stages):
        one = parse_hide(">".join(stages))(view.replace(progress=number / (len(stages) - 1)), rng_for(7))
        alone = parse_hide(stage)(view, rng_for(7))
        assert torch.equal(one.pixels, alone.pixels) and (one.hidden is None) == (alone.hidden is None) and (one.hidden is None or torch.equal(one.hidden, alone.hidden))
    last = parse_hide(">".join(stages))(view, rng_for(7))                       # a view that nobody told: the run is over
    assert torch.equal(last.pixels, alone.pixels)


@quick
@given(st.integers(2, 5), st.floats(0, 1), seeds)
def test_a_schedule_is_linear_between_stages(count, progress, seed):
    ratios = torch.linspace(0, 0.9, count).tolist()
    view = View(torch.zeros(400, 3, 2, 2), (1, 10), progress=progress)
    hidden = parse_hide(">".join(f"random:{ratio:.3f}" for ratio in ratios))(view, rng_for(seed)).hidden
    share, place = hidden.float().mean(1), progress * (count - 1)
    low, high = math.floor(place), math.ceil(place)
    steps = torch.tensor([(10 - released(10, float(f"{ratio:.3f}"))) / 10 for ratio in ratios])
    assert set(share.unique().tolist()) <= {float(steps[low]), float(steps[high])}          # neighbours only
    spread = abs(float(steps[high] - steps[low])) * 0.5 / 20
    assert abs(float(share.mean()) - float(steps[low] + (place - low) * (steps[high] - steps[low]))) <= 5 * spread + 1e-6


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf])
def test_progress_outside_a_run(progress):
    with pytest.raises(PliError, match="progress must be in .0, 1."): parse_hide("grey>blur")(View(noise(), (6, 6), progress=progress), rng_for(0))


combinations = st.lists(st.sampled_from(["none", "grey", "blur:0.05", "recolour:1:0.5", "only:colour", "drop:0.2", "swap"]), min_size=1, max_size=3).map("+".join)


@quick
@given(st.lists(st.lists(combinations, min_size=1, max_size=3), min_size=1, max_size=3), st.sampled_from(["{}", " {} "]))
def test_the_grammar_by_its_parts(stages, spaced):
    "`+` binds tightest, then `|`, then `>`; the text comes back to the letter."
    text = spaced.format(">").join(spaced.format("|").join(ways) for ways in stages)
    corruption = parse_hide(text)
    assert str(corruption) == text and parse_hide(str(corruption)) == corruption and hash(corruption) == hash(parse_hide(text))
    assert isinstance(corruption, Schedule) == (len(stages) > 1)
    for part, ways in zip(corruption.stages if len(stages) > 1 else [corruption], stages, strict=True):
        assert isinstance(part, Mixture) == (len(ways) > 1)
        for way, plain in zip(part.ways if len(ways) > 1 else [part], ways, strict=True):
            assert way.steps == parse_hide(plain).steps and way.teaches in corruption.teaches


def test_settings_are_words_where_the_field_says_so():
    assert parse_hide("only:wearer+without+drop:0.25").steps == (OnlyWords("wearer"), WithoutWords("colour"), DropWords(0.25))


# ---- somebody else's way of hiding

def test_a_users_own_way_is_found(monkeypatch):
    @dataclass(frozen=True)
    class TopRows:
        "Hide the top."
        rows: float = 1
        teaches: ClassVar[str] = "words for skies"
        def __call__(self, view, generator): return with_mask(view, (torch.arange(view.patches) < int(self.rows) * view.grid[1]).expand(len(view.pixels), -1))

    class Dark:
        "No record and no settings; `__call__` and `teaches` are all that a corruption needs."
        teaches = "words for day and night"
        def __call__(self, view, generator): return view.replace(pixels=view.pixels * 0)

    monkeypatch.setitem(CORRUPTIONS, "top", TopRows)
    monkeypatch.setitem(CORRUPTIONS, "dark", Dark)
    corruption = parse_hide("dark+top:2")
    view = corruption(View(noise(), (6, 6)), rng_for(0))
    assert corruption.steps[1] == TopRows(2.0) and view.hidden[0].tolist() == [True] * 12 + [False] * 24 and (view.pixels == 0).all()
    assert corruption.teaches == "words for day and night; words for skies"
    with pytest.raises(PliError, match="only one patch mask"): parse_hide("top+random")(View(noise(), (6, 6)), rng_for(0))
    with pytest.raises(PliError, match="dark takes at most 0"): parse_hide("dark:1")
    with pytest.raises(PliError, match="known are .*dark"): parse_hide("darker")


@given(seed=st.integers(0, 10_000), captions=st.lists(st.sampled_from(["Red", "navy blue", "Nike Men Red Shirt", "green", "RED"]), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_request_names_what_is_wanted_and_turns_down_only_something_else(seed, captions):
    asked = CORRUPTIONS["ask"]()(View(torch.zeros(len(captions), 3, 8, 8), (2, 2), captions=tuple(captions)), rng_for(seed)).captions
    for caption, said in zip(captions, asked):
        if len(caption.split()) > 3: assert said == caption
        else:
            assert caption in said and "{" not in said
            turned_down = said.partition(" instead of ")[2] or said.partition(", not ")[2]
            assert not turned_down or turned_down.lower() != caption.lower() and turned_down in captions and len(turned_down.split()) <= 3


def test_requests_are_limited_and_vary():
    with pytest.raises(PliError, match="ask: most must be at least 1, got 0"): parse_hide("ask:0")
    view = View(torch.zeros(60, 3, 8, 8), (2, 2), captions=("Red", "navy blue") * 30)
    assert len(set(parse_hide("ask")(view, rng_for(0)).captions)) > 10 and parse_hide("ask")(view, rng_for(0)).captions == parse_hide("ask")(view, rng_for(0)).captions
    assert set(parse_hide("ask:1")(view, rng_for(0)).captions) & {"navy blue"}


# What a run draws is decided by its seed and its steps, for ever: where one of these digests changes, old runs cannot be repeated or continued
DRAWN = {
    "random:0.75": "e1665a4e743c1dc4572f3e6515f1b833f53f4553768e099b14ff598c2db5be66",
    "crop:0.4+drop:0.5": "8dd3d9604095faa74f1bae18655e114cf051c689770668e3aa6550a66891c5de",
    "mix:0.5|swap:0.3+random:0.5": "c484e21b6f5fc19bd0834cea84b032a4db2ed97118ea5234972633d79173ded7",
    "random:0.5+only:colour+ask": "2831ac9905537e887bb4f22b63c40646f65d3a3963c1e090c497a88090e74c55",
}
GOLDEN_WORDS = ("a red heart", "a blue heart, striped", "the red arrow", "a large circle", "blue", "a small green star", "two pink rings", "a grey square, dotted")


@pytest.mark.parametrize("way", DRAWN)
def test_what_is_hidden_is_what_was_always_hidden(way):
    "Masks and words to the bit, and where pictures are copied whole patches at a time, whose pixels stand where."
    numbers = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 12, 12)           # picture 3 is 3/8 everywhere, which floats hold exactly
    digest = hashlib.sha256()
    for step in range(3):
        view = parse_hide(way)(View(numbers / 8, (6, 6), captions=GOLDEN_WORDS), rng_for(0, "hide", step))
        if view.hidden is not None: digest.update(view.hidden.to(torch.uint8).numpy().tobytes())
        digest.update(json.dumps(view.captions).encode())
        if "mix" in way: digest.update((8 * view.pixels[:, 0]).to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == DRAWN[way]


def test_a_way_of_hiding_without_end_is_refused_in_a_short_line():
    assert len(parse_hide("|".join(["random:0.5"] * 64)).ways) == 64
    for mark in "|>+":
        with pytest.raises(PliError, match="has 501 parts, and at most 64 are read") as told: parse_hide(mark.join(["blur"] * 501))
        assert len(str(told.value)) < 150
    for text in ("x" * 5000, "random:" + "y" * 5000):
        with pytest.raises(PliError, match="--hide 'x|--hide 'random") as told: parse_hide(text)
        assert len(str(told.value)) < 800
