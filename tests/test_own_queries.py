"Queries of your own: files from strangers, read or refused by name, and the pictures they name."
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pli.benchmarks import Benchmark, read_gallery, read_queries
from pli.core import PliError, generator, unit
from pli.data import PictureError
from pli.evaluate import encode, query_validator, sweep
from pli.gallery import PictureFiles, encode_pictures, encode_texts

GALLERY = ["a.png", "b.png", "sub/c.png", "größe 日本.png"]
RECORD = {"reference_img_id": "a.png", "relative_caption": "in red", "target_img_id": "b.png", "gt_img_ids": ["b.png", "sub/c.png"], "kind": "colour"}


def picture(path: Path, colour=(200, 30, 30), kind="PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, kind)
    return path


def write(path: Path, what) -> Path:
    path.write_text(json.dumps(what), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(GALLERY): picture(tmp_path / name, (number, 0, 0))
    write(tmp_path / "gallery.json", GALLERY)
    write(tmp_path / "queries.json", [RECORD])
    return tmp_path


def read(folder: Path, *records) -> Benchmark:
    return read_queries(write(folder / "queries.json", list(records)), folder / "gallery.json")


class Fake:
    "A backbone made of two functions; counts what it is asked."
    device, grid = torch.device("cpu"), (2, 2)

    def __init__(self, image, text=None): self.image, self.text, self.pictures, self.texts = image, text, 0, []

    def pixels(self, picture): return pil_to_tensor(picture)

    def encode_image(self, pixels, hidden=None):
        self.pictures += len(pixels)
        return self.image(pixels)

    def encode_text(self, texts):
        self.texts += texts
        return torch.stack([self.text(text) for text in texts])


def blind(pixels): raise AssertionError("nothing may be encoded")


# --- reading: what is well-formed

def test_a_good_file(folder):
    queries = read(folder, RECORD, RECORD | {"reference_img_id": "größe 日本.png", "kind": "size"}, {k: v for k, v in RECORD.items() if k not in ("kind", "gt_img_ids")})
    assert queries.texts == (("in red",),) * 3 and queries.references.tolist() == [0, 3, 0] and queries.references.dtype == torch.int64
    assert queries.answers == ((1, 2), (1, 2), (1,)) and queries.kinds == ("colour", "size", "all")
    assert queries.galleries[0].tolist() == [0, 1, 2, 3] and queries.pictures == queries.files == tuple(GALLERY) and queries.root == folder
    assert queries.without_reference and queries.ids == ("0", "1", "2")


def test_a_gallery_of_lines(folder):
    (folder / "gallery.txt").write_bytes("\ufeffa.png\r\n\r\n  b.png \r\ngröße 日本.png\r\n".encode())
    assert read_gallery(folder / "gallery.txt", folder) == ["a.png", "b.png", "größe 日本.png"]
    (folder / "gallery.JSON").write_text('["a.png"]')
    assert read_gallery(folder / "gallery.JSON", folder) == ["a.png"]


def test_ids_that_are_numbers(tmp_path):
    for name in (10, 11, 12): picture(tmp_path / str(name), (name, 0, 0))
    gallery = write(tmp_path / "gallery.json", [10, 11])
    queries = read_queries(write(tmp_path / "queries.json", [{"reference_img_id": 12, "relative_caption": "more", "target_img_id": 11, "gt_img_ids": [11, "10"]}]), gallery)
    assert queries.pictures == ("10", "11", "12") and queries.answers == ((0, 1),)
    assert encode(Fake(lambda pixels: pixels.float().mean((2, 3)), lambda text: torch.ones(3)), queries).pictures.shape == (3, 3)


def test_one_name_a_picture(folder):
    write(folder / "gallery.json", ["./a.png", "sub/../b.png", "sub//c.png"])
    queries = read(folder, RECORD | {"reference_img_id": str(folder / "a.png")})
    assert queries.pictures == ("a.png", "b.png", "sub/c.png") and queries.references.tolist() == [0]


def test_a_relative_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for gallery, root in (("gallery.json", None), (f"../{folder.name}/gallery.json", None), ("gallery.json", "."), ("gallery.json", f"../{folder.name}")):
        queries = read_queries("queries.json", gallery, root)
        assert queries.pictures == tuple(GALLERY)
        PictureFiles(queries.pictures, queries.root, pil_to_tensor)


def test_a_root_elsewhere(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    write(lists / "gallery.json", GALLERY)
    assert read_queries(folder / "queries.json", lists / "gallery.json", folder).root == folder
    assert len(PictureFiles(GALLERY, folder, pil_to_tensor)) == 4


def test_links_that_stay(folder):
    (folder / "link.png").symlink_to("a.png")
    write(folder / "gallery.json", GALLERY + ["link.png"])
    assert len(read(folder, RECORD).galleries[0]) == 5


def test_a_reference_outside_the_gallery_is_encoded_and_not_searched(folder):
    picture(folder / "other.png", (9, 0, 0))
    queries = read(folder, RECORD, RECORD | {"reference_img_id": "other.png"}, RECORD | {"reference_img_id": "other.png"})
    assert len(queries.galleries[0]) == 4 and queries.pictures == (*GALLERY, "other.png")
    assert queries.references.tolist() == [0, 4, 4]
    fake = Fake(lambda pixels: torch.nn.functional.one_hot(pixels[:, 0, 0, 0].long(), 12).float(), lambda text: torch.ones(12))
    features = encode(fake, queries)
    assert fake.pictures == 5 and fake.texts == ["in red"]                  # each once
    table = sweep(features, queries, ["image"])
    assert table["image"].rank.tolist() == [2, 3, 3]                             # ties count against: 2 strangers (of 3 without the reference, 4 with none left out), 2 answers


# --- reading: what is spoiled

@pytest.mark.parametrize("change, says", [
    ({"reference_img_id": ...}, "has no field 'reference_img_id'; it has relative_caption, target_img_id"),
    ({"relative_caption": ...}, "has no field 'relative_caption'"),
    ({"gt_img_ids": ..., "target_img_id": ...}, "names no right answer in 'gt_img_ids' or 'target_img_id'"),
    ({"gt_img_ids": []}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": None}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": "b.png"}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": ["b.png", None]}, "names no right answer in 'gt_img_ids'"),
    ({"gt_img_ids": ["b.png", 1.5]}, "right answer is not the name of a picture: 1.5"),
    ({"gt_img_ids": [["b.png"]]}, "right answer is not the name of a picture: ['b.png']"),
    ({"gt_img_ids": ["b.png", "z.png"]}, "the right answer 'z.png' is not in"),
    ({"gt_img_ids": ["a.png", "b.png"]}, "the reference 'a.png' is listed as a right answer"),
    ({"gt_img_ids": ["./a.png"]}, "the reference 'a.png' is listed as a right answer"),
    ({"gt_img_ids": ["../b.png"]}, "right answer: ../b.png leads out of the folder"),
    ({"relative_caption": 7}, "field 'relative_caption' is not a text: 7"),
    ({"relative_caption": None}, "field 'relative_caption' is not a text: None"),
    ({"relative_caption": "  "}, "field 'relative_caption' is not a text"),
    ({"relative_caption": ["in red"]}, "field 'relative_caption' is not a text"),
    ({"kind": 3}, "field 'kind' is not a text: 3"),
    ({"kind": None}, "field 'kind' is not a text: None"),
    ({"reference_img_id": None}, "field 'reference_img_id' is not the name of a picture: None"),
    ({"reference_img_id": True}, "field 'reference_img_id' is not the name of a picture: True"),
    ({"reference_img_id": 1.0}, "field 'reference_img_id' is not the name of a picture: 1.0"),
    ({"reference_img_id": {"a": 1}}, "field 'reference_img_id' is not the name of a picture"),
    ({"reference_img_id": ""}, "field 'reference_img_id'"),
    ({"reference_img_id": "."}, "field 'reference_img_id'"),
    ({"reference_img_id": "../secret.png"}, "field 'reference_img_id': ../secret.png leads out of the folder"),
    ({"reference_img_id": "sub/../../secret.png"}, "field 'reference_img_id': sub/../../secret.png leads out"),
    ({"reference_img_id": "/etc/passwd"}, "field 'reference_img_id': /etc/passwd leads out"),
    ({"reference_img_id": "a\0.png"}, "field 'reference_img_id': a name with a zero byte"),
    ({"reference_img_id": "\ud800.png"}, "field 'reference_img_id' is not UTF-8"),
])
def test_a_spoiled_record_is_named(folder, change, says):
    record = {name: value for name, value in (RECORD | change).items() if value is not ...}
    with pytest.raises(PliError) as caught: read(folder, RECORD, record)
    assert str(caught.value).startswith(f"{folder / 'queries.json'}: record 1") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_query_has_its_own_name(folder):
    assert read(folder, RECORD | {"id": 7}, RECORD | {"id": "x"}).ids == ("7", "x")
    with pytest.raises(PliError, match="record 1, field 'id': '7' is the id of record 0 too"): read(folder, RECORD | {"id": 7}, RECORD | {"id": "7"})


@pytest.mark.parametrize("record", [None, 3, "a.png", ["a.png", "in red", "b.png"]])
def test_a_record_that_is_none(folder, record):
    with pytest.raises(PliError, match="queries.json: record 1 is not an object with fields"): read(folder, RECORD, record)


@pytest.mark.parametrize("queries", [[], {}, {"0": RECORD}, None, 5, "queries"])
def test_no_list_of_queries(folder, queries):
    with pytest.raises(PliError, match="queries.json: queries are a list with at least one record"):
        read_queries(write(folder / "queries.json", queries), folder / "gallery.json")


@pytest.mark.parametrize("gallery, says", [
    ([], "a gallery is a list"), ({}, "a gallery is a list"), ({"a.png": 0}, "a gallery is a list"), (None, "a gallery is a list"), ("a.png", "a gallery is a list"),
    (["a.png", "b.png", "a.png"], "entry 2 lists 'a.png' for the second time; the first is entry 0"),
    (["a.png", "./a.png"], "entry 1 lists 'a.png' for the second time"), ([1, "1"], "entry 1 lists '1' for the second time"),
    (["a.png", None], "entry 1 is not the name of a picture: None"), ([False], "entry 0 is not the name"), ([["a.png"]], "entry 0 is not the name"),
    (["a.png", "../b.png"], "entry 1: ../b.png leads out of the folder"), (["/etc/passwd"], "entry 0: /etc/passwd leads out"), (["a.png", ""], "entry 1"),
    (["out.png"], "entry 0: out.png is a link out of the folder"), (["away/b.png"], "entry 0: away/b.png is a link out of the folder"),
])
def test_a_spoiled_gallery(folder, tmp_path_factory, gallery, says):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "out.png").symlink_to(picture(outside / "b.png"))
    (folder / "away").symlink_to(outside)
    write(folder / "gallery.json", gallery)
    with pytest.raises(PliError) as caught: read(folder, RECORD)
    assert str(caught.value).startswith(f"{folder / 'gallery.json'}: {says}")


def test_an_empty_gallery_of_lines(folder):
    (folder / "gallery.txt").write_text("\n\n")
    with pytest.raises(PliError, match="gallery.txt: a gallery is a list"): read_gallery(folder / "gallery.txt", folder)
    (folder / "gallery.txt").write_bytes(b"a.png\n\xff\xfe.png\n")
    with pytest.raises(PliError, match="gallery.txt: entry 1 is not UTF-8"): read_gallery(folder / "gallery.txt", folder)
    with pytest.raises(PliError, match="gone.txt"): read_gallery(folder / "gone.txt", folder)
    with pytest.raises(PliError, match="gone.json: no such file"): read_gallery(folder / "gone.json", folder)
    with pytest.raises(PliError, match="no such file"): read_queries(folder / "gone.json", folder / "gallery.json")


@pytest.mark.parametrize("name", ["queries.json", "gallery.json"])
def test_half_a_download(folder, name):
    whole = (folder / name).read_bytes()
    for end in range(len(whole)):
        (folder / name).write_bytes(whole[:end])
        with pytest.raises(PliError, match=name): read_queries(folder / "queries.json", folder / "gallery.json")


anything = st.recursive(st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8) | st.sampled_from(GALLERY),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(RECORD)) | st.text(max_size=4), inner, max_size=4), max_leaves=8)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(list(RECORD)), anything, anything)
def test_any_json_is_read_or_refused_by_name(tmp_path_factory, field, value, other):
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "gallery.json", GALLERY)
    for records in ([RECORD | {field: value}], [other], other):
        try: assert len(read_queries(write(folder / "queries.json", records), folder / "gallery.json")) == 1
        except PliError as error: assert "queries.json" in str(error) and "\n" not in str(error)
    try: read_gallery(write(folder / "gallery.json", other), folder)
    except PliError as error: assert "gallery.json" in str(error) and "\n" not in str(error)


# --- pictures and features

def test_every_missing_picture_is_counted_before_any_work(folder):
    names = GALLERY + [f"gone {i}.png" for i in range(6)] + ["broken.png"]
    (folder / "broken.png").write_text("no picture")
    write(folder / "gallery.json", names)
    queries = read(folder, RECORD | {"reference_img_id": "x" * 300 + ".png"})
    for call in (lambda: encode(Fake(blind), queries), lambda: query_validator(queries)):
        with pytest.raises(PliError) as caught: call()
        assert f"8 of 12 pictures in {folder} cannot be used: gone 0.png (missing picture)" in str(caught.value) and str(caught.value).endswith(" and 3 more")
    with pytest.raises(PliError, match=r"1 of 1 pictures in .* cannot be used: broken.png \(broken picture\)$"): PictureFiles(["broken.png"], folder, pil_to_tensor)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_cut_off_in_the_middle_is_named(folder, workers):
    noise = torch.randint(0, 256, (64, 64, 3), generator=generator(0, "noise")).byte().numpy()
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    pictures = PictureFiles(["a.png", "cut.png"], folder, pil_to_tensor)              # its header is whole
    with pytest.raises(PictureError, match="cut.png: broken picture"): encode_pictures(Fake(lambda pixels: pixels.float().mean((2, 3))), pictures, workers=workers)


def test_features_are_unit_single_precision_and_the_same_in_any_batch():
    pixels = torch.randint(0, 256, (7, 3, 4, 4), generator=generator(0, "pixels")).byte()
    fake = Fake(lambda pixels: pixels.flatten(1).half(), lambda text: torch.tensor([len(text), 1.0]))
    features = encode_pictures(fake, pixels)
    assert features.dtype == torch.float32 and torch.allclose(features.norm(dim=1), torch.ones(7))
    assert torch.equal(encode_pictures(fake, pixels, batch_size=2), features)
    texts = ["a", "bb", "a", "ccc", "bb"]
    assert torch.equal(encode_texts(fake, texts, batch_size=2), unit(torch.tensor([[1.0, 1], [2, 1], [1, 1], [3, 1], [2, 1]])))
    assert fake.texts == ["a", "bb", "ccc"]                                           # each distinct text once
