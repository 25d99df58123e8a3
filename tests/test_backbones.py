"Every kind of picture tower, whole and masked, against open_clip itself and against slow computations; weights in and out."
import contextlib
import copy
import gc
import json
import os
import pickle
import weakref
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pli.backbones.transforms import PREPROCESS, TargetPad, pixel_transform
from pli.backbones.openclip import PatchGate, check_mask, find_gate, read_config, save_backbone
from pli.backbones.loading import load_backbone
from pli.core import PliError

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
COCA = {"text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True}, "custom_text": True,
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2}}


def plain(top=None, **vision):
    "A small transformer of open_clip's own: 4 by 4 patches."
    return {"embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, **vision},
            "text_cfg": TEXT, **(top or {})}


def pooled(kind, **vision):
    "With attention pooling. The two of CoCa's paper fit in open_clip where tower and features have one width, and only there."
    return plain(attentional_pool=kind, attn_pooler_queries=5, attn_pooler_heads=2, **vision)


def timm_tower(name, pool, size=32, proj=None, **more):
    return {"embed_dim": 24, "custom_text": True, "text_cfg": TEXT, **more,
            "vision_cfg": {"image_size": size, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": proj}}


def small(kind, more, **settings):
    "A timm transformer of 4 by 4 patches, as timm's own entry points make them."
    more = {key: value for key, value in more.items() if "cfg" not in key and key != "cache_dir"}
    model = kind(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **settings, **more})
    model.default_cfg = {"pool_size": None}
    return model


ROTATED = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}

@register_model
def plitest_vit(pretrained=False, **more): return small(VisionTransformer, more, pre_norm=True)

@register_model
def plitest_registers(pretrained=False, **more):
    return small(VisionTransformer, more, reg_tokens=3, no_embed_class=True, dynamic_img_size=True, init_values=0.1)

@register_model
def plitest_map(pretrained=False, **more): return small(VisionTransformer, more, class_token=False, global_pool="map")

@register_model
def plitest_dropping(pretrained=False, **more): return small(VisionTransformer, more, patch_drop_rate=0.5)

@register_model
def plitest_eva02(pretrained=False, **more): return small(Eva, more, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **ROTATED)

@register_model
def plitest_eva_mixed(pretrained=False, **more):
    return small(Eva, more, use_rot_pos_emb=True, rope_type="mixed", num_reg_tokens=2, no_embed_class=True, attn_type="rope")

@register_model
def plitest_eva_map(pretrained=False, **more): return small(Eva, more, patch_drop_rate=0.5, global_pool="map", attn_type="rope", **ROTATED)

@register_model
def plitest_eva_plain(pretrained=False, **more): return small(Eva, more, class_token=False, global_pool="avg")


OPEN_CLIP = {   # picture towers of open_clip's own
    "tok": plain(), "avg": plain(pool_type="avg"), "no-pre": plain(no_ln_pre=True), "sincos": plain(pos_embed_type="sin_cos_2d"),
    "final-tok": plain(final_ln_after_pool=True), "final-avg": plain(final_ln_after_pool=True, pool_type="avg"),
    "dropout": plain(patch_dropout=0.5), "quick": plain({"quick_gelu": True}), "scaled": plain(ls_init_value=0.1),
    "wide": plain(image_size=[32, 48], pool_type="avg"), "custom-text": plain({"custom_text": True}),
    "qk-norm": plain(qk_norm=True, scale_heads=True),
    "attn-tok": pooled(True), "attn-avg": pooled(True, pool_type="avg"), "parallel": pooled("parallel", width=24, head_width=12), "cascade": pooled("cascade", width=24, head_width=12),
    "coca": {**pooled(True, output_tokens=True), **COCA},
    "coca-cascade": {**pooled("cascade", width=24, head_width=12, output_tokens=True), **COCA},
}
TIMM = {        # transformers inside timm
    "timm-vit": timm_tower("plitest_vit", "token", proj="linear"), "timm-avg": timm_tower("plitest_vit", "avg", proj="mlp"),
    "timm-registers": timm_tower("plitest_registers", "token"), "timm-map": timm_tower("plitest_map", "map", proj="none", embed_dim=32, init_logit_bias=-10),
    "timm-dropping": timm_tower("plitest_dropping", "avg"), "timm-eva02": timm_tower("plitest_eva02", "token"), "timm-mixed": timm_tower("plitest_eva_mixed", "avg"),
    "timm-eva-map": timm_tower("plitest_eva_map", "map"), "timm-eva-plain": timm_tower("plitest_eva_plain", "avg"),
}
PAINTED = {     # no tokens: hidden pixels are painted
    "resnet": {"embed_dim": 24, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, "text_cfg": TEXT},
    "convnext": timm_tower("test_convnext", "avg", size=96, proj="linear"),
}
GATED = list(OPEN_CLIP) + list(TIMM)
EVERY = GATED + list(PAINTED)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in {**OPEN_CLIP, **TIMM, **PAINTED}.items(): (folder / f"plitest-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def get(configs):
    "Backbones by name, each made once."
    made = {}
    def one(name):
        if name not in made:
            made[name] = load_backbone(f"plitest-{name}", seed=3)
            stir(made[name])
        return made[name]
    return one


def stir(backbone):
    "Weights that start at nought or at one hide mistakes."
    chance = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in backbone.model.parameters(): weight += 0.05 * torch.randn(weight.shape, generator=chance)


def chance_pixels(backbone, batch=3, seed=0):
    return torch.randint(0, 256, (batch, 3, *backbone.size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def chance_mask(backbone, batch=3, ratio=0.6, seed=0):
    rank = torch.rand(batch, backbone.patches, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return rank < max(1, int(ratio * backbone.patches))


def over_pixels(backbone, hidden):
    "The mask as pixels, by a loop."
    (rows, columns), (height, width) = backbone.grid, backbone.size
    over = torch.zeros(len(hidden), 1, height, width, dtype=torch.bool)
    for i, row in enumerate(hidden.reshape(-1, rows, columns).tolist()):
        for y, line in enumerate(row):
            for x, gone in enumerate(line):
                over[i, 0, y * height // rows:(y + 1) * height // rows, x * width // columns:(x + 1) * width // columns] = gone
    return over


# ---- nothing hidden: open_clip, to the bit

@pytest.mark.parametrize("name", EVERY)
def test_whole_pictures_are_open_clips_to_the_bit(get, name):
    backbone = get(name)
    theirs, _, transform = open_clip.create_model_and_transforms(f"plitest-{name}")
    theirs.load_state_dict(backbone.model.state_dict())                     # strict: the gate left every key as it was
    assert list(theirs.state_dict()) == list(backbone.model.state_dict())
    theirs.eval()
    chance = torch.Generator().manual_seed(1)
    pictures = [Image.fromarray(torch.randint(0, 256, (*size, 3), generator=chance, dtype=torch.uint8).numpy()) for size in ((70, 50), (31, 90), (64, 64))]
    pictures[1] = pictures[1].convert("L")
    pixels = torch.stack([backbone.pixels(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 3, *backbone.size)
    with torch.no_grad():
        wanted = theirs.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=False).flatten(1)
        for mask in (None, torch.zeros(3, backbone.patches, dtype=torch.bool)):
            assert torch.equal(backbone.encode_image(pixels, mask), wanted)
            assert torch.equal(backbone.encode_image(pixels / 255, mask), wanted)


@pytest.mark.parametrize("name", ["tok", "coca", "timm-map", "resnet", "custom-text"])
def test_features_keep_their_length_and_texts_are_open_clips(get, name):
    backbone, texts = get(name), ["a red shirt", "", "words " * 40]
    tokens = open_clip.get_tokenizer(f"plitest-{name}")(texts)
    with torch.no_grad():
        assert torch.equal(backbone.encode_text(texts), backbone.model.encode_text(tokens, normalize=False))
        for features in (backbone.encode_text(texts), backbone.encode_image(chance_pixels(backbone))):
            assert (features.norm(dim=1) - 1).abs().max() > 1e-3
    assert backbone.scale.item() == pytest.approx(backbone.model.logit_scale.exp().item())


def bare(folder: Path) -> None:
    "Write weights again as others do, without what pli says beside them."
    path = folder / "open_clip_model.safetensors"
    save_file(load_file(path), path)


@pytest.mark.parametrize("cfg", [{"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}, {"resize_mode": "longest", "fill_color": 127},
                                 {"interpolation": "bilinear"}])
def test_every_resize_mode_is_open_clips(get, tmp_path, cfg):
    backbone = get("tok")
    backbone.save(tmp_path)
    bare(tmp_path)
    record = json.loads((tmp_path / "open_clip_config.json").read_text())
    record["preprocess_cfg"].update(cfg)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    ours = load_backbone(str(tmp_path))
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    picture = Image.effect_noise((57, 33), 80).convert("RGB")
    with torch.no_grad():
        assert torch.equal(ours.encode_image(ours.pixels(picture)[None]), theirs.eval().encode_image(transform(picture)[None]))
    ours.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "open_clip_config.json").read_text())["preprocess_cfg"] == json.loads(json.dumps(ours.config["preprocess_cfg"]))


# ---- target pad

def noise(width, height): return Image.effect_noise((width, height), 80).convert("RGB")


@pytest.mark.parametrize("size, padded", [
    ((100, 200), (160, 200)), ((200, 100), (200, 160)),     # 200 / 1.25 = 160: 30 on either side
    ((10, 100), (80, 100)), ((3, 8), (5, 8)),               # 80: 35 each; 6.4: (6.4 - 3) / 2 = 1.7, cut to 1 each
    ((1, 1000), (799, 1000)), ((1000, 1), (1000, 799)),     # 800: 399.5, cut to 399 each
    ((100, 125), (100, 125)), ((100, 126), (100, 126)),     # 5 : 4 exactly needs nothing; 100.8: 0.4, cut to nothing
    ((100, 128), (102, 128)),                               # 102.4: 1.2, cut to 1
    ((100, 124), (100, 124)), ((70, 70), (70, 70)), ((1, 1), (1, 1)), ((1, 2), (1, 2)),   # 1.6: 0.3, cut to nothing
])
def test_target_pad_by_hand(size, padded):
    white = Image.new("RGB", size, "white")
    result = TargetPad()(white)
    assert result.size == padded and result.mode == "RGB"
    across, down = (padded[0] - size[0]) // 2, (padded[1] - size[1]) // 2
    assert result.crop((across, down, across + size[0], down + size[1])).tobytes() == white.tobytes()             # in the middle,
    assert result.getbbox() == (across, down, across + size[0], down + size[1])                                   # on black


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(1, 300))
def test_target_pad_only_ever_adds_to_the_shorter_side(width, height):
    wide, high = TargetPad()(Image.new("RGB", (width, height))).size
    assert max(wide, high) == max(width, height) and (wide == width or high == height) and (wide - width) % 2 == (high - height) % 2 == 0
    assert min(wide, high) > max(width, height) / 1.25 - 2                                                         # two halves, each cut to whole pixels


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_the_padding_is_black_in_every_mode(mode):
    result = TargetPad()(Image.new("RGB", (10, 100), "white").convert("L").convert(mode))
    assert result.mode == "RGB" and result.size == (80, 100)
    assert result.getpixel((0, 50)) == result.getpixel((79, 50)) == (0, 0, 0) and result.getpixel((40, 50)) == (255, 255, 255)


def clip4cir(picture, size):
    "Step by step, in pixels: pad, bicubic to the shorter side, middle square."
    width, height = picture.size
    if max(width, height) / min(width, height) >= 1.25:
        wanted = max(width, height) / 1.25
        across, down = max(int((wanted - width) / 2), 0), max(int((wanted - height) / 2), 0)
        black = Image.new("RGB", (width + 2 * across, height + 2 * down))
        black.paste(picture, (across, down))
        picture = black
    return F.pil_to_tensor(F.center_crop(F.resize(picture, size, InterpolationMode.BICUBIC), size))


OWN_WAYS = [{}, {"resize_mode": "squash"}, {"resize_mode": "longest", "fill_color": 127}, {"interpolation": "bilinear"}]


@pytest.mark.parametrize("own", OWN_WAYS)
@pytest.mark.parametrize("size", [(64, 64), (100, 124), (100, 200), (331, 90), (57, 33), (1, 50), (40, 39)])
def test_target_pad_is_the_same_for_every_model(own, size):
    picture = noise(*size)
    pixels = pixel_transform(PREPROCESS["target-pad"](PreprocessCfg(size=48, **own)))(picture)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, clip4cir(picture, 48))


@pytest.mark.parametrize("size", [(64, 64), (100, 124), (124, 100), (48, 48), (1, 1)])
def test_what_is_nearly_square_is_what_the_usual_transform_makes(size):
    picture, settings = noise(*size), PreprocessCfg(size=48)
    ours, usual = (PREPROCESS[name](settings)(picture) for name in ("target-pad", "model"))
    assert torch.equal(ours, usual)                                                                               # normalised, too


@pytest.mark.parametrize("name", ["tok", "wide", "resnet", "timm-map"])
def test_a_backbone_with_target_pad(get, tmp_path, name):
    usual = get(name)
    usual.save(tmp_path)
    padding = load_backbone(str(tmp_path), preprocess="target-pad")
    assert (usual.preprocess, padding.preprocess) == ("model", "target-pad")
    for size in ((60, 140), (140, 60), (1, 1000), (1000, 1)):
        pixels = padding.pixels(noise(*size))
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, *padding.size)
        with torch.no_grad(): assert torch.equal(padding.encode_image(pixels[None]), usual.encode_image(pixels[None]))   # mean and deviation are the model's
    padding.save(tmp_path / "again")
    assert (tmp_path / "again" / "open_clip_config.json").read_bytes() == (tmp_path / "open_clip_config.json").read_bytes()
    assert load_backbone(str(tmp_path / "again")).preprocess == "model"


def test_a_model_that_is_not_square_keeps_its_shape_under_target_pad(get, tmp_path):
    "32 by 48 pixels: white padded to 160 by 200 is made 48 wide, and 32 rows from its middle stay; 30 of 160 columns on either side are black."
    get("wide").save(tmp_path)
    padding = load_backbone(str(tmp_path), preprocess="target-pad")
    row = padding.pixels(Image.new("RGB", (100, 200), "white"))[0, 16].tolist()
    assert padding.size == (32, 48) and row[:7] == [0] * 7 and row[11:37] == [255] * 26 and row[41:] == [0] * 7


@pytest.mark.parametrize("name", ["targetpad", "", "Model", None])
def test_an_unknown_preprocessing_lists_the_known(name):
    with pytest.raises(PliError, match="unknown preprocessing .*; known are model, target-pad"): load_backbone("pli-tiny-48", preprocess=name)


class Tall(Dataset):
    def __init__(self, pixels): self.pixels = pixels
    def __len__(self): return 4
    def __getitem__(self, i): return self.pixels(Image.new("RGB", (20, 40 + i), "white"))


def test_both_travel_to_worker_processes(get):
    for name in PREPROCESS:
        pixels = load_backbone("plitest-tok", preprocess=name).pixels
        assert repr(pickle.loads(pickle.dumps(pixels))) == repr(pixels) and ("TargetPad(ratio=1.25)" in repr(pixels)) == (name == "target-pad")
    here = torch.stack([Tall(pixels)[i] for i in range(4)])
    assert torch.equal(next(iter(DataLoader(Tall(pixels), 4, num_workers=1, multiprocessing_context="spawn"))), here)


# ---- something hidden

@pytest.mark.parametrize("name", EVERY)
def test_what_is_hidden_cannot_matter(get, name):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone) / 255, chance_mask(backbone)
    over = over_pixels(backbone, hidden)
    with torch.no_grad():
        masked, whole = backbone.encode_image(pixels, hidden), backbone.encode_image(pixels)
        for other in (chance_pixels(backbone, seed=5) / 255, torch.zeros_like(pixels), torch.full_like(pixels, 1e6), torch.full_like(pixels, float("nan"))):
            assert torch.equal(backbone.encode_image(torch.where(over, other, pixels), hidden), masked)
        seen = torch.where(over, pixels, chance_pixels(backbone, seed=5) / 255)
        assert not torch.allclose(backbone.encode_image(seen, hidden), masked, atol=1e-4)       # what is visible does matter
        assert not torch.allclose(masked, whole, atol=1e-4)
        assert torch.equal(backbone.encode_image(pixels), whole)                                # and nothing is left behind


@pytest.mark.parametrize("name", EVERY)
def test_every_row_has_its_own_mask(get, name):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone), chance_mask(backbone)
    with torch.no_grad():
        together = backbone.encode_image(pixels, hidden)
        for i in range(3): assert torch.allclose(backbone.encode_image(pixels[i:i + 1], hidden[i:i + 1])[0], together[i], atol=1e-5)
        same = backbone.encode_image(pixels[:1].expand(3, -1, -1, -1), hidden)
        assert not torch.allclose(same[0], same[1], atol=1e-4)


def blocks_of(backbone):
    visual = backbone.model.visual
    return visual.transformer.resblocks if hasattr(visual, "transformer") else visual.trunk.blocks


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("gone", [1, 9, 15])
def test_the_hidden_are_absent_from_the_first_layer_on(get, name, gone):
    backbone, lengths = get(name), []
    hidden = torch.arange(backbone.patches).expand(2, -1) < gone
    prefix = backbone.gate.prefix
    handles = [block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1])) for block in blocks_of(backbone)]
    try:
        with torch.no_grad(): backbone.encode_image(chance_pixels(backbone, 2), hidden)
    finally:
        for handle in handles: handle.remove()
    assert lengths == [prefix + backbone.patches - gone] * len(blocks_of(backbone))


def by_hand_open_clip(visual, inputs, kept):
    "One picture: patches cut out with a loop and multiplied, positions added, the visible ones put behind the class token, layer by layer."
    size, (rows, columns) = visual.patch_size[0], visual.grid_size
    kernel, tokens = visual.conv1.weight.flatten(1), [visual.class_embedding + visual.positional_embedding[0]]
    for place in kept:
        y, x = divmod(place, columns)
        patch = inputs[:, y * size:(y + 1) * size, x * size:(x + 1) * size].flatten()
        tokens.append(kernel @ patch + visual.positional_embedding[1 + place])
    x = visual.ln_pre(torch.stack(tokens)[None])
    for block in visual.transformer.resblocks: x = block(x)
    if visual.attn_pool is None:
        if visual.final_ln_after_pool: pool = visual.ln_post(x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(1))
        else:
            x = visual.ln_post(x)
            pool = x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(1)
    elif visual.attn_pool_contrastive is None:
        x = visual.ln_post(visual.attn_pool(x))
        pool = x[:, 0] if visual.pool_type == "tok" else x[:, 1:].mean(1)
    else:
        x = visual.ln_post(x)
        pool = visual.attn_pool_contrastive(x if visual.attn_pool_type == "parallel" else visual.attn_pool(x))
    return (pool @ visual.proj).flatten()


def by_hand_timm(visual, inputs, kept):
    "One picture: all tokens as timm makes them, the visible ones picked, layer by layer with their own rotations."
    trunk, rope = visual.trunk, None
    prefix = [part[0] for part in (trunk.cls_token, trunk.reg_token) if part is not None]
    patches = trunk.patch_embed(inputs[None]).flatten(1, -2)[0]
    table = trunk.pos_embed[0] if trunk.pos_embed is not None else torch.zeros(len(patches), patches.shape[1])
    before = torch.cat(prefix) if prefix else patches[:0]
    if trunk.no_embed_class: patches = patches + table
    else: before, patches = before + table[:len(before)], patches + table[len(before):]
    x = trunk.norm_pre(torch.cat([before, patches[kept]])[None])
    if getattr(trunk, "rope", None) is not None: rope = trunk.rope.get_embed()
    for i, block in enumerate(trunk.blocks):
        if rope is None: x = block(x)
        else: x = block(x, rope=rope[i][:, kept] if trunk.rope_mixed else rope[kept])
    x = trunk.norm(x)
    if trunk.attn_pool is not None: pool = trunk.attn_pool(x)
    elif trunk.global_pool == "token": pool = x[:, 0]
    else: pool = x[:, len(before):].mean(1)
    return visual.head(trunk.head(trunk.fc_norm(pool))).flatten()


@pytest.mark.parametrize("name", GATED)
def test_masked_features_by_hand(get, name):
    backbone = get(name)
    visual, pixels, hidden = backbone.model.visual, chance_pixels(backbone), chance_mask(backbone)
    slow = by_hand_timm if name.startswith("timm") else by_hand_open_clip
    with torch.no_grad():
        fast, inputs = backbone.encode_image(pixels, hidden), (pixels / 255 - backbone.mean) / backbone.std
        for i in range(3):
            kept = [place for place in range(backbone.patches) if not hidden[i, place]]
            assert torch.allclose(slow(visual, inputs[i], kept), fast[i], atol=1e-4, rtol=1e-4)
            everything = list(range(backbone.patches))
            assert torch.allclose(slow(visual, inputs[i], everything), backbone.encode_image(pixels[i:i + 1])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(PAINTED))
def test_towers_without_tokens_hide_pixels(get, name):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone), chance_mask(backbone)
    painted = torch.where(over_pixels(backbone, hidden), backbone.mean, pixels / 255)
    with torch.no_grad(): assert torch.allclose(backbone.encode_image(pixels, hidden), backbone.encode_image(painted), atol=1e-5)
    assert backbone.gate is None and backbone.grid == (backbone.size[0] // 32, backbone.size[1] // 32)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_flows_only_through_what_is_visible(get, name):
    backbone = get(name)
    pixels, hidden = (chance_pixels(backbone) / 255).requires_grad_(), chance_mask(backbone)
    backbone.encode_image(pixels, hidden).square().sum().backward()
    over = over_pixels(backbone, hidden).expand_as(pixels)
    assert (pixels.grad[over] == 0).all() and pixels.grad[~over].abs().mean() > 0
    backbone.zero_grad(set_to_none=True)


def test_positions_that_nobody_sees_learn_nothing(get):
    backbone = get("tok")
    hidden = torch.arange(16).expand(3, -1) >= 5
    backbone.encode_image(chance_pixels(backbone), hidden).square().sum().backward()
    grown = backbone.model.visual.positional_embedding.grad.abs().sum(1) > 0
    assert grown.tolist() == [True] * 6 + [False] * 11
    backbone.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["tok", "timm-map"])
def test_checkpointed_gradients_are_the_same(get, name):
    grads = []
    for thrifty in (False, True):
        backbone = copy.deepcopy(get(name))
        backbone.model.set_grad_checkpointing(thrifty)
        backbone.encode_image(chance_pixels(backbone), chance_mask(backbone)).square().sum().backward()
        grads.append([weight.grad for weight in backbone.model.visual.parameters() if weight.grad is not None])
    for one, other in zip(*grads): assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", ["dropout", "timm-dropping", "timm-eva-map"])
def test_the_towers_own_dropout_stays_in_place(get, name):
    backbone = copy.deepcopy(get(name))
    pixels = chance_pixels(backbone)
    with torch.no_grad():
        assert torch.equal(backbone.encode_image(pixels), backbone.encode_image(pixels))       # not while evaluating
        backbone.train()
        assert not torch.equal(backbone.encode_image(pixels), backbone.encode_image(pixels))   # and as before while training
        hidden = chance_mask(backbone)
        assert torch.equal(backbone.encode_image(pixels, hidden), backbone.encode_image(pixels, hidden))   # a mask takes its place


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 5), prefix=st.integers(0, 4), patches=st.integers(1, 30), seed=st.integers(0, 10**6), indices=st.booleans(), data=st.data())
def test_gate_keeps_the_visible_in_order(batch, prefix, patches, seed, indices, data):
    gone = data.draw(st.integers(0, patches - 1))
    chance = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, prefix + patches, 2, generator=chance)
    gate = PatchGate(None, prefix, indices)
    for hidden in (None, torch.rand(batch, patches, generator=chance).argsort(1).argsort(1) < gone):
        gate.hidden = hidden
        seen, kept = gate(tokens) if indices else (gate(tokens), None)
        for i in range(batch):
            left = [j for j in range(patches) if hidden is None or not hidden[i, j]]
            assert torch.equal(seen[i], torch.cat([tokens[i, :prefix], tokens[i, prefix:][left]]))
            if indices and hidden is not None: assert kept[i].tolist() == left


# ---- masks that do not fit

def wrong_masks(n):
    second = torch.zeros(2, n, dtype=torch.bool); second[1] = True
    return {
        "second": (second, "every patch of row 1: nothing is left"), "narrow": (torch.zeros(2, n - 1, dtype=torch.bool), "2 pictures of"), "wide": (torch.zeros(2, n + 1, dtype=torch.bool), "2 pictures of"),
        "short": (torch.zeros(1, n, dtype=torch.bool), "2 pictures of"), "flat": (torch.zeros(n, dtype=torch.bool), "2 pictures of"),
        "square": (torch.zeros(2, 1, n, dtype=torch.bool), "2 pictures of"), "float": (torch.zeros(2, n), "bool"), "bytes": (torch.zeros(2, n, dtype=torch.uint8), "bool"),
        "all": (torch.ones(2, n, dtype=torch.bool), "every patch of row 0: nothing is left"),
    }


@pytest.mark.parametrize("name", ["tok", "timm-map", "resnet"])
@pytest.mark.parametrize("fault", list(wrong_masks(4)))
def test_masks_that_do_not_fit(get, name, fault):
    backbone = get(name)
    mask, words = wrong_masks(backbone.patches)[fault]
    with pytest.raises(PliError, match=words): backbone.encode_image(chance_pixels(backbone, 2), mask)
    if backbone.gate is not None: assert backbone.gate.hidden is None


# ---- rows that hide different numbers of patches

def ragged_mask(backbone, counts, seed=0):
    rank = torch.rand(len(counts), backbone.patches, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return rank < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("name", EVERY)
def test_rows_may_hide_different_numbers(get, name):
    "Every row gets the feature that it has alone, in its place; rows with nothing hidden, two of a kind and out of order among them."
    backbone = get(name)
    n = backbone.patches
    pixels, hidden = chance_pixels(backbone, 6), ragged_mask(backbone, [n - 1, 0, n // 2, n - 1, 1, 0])
    with torch.no_grad():
        together = backbone.encode_image(pixels, hidden)
        alone = torch.cat([backbone.encode_image(pixels[i:i + 1], hidden[i:i + 1]) for i in range(6)])
        assert torch.allclose(together, alone, atol=1e-5, rtol=1e-4)
        assert torch.allclose(together[[1, 5]], backbone.encode_image(pixels[[1, 5]]), atol=1e-5, rtol=1e-4)
        order = torch.tensor([3, 1, 0, 5, 4, 2])
        assert torch.allclose(backbone.encode_image(pixels[order], hidden[order]), together[order], atol=1e-5, rtol=1e-4)
    if backbone.gate is not None: assert backbone.gate.hidden is None


def test_gradients_pass_through_groups(get):
    backbone = get("tok")
    pixels, hidden = (chance_pixels(backbone, 4) / 255).requires_grad_(), ragged_mask(backbone, [2, 0, 2, 3])
    target = torch.rand(4, backbone.encode_image(pixels, hidden).shape[1], generator=torch.Generator().manual_seed(1))
    together, = torch.autograd.grad((backbone.encode_image(pixels, hidden) * target).sum(), pixels)
    alone, = torch.autograd.grad(sum((backbone.encode_image(pixels[i:i + 1], hidden[i:i + 1]) * target[i]).sum() for i in range(4)), pixels)
    assert torch.allclose(together, alone, atol=1e-6) and together.flatten(1).any(1).all()


def test_groups_cost_what_their_rows_cost():
    "A mixture of whole and masked rows does not pay for whole ones everywhere."
    with pytest.warns(UserWarning, match="ViT-B-16: no weights are named, so they are random, and answers mean nothing; name them with --pretrained"): base = load_backbone("ViT-B-16")
    masks = {"whole": [0], "masked": [147]}
    cost = {name: flops(base, ragged_mask(base, counts)) for name, counts in masks.items()}
    with FlopCounterMode(display=False) as counter: base.encode_image(torch.zeros(2, 3, *base.size), ragged_mask(base, [0, 147]))
    assert counter.get_total_flops() == sum(cost.values())


@pytest.mark.parametrize("name", ["tok", "timm-registers", "resnet"])
def test_pictures_of_another_size_are_refused(get, name):
    backbone = get(name)
    height, width = backbone.size
    for shape in ((2, 3, 2 * height, width), (2, 3, height, width - 1), (2, 4, height, width), (3, height, width), (0, 3, 0, 0)):
        for mask in (None, chance_mask(backbone, 2)):
            with pytest.raises(PliError, match=f"pixels of shape .batch, 3, {height}, {width}."): backbone.encode_image(torch.zeros(shape), mask)


@pytest.mark.parametrize("name", ["coca", "timm-eva02", "timm-vit"])
def test_the_gate_opens_again_after_an_accident(get, name):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone), chance_mask(backbone)
    with torch.no_grad(): whole, masked = backbone.encode_image(pixels), backbone.encode_image(pixels, hidden)
    def trip(module, inputs): raise KeyboardInterrupt
    handle = blocks_of(backbone)[1].register_forward_pre_hook(trip)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(): backbone.encode_image(pixels, hidden)
    handle.remove()
    assert backbone.gate.hidden is None
    with torch.no_grad(): assert torch.equal(backbone.encode_image(pixels), whole) and torch.equal(backbone.encode_image(pixels, hidden), masked)


def test_masks_come_from_any_place(get):
    "Half precision, and pictures that are not contiguous."
    backbone = get("tok")
    pixels, hidden = chance_pixels(backbone), chance_mask(backbone)
    with torch.no_grad():
        single = backbone.encode_image(pixels, hidden)
        sideways = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.allclose(backbone.encode_image(sideways, hidden), single, atol=1e-5)
        half = copy.deepcopy(backbone).to(torch.bfloat16)
        assert torch.nn.functional.cosine_similarity(half.encode_image(pixels, hidden).float(), single).min() > 0.99
        with torch.autocast("cpu", torch.bfloat16): blurry = backbone.encode_image(pixels, hidden)
        assert torch.nn.functional.cosine_similarity(blurry.float(), single).min() > 0.99


# ---- cost

def flops(backbone, hidden):
    with FlopCounterMode(display=False) as counter: backbone.encode_image(torch.zeros(1, 3, *backbone.size), hidden)
    return counter.get_total_flops()


def test_three_quarters_hidden_cost_well_under_half():
    base = load_backbone("ViT-B-16")
    hidden = torch.arange(196)[None] < 147
    whole, masked = flops(base, torch.zeros_like(hidden)), flops(base, hidden)
    assert whole > 3e10                       # 17.6 billion multiplications and additions each
    assert masked < 0.28 * whole


# ---- one patch embedding for a picture that is encoded whole and masked

EMBEDDED = [name for name in GATED if "drop" not in name and name != "timm-eva-map"]        # the others drop patches by chance


@contextlib.contextmanager
def counted_embeddings(backbone):
    "A list that grows with each embedding of patches that is computed; afterwards all is as it was."
    visual = backbone.model.visual
    module, made = visual.conv1 if hasattr(visual, "conv1") else visual.trunk.patch_embed, []
    convolution = module if isinstance(module, torch.nn.Conv2d) else module.proj
    once = convolution._conv_forward
    convolution._conv_forward = lambda *given: made.append(1) or once(*given)
    try: yield made
    finally: del convolution._conv_forward
    assert "forward" not in vars(module)


def whole_and_masked(backbone, pixels, hidden, together, shortcuts):
    "Features of both, gradients of their sum of products, and how often patches were embedded."
    backbone.requires_grad_(True).zero_grad(set_to_none=True)
    with counted_embeddings(backbone) as made, backbone.shortcuts() if shortcuts else contextlib.nullcontext():
        whole, masked = backbone.encode_both(pixels, hidden) if together else (backbone.encode_image(pixels), backbone.encode_image(pixels, hidden))
        (whole * masked.roll(1, 0)).sum().backward()
    return whole.detach(), masked.detach(), {key: weight.grad for key, weight in backbone.named_parameters() if weight.grad is not None}, len(made)


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("name", EMBEDDED)
def test_whole_and_masked_pictures_share_one_patch_embedding(get, name, shortcuts):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone, 4) / 255, (torch.arange(backbone.patches) % 3 > 0).expand(4, -1)
    *apart, grads, twice = whole_and_masked(backbone, pixels, hidden, False, shortcuts)
    *shared, found, once = whole_and_masked(backbone, pixels, hidden, True, shortcuts)
    assert (twice, once) == (2, 1)
    for one, other in zip(shared, apart): assert torch.equal(one, other)
    assert found.keys() == grads.keys() and any(value.abs().max() > 0 for value in grads.values())
    for key in grads: torch.testing.assert_close(found[key], grads[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", PAINTED)
@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_towers_without_patch_tokens_encode_both_as_they_encode_each(get, name, ratio):
    backbone = get(name)
    pixels, hidden = chance_pixels(backbone) / 255, chance_mask(backbone, ratio=ratio) if ratio else None
    with torch.no_grad():
        for one, other in zip(backbone.encode_both(pixels, hidden), (backbone.encode_image(pixels), backbone.encode_image(pixels, hidden))): assert torch.equal(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("name", ["tok", "timm-vit", "timm-map"])
def test_both_are_those_of_two_calls_in_every_mode(get, name, mode):
    backbone = get(name)
    pixels = chance_pixels(backbone, 4)                                                      # bytes, too, and rows that hide different numbers
    for hidden in (None, chance_mask(backbone, 4), torch.arange(backbone.patches) < torch.tensor([[3], [3], [5], [1]])):
        with mode():
            for one, other in zip(backbone.encode_both(pixels, hidden), (backbone.encode_image(pixels), backbone.encode_image(pixels, hidden))): assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["tok", "timm-vit"])
def test_nothing_is_remembered_from_one_call_to_the_next(get, name):
    "Weights and pixels that change in ways which torch does not count, and a hook that changes what it is shown."
    backbone = copy.deepcopy(get(name)).requires_grad_(True)
    visual = backbone.model.visual
    module = visual.conv1 if name == "tok" else visual.trunk.patch_embed
    pixels, hidden = chance_pixels(backbone, 4) / 255, (torch.arange(backbone.patches) % 3 > 0).expand(4, -1)

    def check():
        with torch.no_grad(): apart = backbone.encode_image(pixels), backbone.encode_image(pixels, hidden)
        with torch.no_grad(), backbone.shortcuts(): both = backbone.encode_both(pixels, hidden)
        for one, other in zip(both, apart): torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        return apart[0]

    before = check()
    next(module.parameters()).data.mul_(1.5)
    pixels.numpy()[:] *= 0.5
    assert not torch.allclose(check(), before)
    hook = module.register_forward_hook(lambda module, given, made: made.mul_(0.9))
    check()
    hook.remove()
    own = module.forward
    module.forward = lambda given: 0.5 * own(given)                                         # somebody's own, which stays
    check()
    assert "forward" in vars(module)
    del module.forward
    for _ in range(2): sum(part.sum() for part in backbone.encode_both(pixels, hidden)).backward()
    other = copy.deepcopy(backbone)
    assert torch.equal(other.encode_image(pixels), backbone.encode_image(pixels))


@pytest.mark.parametrize("name", ["tok", "timm-vit"])
def test_what_was_embedded_is_let_go(get, name):
    backbone = get(name)
    pixels = chance_pixels(backbone, 2) / 255
    backbone.requires_grad_(True)
    gone = []
    module = backbone.model.visual.conv1 if name == "tok" else backbone.model.visual.trunk.patch_embed
    hook = module.register_forward_hook(lambda module, given, made: gone.extend([weakref.ref(made), weakref.ref(given[0])]))
    gc.disable()                                             # at once, not when somebody looks for cycles
    try:
        both = backbone.encode_both(pixels, None)
        del both
        assert len(gone) == 4 and not any(each() is not None for each in gone)
    finally:
        gc.enable()
        hook.remove()


# ---- timm models that open_clip does not name

@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
def test_gate_fits_timms_own(name):
    class Tower(torch.nn.Module):
        def __init__(self, trunk): super().__init__(); self.trunk = trunk
    trunk = timm.create_model(name, num_classes=0).eval()
    keys = list(trunk.state_dict())
    gate = find_gate(Tower(trunk))
    assert gate.prefix == trunk.num_prefix_tokens and list(trunk.state_dict()) == keys
    pixels, hidden = torch.rand(2, 3, 160, 160), torch.rand(2, 100).argsort(1).argsort(1) < 70
    with torch.no_grad():
        gate.hidden = hidden
        masked = trunk(pixels)
        over = hidden.reshape(2, 1, 10, 10).repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert torch.equal(trunk(pixels.masked_fill(over, 3.0)), masked)


# ---- weights

@pytest.mark.parametrize("name", EVERY)
def test_saved_weights_are_open_clips(get, tmp_path, name):
    backbone = get(name)
    backbone.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    theirs, again = open_clip.create_model(f"local-dir:{tmp_path}").eval(), load_backbone(str(tmp_path))
    pixels = chance_pixels(backbone)
    with torch.no_grad():
        wanted = backbone.encode_image(pixels)
        assert torch.equal(theirs.encode_image((pixels / 255 - backbone.mean) / backbone.std, normalize=False).flatten(1), wanted)
        assert torch.equal(again.encode_image(pixels), wanted)
        assert torch.equal(again.encode_image(pixels, chance_mask(backbone)), backbone.encode_image(pixels, chance_mask(backbone)))
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a blue coat"])
        assert torch.equal(theirs.encode_text(tokens, normalize=False), backbone.encode_text(["a blue coat"]))
        assert torch.equal(again.encode_text(["a blue coat"]), backbone.encode_text(["a blue coat"]))
    assert type(theirs) is type(again.model) is type(backbone.model)
    again.save(tmp_path / "twice")
    for file in ("open_clip_config.json", "open_clip_model.safetensors"): assert (tmp_path / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_a_checkpoint_file_on_a_named_model(get, tmp_path):
    backbone = get("tok")
    torch.save({"state_dict": {f"module.{key}": value for key, value in backbone.model.state_dict().items()}}, tmp_path / "epoch_1.pt")
    save_file(backbone.model.state_dict(), tmp_path / "weights.safetensors")
    for file in ("epoch_1.pt", "weights.safetensors"):
        again = load_backbone("plitest-tok", str(tmp_path / file), seed=99)
        for key, value in backbone.model.state_dict().items(): assert torch.equal(again.model.state_dict()[key], value)


class Bomb:
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"state_dict": {"visual.proj": bomb}}, lambda bomb: {"visual.proj": torch.zeros(1), "epoch": bomb}])
@pytest.mark.parametrize("way", ["zip", "legacy", "raw", "folder"])
def test_a_pickle_bomb_is_refused_and_not_executed(get, tmp_path, wrap, way):
    mark, name, file = tmp_path / "boom", "plitest-tok", tmp_path / "weights.pt"
    if way == "folder":
        get("tok").save(tmp_path / "model")
        (tmp_path / "model" / "open_clip_model.safetensors").unlink()
        name, file = str(tmp_path / "model"), tmp_path / "model" / "open_clip_pytorch_model.bin"
    if way == "raw": file.write_bytes(pickle.dumps(wrap(Bomb(mark)), protocol=2))
    else: torch.save(wrap(Bomb(mark)), file, _use_new_zipfile_serialization=way != "legacy")
    with pytest.raises(PliError, match="(posix.mkdir|_load_from_bytes), which is no part of weights.*is not read|a pickle that cannot be read without running it") as caught: load_backbone(name, None if way == "folder" else str(file))
    assert str(file) in str(caught.value) and name in str(caught.value) and not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()                                                                       # it was a live one


@pytest.mark.parametrize("damage", ["truncated", "head", "empty", "text", "zeros"])
def test_damaged_weights_are_named(get, tmp_path, damage):
    get("tok").save(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:len(whole) // 2], "head": whole[:4], "empty": b"", "text": b"not found" * 30, "zeros": bytes(1000)}[damage])
    words = {"truncated": "not whole", "head": "it is", "empty": "it is empty", "text": "it is text.*begins with 'not foundnot", "zeros": "neither safetensors nor"}[damage]
    with pytest.raises(PliError, match=words) as caught: load_backbone(str(tmp_path))
    assert str(file) in str(caught.value)
    with pytest.raises(PliError, match=f"plitest-tok.*cannot be loaded.*{words}"): load_backbone("plitest-tok", str(file))


def test_weights_of_another_model_are_refused(get, tmp_path):
    get("avg").save(tmp_path)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.proj"] = torch.zeros(7, 7)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(PliError, match=r"plitest-avg.*visual\.proj"): load_backbone("plitest-avg", str(tmp_path / "wrong.safetensors"))
    del weights["visual.proj"]
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(PliError, match=r"plitest-avg.*visual\.proj"): load_backbone("plitest-avg", str(tmp_path / "wrong.safetensors"))


def test_a_folder_without_weights_is_not_a_random_model(get, tmp_path):
    get("tok").save(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(PliError, match="weights") as caught: load_backbone(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_the_folder_of_a_run_names_its_models(get, tmp_path):
    for name in ("step-000400", "best", "last"): get("tok").save(tmp_path / "run" / name)
    with pytest.raises(PliError) as caught: load_backbone(str(tmp_path / "run"))
    assert f"is the folder of a run; name one of its models: {tmp_path / 'run' / 'best'}, {tmp_path / 'run' / 'last'}, " in str(caught.value)


def test_a_folder_and_other_weights_contradict(get, tmp_path):
    get("tok").save(tmp_path)
    with pytest.raises(PliError, match="own weights"): load_backbone(str(tmp_path), str(tmp_path / "open_clip_model.safetensors"))


@pytest.mark.parametrize("text, words", [(None, "no such file"), ("{", "not valid JSON"), ("[]", "model_cfg"), ("{}", "model_cfg"), ('{"model_cfg": {}}', "text_cfg|embed_dim|vision_cfg"),
                                         ('{"model_cfg": {"embed_dim": 24, "vision_cfg": {}}}', "text_cfg"), ('{"model_cfg": {"embed_dim": 24, "vision_cfg": {"colour": 1}, "text_cfg": {}}}', "colour")])
def test_a_broken_config_is_named(get, tmp_path, text, words):
    get("tok").save(tmp_path)
    bare(tmp_path)
    file = tmp_path / "open_clip_config.json"
    file.unlink()
    if text is not None: file.write_text(text)
    with pytest.raises(PliError, match=words) as caught: load_backbone(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name, words", [("ViT-B-33", "ViT-B-32"), ("no/such folder", "neither a folder"), ("", "open_clip_config.json"), ("local-dir:/no/such/folder", "/no/such/folder")])
def test_unknown_names(name, words):
    with pytest.raises(PliError, match=words): load_backbone(name)


def test_a_slash_in_a_name_is_a_dash_everywhere(configs, tmp_path):
    (tmp_path / "plitest-slash-name.json").write_text(json.dumps(plain()))
    open_clip.add_model_config(tmp_path)
    backbone = load_backbone("plitest-slash/name")
    with torch.no_grad(): assert backbone.encode_text(["a red shirt"]).shape == (1, 24)      # its tokenizer knows the model's context, 12


def test_a_tokenizer_from_the_hub_is_saved_even_if_it_was_never_used(get, tmp_path):
    "open_clip looks for its files in the folder and nowhere else."
    class Files:
        def save_pretrained(self, folder): (tmp_path / "tokenizer.json").write_text("{}")
    class FromTheHub: tokenizer = Files()
    backbone = copy.deepcopy(get("tok"))
    backbone.config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "somebody/something"
    backbone.tokenizer, backbone.make_tokenizer = None, FromTheHub
    backbone.save(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_unknown_tags(configs):
    with pytest.raises(PliError, match="plitest-tok.*a-tag"): load_backbone("plitest-tok", "a-tag")


def test_a_seed_decides_the_weights(configs):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (load_backbone("plitest-tok", seed=seed).model.visual.proj for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)                                          # the caller's numbers go on


# ---- the tag decides the activation

def test_the_openai_tag_has_its_own_activation():
    assert read_config("ViT-B-32", "openai")["model_cfg"]["quick_gelu"] is True
    assert read_config("ViT-L/14", "openai")["model_cfg"]["quick_gelu"] is True
    assert not read_config("ViT-B-32", "laion2b_s34b_b79k")["model_cfg"].get("quick_gelu")
    assert not read_config("ViT-B-32")["model_cfg"].get("quick_gelu")
    assert read_config("ViT-B-32-quickgelu")["model_cfg"]["quick_gelu"] is True
    assert not open_clip.get_model_config("ViT-B-32").get("quick_gelu")                        # open_clip's own record is not touched


def test_a_tag_with_quick_gelu_loads_and_saves_so(get, tmp_path, monkeypatch, recwarn):
    "A download that does not happen: the tag's file lies here already."
    save_file(get("tok").model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "plitest-tok", {"there": {"url": "", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.safetensors"))
    quick = load_backbone("plitest-tok", "there")
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]
    assert type(quick.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert quick.mean.flatten().tolist() == [0.5] * 3 and quick.std.flatten().tolist() == [0.25] * 3
    quick.save(tmp_path / "model")
    theirs, pixels = open_clip.create_model(f"local-dir:{tmp_path / 'model'}").eval(), chance_pixels(quick)
    with torch.no_grad():
        assert torch.equal(theirs.encode_image((pixels / 255 - 0.5) / 0.25), quick.encode_image(pixels))
        assert not torch.equal(get("tok").model.encode_image((pixels / 255 - 0.5) / 0.25), quick.encode_image(pixels))


def test_check_mask_and_save_are_functions_too(get, tmp_path):
    backbone = get("tok")
    check_mask(backbone, chance_pixels(backbone), chance_mask(backbone))
    save_backbone(backbone, tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er" / "open_clip_model.safetensors").exists()
    assert not [file for file in (tmp_path / "deep" / "er").iterdir() if file.name.endswith(".part")]


# --- bits that flip

def told(folder):
    with pytest.raises(PliError) as caught: load_backbone(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)

def test_a_flipped_bit_in_a_saved_model_is_told_wherever_it_is(tmp_path):
    backbone = load_backbone("pli-tiny-48")
    backbone.save(tmp_path / "m")
    path, good, random = tmp_path / "m" / "open_clip_model.safetensors", (tmp_path / "m" / "open_clip_model.safetensors").read_bytes(), torch.Generator().manual_seed(0)
    begin = 8 + int.from_bytes(good[:8], "little")
    for place in [begin, len(good) - 1, *torch.randint(begin, len(good), (6,), generator=random).tolist()]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1:])
        assert f"{path}: its weights are not what was written, some bits have changed; bring back a copy" in told(tmp_path / "m")
    with pytest.raises(PliError, match="its weights are not what was written"): load_backbone("pli-tiny-48", str(path))     # as --pretrained, too
    path.write_bytes(good)
    assert all(torch.equal(value, backbone.model.state_dict()[name]) for name, value in load_backbone(tmp_path / "m").model.state_dict().items())
    assert all(torch.equal(value, backbone.model.state_dict()[name]) for name, value in open_clip.create_model(f"local-dir:{tmp_path / 'm'}").state_dict().items())   # open_clip passes over the digest

def test_a_configuration_that_is_not_the_weights_own_is_told(tmp_path):
    load_backbone("pli-tiny-48").save(tmp_path / "m")
    path = tmp_path / "m" / "open_clip_config.json"
    good = json.loads(path.read_text())
    other = json.loads(path.read_text())
    other["preprocess_cfg"]["mean"][0] += 0.01
    path.write_text(json.dumps(other))
    assert "open_clip_config.json: is not what was saved with the weights beside it (preprocess_cfg.mean was [" in told(tmp_path / "m")
    path.write_text(json.dumps(good) + "\n\n")                              # said otherwise, the same
    load_backbone(tmp_path / "m")

def test_a_folder_of_other_programs_has_no_digest_and_loads(tmp_path):
    load_backbone("pli-tiny-48").save(tmp_path / "m")
    path = tmp_path / "m" / "open_clip_model.safetensors"
    save_file(load_file(path), path)
    load_backbone(tmp_path / "m")
