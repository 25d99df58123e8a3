"Every form in which pairs come: read right, drawn right, opened from shards, resumed to the bit; and bad data counted, listed and survived."
import io
import json
import os
import struct
import tarfile
import threading
import zlib
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.core import PliError, read_json
from pli.data import shards
from pli.data.batches import PairSet, ResumableBatchSampler, collate
from pli.data.mixtures import Draws, describe_draws, join_pairs
from pli.data.pairs import Pairs, read_pairs, split_pairs
from pli.data.pictures import PictureError, open_picture
from pli.data.registry import pair_readers, reader_for
from pli.data.shards import Member, Trouble, shard_index, walk_shard
from pli.data.webdataset import expand_braces
from pli.settings import TuneSettings
from pli.training.identity import files_digest
from pli.training.loop import tune


def jpeg(number: int = 0, size: int = 40) -> bytes:
    "A picture of its own for every number."
    noise = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def make_shard(path: Path, members) -> Path:
    "A tar of members `(name or TarInfo, bytes)`, in this order."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for entry, data in members:
            if isinstance(entry, str): entry = tarfile.TarInfo(entry)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def samples(first: int, count: int):
    for number in range(first, first + count):
        yield f"{number:09d}.jpg", jpeg(number)
        yield f"{number:09d}.txt", f"caption {number}".encode()
        yield f"{number:09d}.json", json.dumps({"caption": f"another caption {number}", "key": f"{number:09d}"}).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shards._index_of.cache_clear()


# --- formats, in the layout of the official files

def coco(home: Path) -> Path:
    for number in (9, 25): write(home / "train2017" / f"{number:012d}.jpg", jpeg(number))
    return write(home / "annotations" / "captions_train2017.json", json.dumps({
        "info": {"description": "COCO 2017 Dataset", "year": 2017}, "licenses": [{"id": 1, "name": "x", "url": "y"}],
        "images": [{"license": 1, "file_name": f"{n:012d}.jpg", "coco_url": "x", "height": 40, "width": 40, "id": n} for n in (9, 25, 30)],
        "annotations": [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate([(25, "a giraffe"), (9, "a tray of food"), (25, "two giraffes\n"), (30, "a vase"), (31, "nothing")])],
    }))


def karpathy(home: Path) -> Path:
    picture = lambda name, split: {"sentids": [0, 1], "imgid": 0, "split": split, "filename": name, "sentences": [
        {"tokens": ["a"], "raw": f"{split} {i} of {name}", "imgid": 0, "sentid": i} for i in range(2)]}
    for number in range(4): write(home / "flickr30k_images" / f"{number}.jpg", jpeg(number))
    return write(home / "dataset_flickr30k.json", json.dumps(
        {"images": [picture(f"{i}.jpg", split) for i, split in enumerate(("train", "val", "test", "restval"))], "dataset": "flickr30k"}))


def results(home: Path) -> Path:
    write(home / "flickr30k_images" / "1000092795.jpg", jpeg())
    return write(home / "results.csv", "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys , with \"hair .\n1000092795.jpg| 4   A dog runs .\n")


def captions_txt(home: Path) -> Path:
    write(home / "Images" / "1.jpg", jpeg())
    return write(home / "captions.txt", 'image_name,comment_number,comment\n1.jpg,0,Two guys, outside .\n1.jpg,1," Two , White males ."\n')


def annotations_csv(home: Path) -> Path:
    for number in (1, 2): write(home / "flickr30k-images" / f"{number}.jpg", jpeg(number))
    return write(home / "flickr_annotations_30k.csv",
                 'raw,sentids,split,filename,img_id\n"[""Two guys."", ""Two men.""]","[0, 1]",train,1.jpg,0\n"[""A man.""]",[2],test,2.jpg,1\n')


def llava(home: Path) -> Path:
    write(home / "images" / "GCC_train_1.jpg", jpeg())
    talk = lambda *values: [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return write(home / "chat.json", json.dumps([
        {"id": "GCC_train_1", "image": "GCC_train_1.jpg", "conversations": talk("Give a brief description of the image.\n<image>", "olive oil .")},
        {"id": "2", "image": "GCC_train_1.jpg", "conversations": talk("What is it?", "Oil.", "Why?", "To cook.")}]))


def metadata(home: Path) -> Path:
    write(home / "images" / "GCC_train_1.jpg", jpeg())
    return write(home / "metadata.json", json.dumps([{"id": "GCC_train_1", "image": "GCC_train_1.jpg", "caption": "olive oil .", "blip_caption": "a jar", "url": "x"}]))


def fashioniq(home: Path) -> Path:
    write(home / "images" / "B008BHCT58.jpg", jpeg())
    return write(home / "captions" / "cap.dress.train.json", json.dumps(
        [{"target": "B008BHCT58", "candidate": "B003FGW7MK", "captions": ["is solid black", "is black with straps"]}]))


def imagenet(home: Path) -> Path:
    write(home / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    for number, name in enumerate(("n01440764", "n01443537", "n99999999")): write(home / "ILSVRC" / "Data" / "CLS-LOC" / "train" / name / f"{name}_1.JPEG", jpeg(number))
    return home / "ILSVRC" / "Data" / "CLS-LOC" / "train"


def webdataset(home: Path) -> Path: return make_shard(home / "00000.tar", samples(0, 2))


FORMATS = {
    coco: ("coco", ["a giraffe", "a tray of food", "two giraffes"], {"missing picture": 1, "no picture named": 1}),
    karpathy: ("karpathy", ["train 0 of 0.jpg", "train 1 of 0.jpg", "restval 0 of 3.jpg", "restval 1 of 3.jpg"], {}),
    results: ("flickr30k", ['Two young guys , with "hair .'], {"ragged row": 1}),
    captions_txt: ("flickr30k", ["Two guys, outside .", "Two , White males ."], {}),
    annotations_csv: ("flickr30k", ["Two guys.", "Two men."], {}),
    llava: ("llava", ["olive oil ."], {"no caption": 1}),
    metadata: ("llava", ["olive oil ."], {}),
    fashioniq: ("fashioniq", ["is solid black", "is black with straps"], {}),
    imagenet: ("imagenet", ["a photo of a tench", "a photo of a goldfish"], {"no caption": 1}),
    webdataset: ("webdataset", ["caption 0", "caption 1"], {}),
}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_format_is_told_by_what_is_in_it_and_its_pictures_are_found(tmp_path, make):
    kind, captions, problems = FORMATS[make]
    source = make(tmp_path / "data")
    assert reader_for(source) is pair_readers()[kind]
    pairs = read_pairs(source)
    assert list(pairs.captions) == captions and Counter(p.cause for p in pairs.problems) == problems
    for path, _ in pairs: assert open_picture(path).size == (40, 40)
    assert all(not os.path.isabs(name) and ".." not in name for name in pairs.names)


def test_splits_that_are_left_out_are_said_and_can_be_read(tmp_path):
    source = karpathy(tmp_path)
    assert "1 of 'val', 1 of 'test' (--format karpathy-all reads all)" in read_pairs(source).notes[0]
    assert len(read_pairs(source, kind="karpathy-all")) == 8
    table = annotations_csv(tmp_path / "b")
    assert "1 of 'test'" in read_pairs(table).notes[0] and len(read_pairs(table, kind="flickr30k-all")) == 3


def test_the_split_folder_of_karpathys_coco_is_in_the_names(tmp_path):
    write(tmp_path / "val2014" / "a.jpg", jpeg())
    write(tmp_path / "dataset_coco.json", json.dumps({"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "restval", "sentences": [{"raw": "a cat"}], "cocoid": 1}]}))
    assert read_pairs(tmp_path / "dataset_coco.json").names == ["val2014/a.jpg"]


def test_written_captions_of_imagenet_win_over_class_names(tmp_path):
    train = imagenet(tmp_path)
    write(train / "captions" / "n01440764_1.txt", "a man with a fish\n")
    pairs = read_pairs(train)
    assert pairs.captions == ("a man with a fish",) and {p.cause for p in pairs.problems} == {"no caption file"}
    whole = tmp_path / "ImageNet1K"                                       # as the released code has it
    write(whole / "test" / "x" / "ILSVRC_1.JPEG", jpeg())
    write(whole / "captions" / "ILSVRC_1.txt", "a dog")
    assert read_pairs(whole, kind="imagenet").captions == ("a dog",)


def test_fashioniq_pairs_words_with_the_target_and_says_so(tmp_path):
    source = fashioniq(tmp_path)
    assert "captions of the target; they say how it differs" in read_pairs(source).notes[0]
    write(tmp_path / "images" / "B003FGW7MK.jpg", jpeg(2))
    assert set(read_pairs(source, image_key="candidate").names) == {"images/B003FGW7MK.jpg"}
    source.write_text(json.dumps([{"candidate": "B003FGW7MK", "captions": ["is black", "x"]}]))
    with pytest.raises(PliError, match="is it the list of a test split"): read_pairs(source)


@pytest.mark.skipif(not os.environ.get("PLI_SHARED"), reason="needs the official annotations")
def test_the_official_captions_of_fashioniq_are_recognised():
    path = Path(os.environ["PLI_SHARED"]) / "annotations" / "fashioniq" / "captions" / "cap.dress.train.json"
    if not path.exists(): pytest.skip("no official annotations")
    found = list(reader_for(path).read(path))
    assert len(found) == 1 + 2 * len(json.loads(path.read_text())) and reader_for(path) is pair_readers()["fashioniq"]


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"), ('{"a": 1}', "pairs are read from"), ("[]", "pairs are read from"), ('[{"image": 1}]', "pairs are read from"), ('{"images": [], "annotations": []}', "no usable pair"),
    ('{"images": [{"id": [1]}], "annotations": [{"image_id": {}, "caption": "x"}]}', "no usable pair"),
    ('{"images": [{"id": 1, "file_name": 7}], "annotations": [{"image_id": 1, "caption": ["x", 2]}]}', "no usable pair"),
    ('{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "captions_\\*.json, not in instances"),
    ('{"images": [{"sentences": 3, "split": "train"}]}', "no usable pair"), ('[{"image": 3, "conversations": [null, 1]}]', "no usable pair"),
    ('[{"candidate": 3, "captions": "x"}]', "no usable pair"), ("[" * 100_000, "not valid JSON"),
])
def test_json_of_any_shape_ends_in_one_line(tmp_path, text, message):
    with pytest.raises(PliError, match=message): read_pairs(write(tmp_path / "a.json", text))


def test_a_named_format_wins_and_an_unknown_one_is_told(tmp_path):
    with pytest.raises(PliError, match="format must be one of .*coco"): read_pairs(coco(tmp_path), kind="caco")
    with pytest.raises(PliError, match="expected a list of objects"): read_pairs(coco(tmp_path), kind="llava")


def test_names_in_json_stay_inside(tmp_path):
    write(tmp_path / "secret.jpg", jpeg())
    source = write(tmp_path / "set" / "m.json", json.dumps([{"image": "../secret.jpg", "caption": "x"}, {"image": str(tmp_path / "secret.jpg"), "caption": "x"}]))
    with pytest.raises(PliError, match="outside the folder: 2"): read_pairs(source)


# --- shards

def test_members_are_opened_in_any_order_by_workers(tmp_path):
    for number in range(3): make_shard(tmp_path / f"{number:05d}.tar", samples(number * 7, 7))
    pairs = read_pairs(f"{tmp_path}/{{00000..00002}}.tar")
    assert pairs.captions == tuple(f"caption {number}" for number in range(21)) and pairs.names[8] == "00001.tar/000000008.jpg"
    assert all((tmp_path / f"{number:05d}.tar.index").exists() for number in range(3))
    data = PairSet(pairs, lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    loader = DataLoader(data, batch_sampler=ResumableBatchSampler(21, 5, steps=8), collate_fn=collate, num_workers=2)
    for batch in loader:
        for index, pixels in zip(batch.indices, batch.pixels):
            with Image.open(io.BytesIO(jpeg(index))) as own: assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(own))
    assert read_pairs(tmp_path).names == read_pairs(f"{tmp_path}/*.tar").names == pairs.names         # a folder, and stars
    named = read_pairs(f"{tmp_path}/*.tar", caption_key="caption")
    assert named.captions[3] == "another caption 3"


def test_an_index_belongs_to_one_state_of_its_shard_and_is_not_believed(tmp_path):
    shard = webdataset(tmp_path)
    read_pairs(shard)
    index = tmp_path / "00000.tar.index"
    first = index.read_bytes()
    make_shard(shard, samples(5, 3))
    assert read_pairs(shard).captions == ("caption 5", "caption 6", "caption 7") and index.read_bytes() != first
    for lie in (b"", b"\xff" * 100, struct.pack("<Q", 2**60) + b"{}", first, index.read_bytes()[:-40]):
        index.write_bytes(lie)
        shards._index_of.cache_clear()
        assert read_pairs(shard).captions == ("caption 5", "caption 6", "caption 7")
    found = shard_index(shard)
    status = shard.stat()
    for offsets in (found.offsets + 10**9, -found.offsets):
        lying = shards.ShardIndex(found.path, found.names, offsets, found.sizes, ())
        shards.save_tensors(index, shards._stored(lying, [status.st_size, status.st_mtime_ns]))
        shards._index_of.cache_clear()
        assert np.array_equal(shard_index(shard).offsets, found.offsets)


def test_an_index_goes_to_the_cache_where_its_folder_takes_none(tmp_path):
    shard = webdataset(tmp_path / "data")
    (tmp_path / "data" / "00000.tar.index").mkdir()
    pairs = read_pairs(shard)
    assert len(list((tmp_path / "cache" / "pli" / "shards").glob("*.index"))) == 1 and len(pairs) == 2
    shards._index_of.cache_clear()
    assert open_picture(pairs.paths[0]).size == (40, 40)


def large_png() -> bytes:
    "20,000 by 20,000 pixels in a few kilobytes."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(2501) * 100) for _ in range(200)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_members():
    def entry(name, kind, link=""):
        found = tarfile.TarInfo(name)
        found.type, found.linkname = kind, link
        return found, b""
    yield from [("good.jpg", jpeg(1)), ("good.txt", b"a good one"), ("cut.jpg", jpeg(2)[:900]), ("cut.txt", b"cut short"), ("zero.jpg", b""), ("zero.txt", b"nothing")]
    yield from [("page.jpg", b"<html>404</html>"), ("page.txt", b"a web page"), ("huge.png", large_png()), ("huge.txt", b"too large")]
    yield from [entry("pipe.jpg", tarfile.FIFOTYPE), ("pipe.txt", b"a pipe"), entry("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), entry("hard.jpg", tarfile.LNKTYPE, "good.jpg")]
    yield from [("empty.jpg", jpeg(3)), ("empty.txt", b" \n"), ("long.jpg", jpeg(4)), ("long.txt", b"word " * 2000), ("alone.jpg", jpeg(5))]
    yield from [("latin.jpg", jpeg(6)), ("latin.txt", "degrad\u00e9".encode("latin-1")), ("../../climb.jpg", jpeg(7)), ("../../climb.txt", b"climbs"), ("/root.jpg", jpeg(8))]
    yield from [("json.jpg", jpeg(9)), ("json.json", b'{"caption": '), ("x.pyd", b"\x80\x04cos\nsystem\n"), ("good.jpg", jpeg(1)), ("n" * 300 + ".jpg", jpeg(1))]


def test_bad_members_are_counted_and_listed(tmp_path):
    pairs = read_pairs(make_shard(tmp_path / "a.tar", bad_members()))
    assert [name.split("/")[1] for name in pairs.names] == ["good.jpg", "cut.jpg", "long.jpg"] and len(pairs.captions[2]) == 9999
    assert Counter(p.cause for p in pairs.problems) == {
        "broken picture": 2, "too large picture": 1, "no plain file": 3, "caption without picture": 1, "empty caption": 1, "no caption": 1,
        "wrong encoding": 1, "outside the shard": 3, "bad JSON": 1, "second member": 1, "long name": 1}
    assert "1 .pyd" in pairs.notes[0] and not (tmp_path.parent / "climb.jpg").exists()
    with pytest.raises(PictureError, match="cut.jpg: broken picture"): open_picture(pairs.paths[1])      # its header is fine


def test_a_shard_that_is_cut_costs_its_end_only(tmp_path):
    whole = webdataset(tmp_path).read_bytes()
    members = [entry for entry in walk_shard(tmp_path / "00000.tar")]
    assert len(members) == 6 and not any(isinstance(entry, Trouble) for entry in members)
    for size in range(512, len(whole) - 9000, 257):
        cut = write(tmp_path / "cut" / "a.tar", whole[:size])
        found = list(walk_shard(cut))
        assert isinstance(found[-1], Trouble) and found[-1].cause == "cut shard", size
        assert [tuple(entry) for entry in found[:-1]] == [tuple(entry) for entry in members if entry.offset + -(-entry.size // 512) * 512 <= size][:len(found) - 1]
        assert len(found) - 1 >= sum(entry.offset + -(-entry.size // 512) * 512 <= size for entry in members) - 1
    torn = write(tmp_path / "torn.tar", whole[:members[2].offset - 512] + b"\xff" * 512 + whole[members[2].offset:])
    assert [getattr(entry, "cause", "") for entry in walk_shard(torn)] == ["", "", "damaged shard"]
    behind = write(tmp_path / "two.tar", whole + whole)
    assert [p.cause for p in read_pairs(behind).problems] == ["damaged shard"]


def test_shards_that_are_none_cost_their_own_pairs(tmp_path):
    webdataset(tmp_path)
    write(tmp_path / "00001.tar", "<html>404 not found</html>" * 100)
    write(tmp_path / "00002.tar", b"")
    os.mkfifo(tmp_path / "00004.tar")
    import gzip
    write(tmp_path / "00005.tar", gzip.compress((tmp_path / "00000.tar").read_bytes()))
    pairs = read_pairs(f"{tmp_path}/{{00000..00005}}.tar")
    assert len(pairs) == 2 and Counter(p.cause for p in pairs.problems) == {"damaged shard": 4, "missing shard": 1}
    assert any("unpack it to a plain .tar first" in p.detail for p in pairs.problems) and any("not a file" in p.detail for p in pairs.problems)
    with pytest.raises(PliError, match="no usable pair. Expected tar shards"): read_pairs(tmp_path / "00001.tar")
    with pytest.raises(PliError, match="no such file"): read_pairs(tmp_path / "00009.tar")
    with pytest.raises(PliError, match="no .tar is there"): read_pairs(f"{tmp_path}/x*.tar")


def test_a_shard_behind_a_link_out_of_the_folder_needs_a_root(tmp_path):
    webdataset(tmp_path / "store")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").symlink_to(tmp_path / "store" / "00000.tar")
    with pytest.raises(PliError, match="outside the folder: 1; .*--root"): read_pairs(tmp_path / "set" / "a.tar")
    assert len(read_pairs(tmp_path / "set" / "a.tar", root=f"{tmp_path / 'set'}{os.pathsep}{tmp_path / 'store'}")) == 2


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=30), size=st.integers(0, 2**14))
def test_no_bytes_of_a_shard_do_harm(tmp_path, changes, size):
    data = bytearray(make_shard(tmp_path / "whole.tar", [("a.jpg", b"x" * 900), ("a" * 150 + ".txt", b"long name"), ("b.txt", b"b")]).read_bytes())
    for place, value in changes: data[place % 6000] = value
    path = write(tmp_path / "a.tar", bytes(data[:size + 512]))
    try: found = list(walk_shard(path))
    except PliError: return
    whole = path.stat().st_size
    for entry in found:
        if isinstance(entry, Member): assert 0 <= entry.offset <= entry.offset + entry.size <= whole and not entry.name.startswith(("/", ".."))


def test_a_header_that_announces_gigabytes_is_refused(tmp_path):
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**30
    with pytest.raises(PliError, match="no tar archive"): list(walk_shard(write(tmp_path / "a.tar", entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048))))


def test_braces():
    assert expand_braces("a{8..10}.tar") == ["a8.tar", "a9.tar", "a10.tar"] and expand_braces("a{x}.tar") == ["a{x}.tar"]
    for pattern in ("{5..1}.tar", "{0..99999999999999999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(PliError): expand_braces(pattern)


# --- shards from the web

class Ranges(SimpleHTTPRequestHandler):
    "A server of files that knows ranges, breaks off where it is told to, and remembers what it was asked."
    asked, break_at = [], None

    def log_message(self, *args): pass

    def do_GET(self):
        name = self.path.partition("?")[0].lstrip("/")
        if name == "away.tar":
            self.send_response(302)
            self.send_header("Location", f"file://{self.directory}/00000.tar")
            return self.end_headers()
        path = Path(self.directory) / name
        if not path.is_file(): return self.send_error(404)
        data, start, wanted = path.read_bytes(), 0, self.headers.get("Range")
        version = f'"{zlib.crc32(data)}"'
        if wanted and self.headers.get("If-Range") == version: start = int(wanted.removeprefix("bytes=").rstrip("-"))
        Ranges.asked.append((name, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", version)
        self.end_headers()
        stop, Ranges.break_at = Ranges.break_at, None
        self.wfile.write(data[start:stop])


@pytest.fixture
def web(tmp_path):
    Ranges.asked, Ranges.break_at = [], None
    (tmp_path / "site").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_from_the_web_are_copied_once(web, tmp_path):
    site, address = web
    for number in range(2): make_shard(site / f"{number:05d}.tar", samples(number * 2, 2))
    source = address + "/{00000..00002}.tar?token=geheim"
    pairs = read_pairs(source)
    assert pairs.captions == tuple(f"caption {number}" for number in range(4)) and pairs.names[3] == "00001.tar/000000003.jpg"
    assert [p.cause for p in pairs.problems] == ["missing shard"] and "404" in pairs.problems[0].detail and "geheim" not in str(pairs.problems)
    asked = list(Ranges.asked)
    assert read_pairs(source).names == pairs.names == read_pairs(site).names and Ranges.asked == asked      # and read like files on the disk
    assert not any(b"geheim" in file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_a_copy_that_broke_off_goes_on(web):
    site, address = web
    make_shard(site / "00000.tar", samples(0, 4))
    Ranges.break_at = 7000
    assert len(read_pairs(f"{address}/00000.tar")) == 4
    assert Ranges.asked[0] == ("00000.tar", 0) and 0 < Ranges.asked[1][1] <= 7000 and len(Ranges.asked) == 2


def test_a_half_copy_of_another_version_begins_again(web, tmp_path):
    site, address = web
    make_shard(site / "00000.tar", samples(0, 2))
    from pli.data.remote import copies_folder
    folder = copies_folder(f"{address}/00000.tar")
    write(folder / "00000.tar.partial", b"x" * 3000)
    write(folder / "00000.tar.source", json.dumps({"address": "x", "version": '"old"'}))
    assert read_pairs(f"{address}/00000.tar").captions == ("caption 0", "caption 1") and Ranges.asked == [("00000.tar", 0)]


def test_no_commands_and_no_other_protocols(web, tmp_path):
    site, address = web
    webdataset(site)
    for source in (f"pipe:touch {tmp_path}/ran", "ftp://127.0.0.1/a.tar", f"file://{site}/00000.tar", "s3://bucket/a.tar"):
        with pytest.raises(PliError, match="commands and other protocols are not followed"): read_pairs(source)
    with pytest.raises(PliError, match="302"): read_pairs(f"{address}/away.tar")
    assert not (tmp_path / "ran").exists()


# --- mixtures

def test_the_plain_order_is_what_it_was():
    assert list(ResumableBatchSampler(12, 4, seed=3, steps=7)) == list(ResumableBatchSampler(12, 4, seed=3, steps=7, draws=Draws((0,) * 12)))


@hypothesis_settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), weights=st.lists(st.floats(0.2, 5), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_draws_are_a_function_of_seed_and_position(sizes, weights, seed):
    sources = tuple(number for number, size in enumerate(sizes) for _ in range(size))
    try: draws = Draws(sources, weights=tuple(weights[:len(sizes)]))
    except PliError as error:
        assert "never draws it" in str(error)
        return
    order = lambda first, steps: list(ResumableBatchSampler(len(sources), 2, seed, first, steps, draws=Draws(sources, weights=draws.weights)))
    whole = order(0, 40)
    assert order(17, 23) == whole[17:]
    exact = [len(sources) * weight / sum(draws.weights) for weight in draws.weights]
    assert sum(draws.counts) == len(sources) and all(abs(count - share) < 1 for count, share in zip(draws.counts, exact))
    for number in range(3):
        drawn = Counter(sources[pair] for pair in draws.epoch(seed, number).tolist())
        assert [drawn[i] for i in range(len(sizes))] == draws.counts
    seen = Counter(pair for number in range(5) for pair in draws.epoch(seed, number).tolist())
    for source in range(len(sizes)):                                    # passes: no pair twice before all others once
        times = [seen[pair] for pair in range(len(sources)) if sources[pair] == source]
        assert max(times) - min(times) <= 1


def test_one_caption_a_visit_is_drawn_evenly():
    pictures = (0, 0, 0, 0, 1, 2, 2)
    draws = Draws((0,) * 7, pictures)
    seen = Counter()
    for number in range(400):
        pairs = draws.epoch(0, number).tolist()
        assert sorted(pictures[pair] for pair in pairs) == [0, 1, 2]
        seen.update(pairs)
    assert all(70 < seen[pair] < 130 for pair in range(4)) and seen[4] == 400 and all(160 < seen[pair] < 240 for pair in (5, 6))


def table(folder: Path, count: int, first: int = 0) -> Path:
    for number in range(first, first + count): write(folder / f"{number}.jpg", jpeg(number))
    return write(folder / "pairs.csv", "filepath,title\n" + "".join(f"{number}.jpg,caption {number}\n{number}.jpg,other words {number}\n" for number in range(first, first + count)))


def test_a_picture_of_two_sources_is_never_on_both_sides(tmp_path):
    one = read_pairs(table(tmp_path / "a", 10))
    again = write(tmp_path / "a" / "again.jsonl", "".join(json.dumps({"image": f"{n}.jpg", "caption": f"again {n}"}) + "\n" for n in range(10)))
    both = join_pairs([one, read_pairs(again), read_pairs(table(tmp_path / "b", 4, 50))], [1, 1, 2])
    assert len(set(both.names)) == 14
    learn, held = split_pairs(both, 0.3)
    assert not set(learn.paths) & set(held.paths) and len(learn.sources) == len(learn) and learn.weights == (1, 1, 2)
    assert describe_draws(both) == {"captions": "each", "source pairs": [20, 10, 8], "source weights": [1, 1, 2]}
    (tmp_path / "moved").mkdir()
    for name in "ab": (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = join_pairs([read_pairs(tmp_path / "moved" / name) for name in ("a/pairs.csv", "a/again.jsonl", "b/pairs.csv")], [1, 1, 2])
    assert moved.names == both.names


SHORT = ["--model", "pli-tiny-48", "--device", "cpu", "--batch-size", 8, "--steps", 6, "--held-out", 0.2]


def pli(*words) -> int: return main([str(word) for word in words])


def weights_of(run: Path) -> bytes: return (run / "last" / "open_clip_model.safetensors").read_bytes()


def test_a_mixture_is_resumed_to_the_bit_and_is_not_another_one(tmp_path, capsys):
    one, shard = table(tmp_path / "a", 16), make_shard(tmp_path / "s" / "a.tar", samples(100, 10))
    command = ["tune", one, shard, "--mix", 1, 2, "--captions", "one", *SHORT, "--checkpoint-every", 3]
    assert pli(*command, "--out", tmp_path / "whole") == 0
    said = capsys.readouterr().out
    assert "an epoch is" in said and "of the sources" in said
    backbone = load_backbone("pli-tiny-48", None, torch.device("cpu"), 0)
    pairs = split_pairs(join_pairs([read_pairs(one), read_pairs(shard)], [1, 2]), 0.2)[0]
    data = PairSet(pairs, backbone.pixels, "one")
    settings = TuneSettings(batch_size=8, steps=6, checkpoint_every=3)

    class Stop(Exception): pass
    class Stopping(PairSet):
        left = 30
        def __getitem__(self, index):
            Stopping.left -= 1
            if Stopping.left < 0: raise Stop
            return super().__getitem__(index)
    with pytest.raises(Stop): tune(backbone, Stopping(pairs, backbone.pixels, "one"), settings, tmp_path / "cut")
    result = tune(load_backbone("pli-tiny-48", None, torch.device("cpu"), 0), data, settings, tmp_path / "cut")
    assert result.continued_from == 3 and weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    record = read_json(tmp_path / "whole" / "run.json")
    assert record["captions"] == "one" and record["source weights"] == [1.0, 2.0] and record["picture files"] == files_digest(data)
    capsys.readouterr()
    for other, word in ((["--mix", 1, 3], "source weights was"), (["--captions", "each"], "captions was 'one', now 'each'")):
        assert pli(*command, *other, "--out", tmp_path / "whole") == 1
        assert word in capsys.readouterr().err


AS_RELEASED = dict(objective="paper", schedule="epochs", epochs=2, warmup_epochs=1, weight_decay=5e-5, decay_all=True, beta2=0.999, epsilon=1e-8, clip_gradient=0.0)


@pytest.mark.parametrize("source, changes", [("shards", {"steps": 6}), ("files", AS_RELEASED)], ids=["shards", "epochs"])
def test_a_run_is_resumed_to_the_bit_in_the_middle_of_an_epoch(source, changes, tmp_path):
    "From tar shards by their offsets, and with the recipes' one rate an epoch: 28 pairs are 3 batches of 8 an epoch, and the run goes on after the fourth."
    for number in range(2): make_shard(tmp_path / "shards" / f"{number:05d}.tar", samples(number * 14, 14))
    pairs = read_pairs(table(tmp_path / "files", 14) if source == "files" else tmp_path / "shards")
    assert len(pairs) == 28
    settings = TuneSettings(batch_size=8, checkpoint_every=2, learning_rate=1e-3, warmup=1, precision="fp32", **changes)

    class Fuse(PairSet):
        left = 5 * 8 + 3
        def __getitem__(self, index):
            Fuse.left -= 1
            if Fuse.left < 0: raise KeyboardInterrupt
            return super().__getitem__(index)

    def run(kind, folder):
        backbone = load_backbone("pli-tiny-48")
        return tune(backbone, kind(pairs, backbone.pixels), settings, tmp_path / folder, say=lambda line: None)
    whole = run(PairSet, "whole")
    with pytest.raises(KeyboardInterrupt): run(Fuse, "cut")
    shards._index_of.cache_clear()                                            # another process would not remember it
    result = run(PairSet, "cut")
    assert result.continued_from == 4 and len(whole.history) == 6 and result.history == whole.history and not result.problems
    if source == "files": assert [record["learning_rate"] for record in result.history] == pytest.approx(3 * [1e-5] + 3 * [1e-3])
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert (tmp_path / "cut" / "checkpoint.safetensors").read_bytes() == (tmp_path / "whole" / "checkpoint.safetensors").read_bytes()


def test_epochs_are_steps(tmp_path, capsys):
    one = table(tmp_path / "a", 30)
    short = [word for word in SHORT if word not in ("--steps", 6)]
    assert pli("tune", one, *short, "--epochs", 2, "--out", tmp_path / "run") == 0
    assert "an epoch is 48 pairs, 6 steps; 12 steps are 2 epochs" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["settings"]["steps"] == 12
    assert pli("tune", one, *SHORT, "--epochs", 2, "--out", tmp_path / "no") == 1 and "--steps counts steps, and this run goes by epochs" in capsys.readouterr().err
    assert pli("tune", one, *short, "--epochs", 1, "--captions", "one", "--out", tmp_path / "one") == 0
    assert "an epoch is 24 pictures, each with one of its captions, 3 steps; 3 steps are 1 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (["--mix", 1], "--mix needs one number for each of PAIRS"), (["--mix", 0, 0], "all shares are 0"), (["--mix", 1, 0.0001], "never draws it"),
    (["--format", "coco", "--format", "coco", "--format", "coco"], "--format is there 3 times for 2 sources"), (["--most-bad", 2], "--most-bad must be from 0 to 1"),
    (["--mix", 1, 2, "--batches", "near"], "leave one out"), (["--epochs", 2], "--steps counts steps"), (["--format", "llava"], "not valid JSON"),
])
def test_options_of_sources_that_do_not_fit_are_told(tmp_path, capsys, options, message):
    import re
    one, two = table(tmp_path / "a", 10), table(tmp_path / "b", 10, 20)
    assert pli("tune", one, two, *SHORT, *options, "--out", tmp_path / "run") == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("words, told", [(["--mix", "1", "-1", "--out", "o"], "a share is a number of at least 0"), (["--out", "o", "--mix", "1", "b.csv"], "name PAIRS first, then --mix")])
def test_shares_that_are_none_are_told_at_once(words, told, capsys):
    with pytest.raises(SystemExit): pli("tune", "a.csv", *words)
    assert told in capsys.readouterr().err


def test_a_source_that_is_named_twice_is_told(tmp_path, capsys):
    one = table(tmp_path / "a", 10)
    assert pli("tune", one, one, *SHORT, "--out", tmp_path / "run") == 0
    assert "is named 2 times, so its pairs count 2 times" in capsys.readouterr().out


def test_a_run_survives_bad_shards_and_sums_them_up(tmp_path, capsys):
    shard = make_shard(tmp_path / "a.tar", [*samples(0, 30), *bad_members()])
    assert pli("tune", shard, *SHORT, "--steps", 12, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "left out in all: 1" in said and "outside the shard: 3" in said and "problems.jsonl" in said
    causes = Counter(json.loads(line)["cause"] for line in (tmp_path / "run" / "problems.jsonl").read_text().splitlines())
    assert causes["no plain file"] == 3 and causes["broken picture"] >= 2


def test_too_much_that_is_bad_ends_a_run(tmp_path, capsys):
    good = "".join(f"{n}.jpg,caption {n}\n" for n in range(10))
    path = table(tmp_path / "a", 10)
    path.write_text("filepath,title\n" + good + "gone.jpg,gone\n" * 12)
    assert pli("tune", path, *SHORT, "--out", tmp_path / "run") == 1
    assert "12 of 22 records are no good, more than the share of 0.5 that --most-bad allows; the first:" in capsys.readouterr().err
    assert pli("tune", path, *SHORT, "--most-bad", 0.9, "--batch-size", 4, "--out", tmp_path / "run") == 0
    cut = tmp_path / "b"
    pairs = table(cut, 60)
    for number in range(40): write(cut / f"{number}.jpg", jpeg(number)[:800])            # headers are fine
    capsys.readouterr()
    assert pli("tune", pairs, *SHORT, "--steps", 200, "--batch-size", 32, "--out", tmp_path / "late") == 1
    assert "pictures could not be decoded, more than the share of 0.5 that is allowed" in capsys.readouterr().err
