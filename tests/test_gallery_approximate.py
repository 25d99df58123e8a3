"Copies of a gallery with an approximate index: the same hits, only what changed is carried over, an object store on loopback, killed and damaged copies, strangers' copies."
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.composition import parse_composer
from pli.core import PliError, unit
from pli.gallery.search import Gallery
from pli.gallery.ranking import Where, rank_without
from pli.gallery.models import features_key
from pli.gallery.store import PictureTable, Row
from pli.world import save_world

lancedb = pytest.importorskip("lancedb", reason='needs the extra: pip install "pli[lance]"')

from pli.gallery import approximate                                      # noqa: E402
from pli.gallery.approximate import GalleryCopy, condition_of, open_copy, publish, schema_of   # noqa: E402
from pli.gallery.places import is_copy                                   # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@pytest.fixture(scope="module")
def backbone(): return load_backbone("pli-tiny-48")


@pytest.fixture(scope="module")
def opened(backbone):
    "Open a folder that has been indexed, or a copy, with a model that is loaded once; what the command line and `Gallery.open` do beyond that has tests of its own."
    galleries = []

    def opening(place: Path) -> Gallery:
        if is_copy(place): return Gallery(None, GalleryCopy(place), backbone, backbone)
        galleries.append(Gallery(place, PictureTable(next(place.glob(".pli/*/gallery.sqlite"))), backbone, backbone))
        return galleries[-1]
    yield opening
    for gallery in galleries: gallery.close()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, backbone) -> Path:
    "Forty drawn pictures, indexed; look, do not change."
    folder = tmp_path_factory.mktemp("drawn")
    save_world(folder, pairs=20, queries=4, gallery_size=20)
    with Gallery.open(folder / "images", "pli-tiny-48") as gallery: gallery.update()
    return folder / "images"


@pytest.fixture(scope="module")
def copied(drawn, opened, tmp_path_factory) -> Path:
    "A copy of it; look, do not change."
    place = tmp_path_factory.mktemp("copied") / "copy"
    opened(drawn).publish(place)
    return place


@pytest.fixture(scope="module")
def both(drawn, copied, opened) -> tuple[Gallery, Gallery]: return opened(drawn), opened(copied)


@pytest.fixture()
def pictures(drawn, tmp_path) -> Path:
    shutil.copytree(drawn, tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture()
def place(copied, tmp_path) -> Path:
    shutil.copytree(copied, tmp_path / "copy")
    return tmp_path / "copy"


def pli(capfd, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capfd.readouterr()


def ranks(hits) -> list[str]: return [hit.path for hit in hits]


def scores(hits) -> np.ndarray: return np.array([hit.score for hit in hits])


def paint(path: Path, colour) -> None: Image.new("RGB", (50, 40), colour).save(path)


def held(place) -> dict[int, bytes]:
    "Id -> path of every row in a copy."
    return {row["id"]: row["path"] for row in GalleryCopy(place).rows("id >= 0", ["path"])}


# the same hits

@pytest.mark.parametrize("composer", ["sum:1", "slerp:0.5", "product:1", "harris:2"])
@pytest.mark.parametrize("more", [{}, {"where": {"name": "PAIR_00000[!1]*"}}, {"where": Where(since="2020", until="2999-12")}, {"k": 99}])
def test_without_an_index_a_copy_gives_the_exact_hits(drawn, both, composer, more):
    asked = {"image": drawn / "pair_000001.png", "text": "in red", "composer": composer, "k": 7} | more
    exact, hits = (one.search(**asked) for one in both)
    assert ranks(hits) == ranks(exact) and np.allclose(scores(hits), scores(exact), atol=1e-4 if composer in ("product:1", "harris:2") else 1e-5) and "pair_000001.png" not in [hit.path for hit in exact]
    assert hits.records()[0]["file"] is None and hits.sheet().size == exact.sheet().size


@pytest.mark.parametrize("composer", ["sum:1", "product:1"])
def test_words_to_avoid_give_the_exact_hits(drawn, both, composer):
    "Such scores have no second, exact pass: the last digits may differ."
    exact, hits = ({hit.path: hit.score for hit in one.search(image=drawn / "pair_000001.png", text="in red", composer=composer, without="dots", k=99)} for one in both)
    assert exact.keys() == hits.keys() and all(abs(exact[path] - score) < 1e-4 for path, score in hits.items())


def test_words_alone_pictures_alone_and_an_earlier_hit(both, copied):
    gallery, copy = both
    assert ranks(copy.search(text="a red star")) == ranks(gallery.search(text="a red star"))
    assert ranks(copy.search(image=Image.new("RGB", (60, 60), "red"))) == ranks(gallery.search(image=Image.new("RGB", (60, 60), "red")))
    assert ranks(copy.search(image=copy.search(text="a red star")[2])) == ranks(gallery.search(image=gallery.search(text="a red star")[2]))
    with pytest.raises(PliError, match="none fits --in nowhere"): copy.search(text="a star", where={"folder": "nowhere"})
    with pytest.raises(PliError, match="small pictures only"): copy.search(text="a star")[0].open()
    with pytest.raises(PliError, match="is a copy"): copy.update()
    with pytest.raises(PliError, match="is a copy itself"): copy.publish(copied)


def test_an_approximate_hit_is_explained_as_it_was_scored(both, drawn):
    gallery, _ = both
    exact, hits = (gallery.search(image=drawn / "pair_000001.png", text="in red", composer="product:1", k=3, approximate=way) for way in (False, True))
    assert abs(hits[0].explain().score - hits[0].score) < 1e-4 and abs(hits[0].explain().score - exact[0].explain().score) < 1e-4


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    "A gallery of 6,000 made-up pictures around 200 centres, every tenth one there twice, and its copy with an index for so few."
    folder, patch = tmp_path_factory.mktemp("crowd"), pytest.MonkeyPatch()
    (folder / "photos").mkdir()
    patch.setattr(approximate, "LEAST_INDEXED", 1000)
    gallery = Gallery.open(folder / "photos", "pli-tiny-48")
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 6)).save(thumbnail, "JPEG")
    dice = torch.Generator().manual_seed(0)
    features = unit(unit(torch.randn(200, 128, generator=dice))[torch.arange(6000) % 200] + 0.06 * torch.randn(6000, 128, generator=dice))
    features[1::10] = features[::10]
    gallery.table.put(Row(f"{'ab'[number % 2]}/{number}.png".encode(), 1, number * 10**15, number.to_bytes(32, "big"), 4, 3, thumbnail=thumbnail.getvalue(), feature=feature) for number, feature in enumerate(features))
    gallery.publish(folder / "copy")
    yield gallery, Gallery.open(folder / "copy")
    gallery.close()
    patch.undo()


@pytest.mark.parametrize("spec, avoid, least", [("sum:1", False, 0.95), ("slerp:0.5", False, 0.95), ("product:1", False, 0.9), ("harris:1", False, 0.9), ("sum:1", True, 0.9)])
def test_with_an_index_nearly_all_hits_are_found_in_the_exact_order(crowd, spec, avoid, least):
    gallery, copy = crowd
    composer, ranker, shares = parse_composer(spec), gallery.ranker, []
    assert copy.table.facts["partitions"] == 3
    features, mean = ranker.vectors.features, torch.full((128,), 0.01)
    for number in range(5, 405, 40):
        query, against = (features[number], features[number + 1], mean), features[number + 2] if avoid else None
        few = approximate.candidates(copy.table, composer, *query, against, 10)
        assert len(few.vectors) < 5000
        if avoid: found = [rank_without(one, composer, *query, None, against, 10) for one in (ranker, few)]
        else: found = [one.rank(composer, *query, None, 10) for one in (ranker, few)]
        exact, hits = ([int(one.vectors.ids[row]) for row in rows] for one, (_, rows) in zip((ranker, few), found))
        shares.append(len(set(exact) & set(hits)) / 10)
        if set(exact) == set(hits) and not (composer.centred or avoid): assert exact == hits and torch.allclose(found[0][0], found[1][0], atol=1e-5)       # ties, too
    assert np.mean(shares) >= least


def test_filters_with_an_index(crowd):
    gallery, copy = crowd
    for where in ({"folder": "a"}, {"name": "12*.png"}, {"until": "1970-06"}, {"since": "2100"}, {"folder": "b", "name": "*[13579].png"}):
        exact, hits = (one.search(text="a star", where=where, k=20) for one in (gallery, copy))
        assert all(Where(**where).takes(hit.picture) for hit in hits) and len(hits) == len(exact)
        assert len({hit.path for hit in hits} & {hit.path for hit in exact}) >= 0.9 * len(exact)


@pytest.mark.parametrize("name", ["*", "IMG_2*", "img?[12]*.png", "[!a-c]*", "a.b+c(d)*", "*'quote*", "[]x]*", "[a", "ü*", "*^$*", "[z-a]*", "[!z-a]*", "[]", "[!]", "*[!]*", "[c-ab-d]*", "[a--]*", "[--a]*", "*[^x]*", "[[i]*", "*[&&a]*", "*[\\d]*", "[!]x]*"])
def test_patterns_mean_the_same_as_in_an_exact_search(tmp_path, name):
    "Every name against the pattern, by the database and by `Where`."
    import pyarrow as pa
    names = ["IMG_2001.png", "img_1.png", "imgx2y.png", "a.png", "d.png", "a.b+c(d)e", "it's 'quote'.png", "]x.png", "[a", "Übung.png", "x^$y.png", "new\nline.png", "a\\b.png"]
    table = lancedb.connect(tmp_path).create_table("names", pa.table({"name": [each.lower() for each in names]}))
    found = table.search().where(condition_of(Where(name=name))).limit(None).to_arrow()["name"].to_pylist()
    from pli.gallery.store import Picture
    assert sorted(found) == sorted(each.lower() for each in names if Where(name=name).takes(Picture(1, each, 1, 0, b"")))


# bringing up to date

def test_only_what_changed_is_carried_over(pictures, tmp_path, opened):
    gallery = opened(pictures)
    assert gallery.publish(tmp_path / "copy").added == len(gallery)
    written = publish(gallery, tmp_path / "copy")
    assert (written.added, written.removed) == (0, 0)
    (pictures / "pair_000002.png").unlink()
    (pictures / "pair_000003.png").rename(pictures / "moved.png")
    paint(pictures / "new.png", "red")
    paint(pictures / "pair_000004.png", "blue")
    gallery.update()
    written = gallery.publish(tmp_path / "copy")
    assert (written.added, written.removed, written.pictures) == (3, 1, len(gallery))
    assert held(tmp_path / "copy") == {found.id: os.fsencode(found.path) for found in gallery.table.select()}
    assert ranks(opened(tmp_path / "copy").search(text="a star", k=99)) == ranks(gallery.search(text="a star", k=99))


def test_the_copy_beside_a_gallery_follows_it(pictures, opened):
    gallery = opened(pictures)
    assert ranks(gallery.search(text="a star", approximate=True)) == ranks(gallery.search(text="a star"))
    paint(pictures / "new.png", "red")
    gallery.update()
    hits = gallery.search(text="a star", k=99, approximate=True)
    assert "new.png" in [hit.path for hit in hits] and hits[0].open().size in ((48, 48), (50, 40)) and hits.asked["approximate"] is True


def test_a_gallery_that_cannot_be_written_to_says_that_its_copy_is_old(pictures, capfd, opened):
    gallery = opened(pictures)
    gallery.search(text="a star", approximate=True)
    paint(pictures / "new.png", "red")
    gallery.update()
    gallery.table.writable = False
    assert "new.png" not in [hit.path for hit in gallery.search(text="a star", k=99, approximate=True)]
    assert "is older than the gallery" in capfd.readouterr().err


def test_names_of_every_kind_survive(tmp_path, opened, backbone):
    paths = ["with space.png".encode(), b"quote'\".png", "日本語/ü.png".encode(), b"\xff\xfe.png", b"new\nline.png"]
    with PictureTable(tmp_path / "photos" / ".pli" / ("0" * 16) / "gallery.sqlite", create=True) as table:
        table.say(key=features_key(backbone), width=128, model="pli-tiny-48", pretrained=None, preprocess="model")
        table.put(Row(path, 1, 1, bytes([number]) * 32, 4, 3, thumbnail=b"x", feature=unit(torch.randn(128))) for number, path in enumerate(paths))
    opened(tmp_path / "photos").publish(tmp_path / "copy")
    assert sorted(held(tmp_path / "copy").values()) == sorted(paths)
    copy = opened(tmp_path / "copy")
    assert sorted(os.fsencode(hit.path) for hit in copy.search(text="x")) == sorted(paths)
    assert [hit.path for hit in copy.search(text="x", where={"folder": "日本語"})] == ["日本語/ü.png"]


# killed, doubled, damaged

PUBLISHER = """
import sys
import pli.gallery.approximate as approximate
from pli.gallery.search import Gallery
approximate._CHUNK = 2
with Gallery.open(sys.argv[1]) as gallery:
    print("ready", flush=True)
    gallery.publish(sys.argv[2])
"""


def test_a_copy_whose_writer_is_killed_is_read_as_before_and_finished_later(pictures, place, opened):
    before = held(place)
    gallery = opened(pictures)
    for number in range(30): Image.new("RGB", (40, 40), (number * 8, 255 - number * 8, 99)).save(pictures / f"new_{number}.png")
    gallery.update()
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(pictures), str(place)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    process.stdout.readline()
    start, versions = time.monotonic(), len(os.listdir(place / "pictures.lance" / "_versions"))
    while len(os.listdir(place / "pictures.lance" / "_versions")) < versions + 3 and process.poll() is None and time.monotonic() - start < 120: time.sleep(0.005)
    process.kill()
    process.wait()
    assert process.returncode < 0, "it was done before it could be killed"
    assert held(place) == before and len(opened(place).search(text="a star", k=99)) == len(before)
    gallery.publish(place)
    assert sorted(held(place)) == [found.id for found in gallery.table.select()]


def test_a_copy_that_was_never_finished_is_named_and_finished(pictures, tmp_path, monkeypatch, opened):
    gallery = opened(pictures)
    monkeypatch.setattr(approximate, "_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): gallery.publish(tmp_path / "copy")
    with pytest.raises(PliError, match="never finished"): opened(tmp_path / "copy")
    monkeypatch.undo()
    changes = gallery.publish(tmp_path / "copy")
    assert (changes.added, changes.pictures) == (0, len(gallery)) and len(opened(tmp_path / "copy")) == len(gallery)


def test_rows_that_two_writers_doubled_are_mended(pictures, place, opened):
    table = lancedb.connect(place).open_table("pictures")
    table.add(table.search().where("id < 5").limit(None).to_arrow())
    gallery = opened(pictures)
    paint(pictures / "new.png", "red")
    gallery.update()
    assert gallery.publish(place).pictures == len(gallery) == len(held(place))


def test_a_place_on_disk_is_written_by_one_process_at_a_time(drawn, place, opened):
    from pli.core import claim_lock
    with claim_lock(place / ".lock") as ours:
        assert ours
        with pytest.raises(PliError, match="is at work there"): opened(drawn).publish(place)


@pytest.mark.parametrize("part", ["about.lance/data", "about.lance/_versions", "pictures.lance/data", "pictures.lance/_versions", "pictures.lance"])
@pytest.mark.parametrize("how", ["cut", "noise", "gone"])
def test_a_damaged_copy_is_named_in_one_line(place, part, how, opened):
    for path in list((place / part).rglob("*")):
        if not path.is_file(): continue
        if how == "gone": path.unlink()
        elif how == "cut": path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
    with pytest.raises(PliError, match="copy") as told:
        for hit in opened(place).search(text="a star", k=99): hit.of.gallery.table.thumbnail(hit.picture.id)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def damage(place: Path, how: str) -> None:
    for path in list(place.rglob("*")):
        if not path.is_file(): continue
        if how == "gone": path.unlink()
        elif how == "cut": path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize("part", ["data", "_versions", "", None])
@pytest.mark.parametrize("how", ["cut", "noise", "gone"])
def test_a_damaged_copy_is_made_again_by_publishing(drawn, place, part, how, opened, capfd):
    gallery, before = opened(drawn), [hit.path for hit in opened(place).search(text="a star", k=9)]
    if part is None: shutil.rmtree(place / "pictures.lance")
    else: damage(place / "pictures.lance" / part, how)
    changes = gallery.publish(place)
    assert "was damaged, and is made again" in capfd.readouterr().err and changes.added == changes.pictures == len(gallery)
    copy = opened(place)
    assert [hit.path for hit in copy.search(text="a star", k=9)] == before and copy.table.thumbnail(1) == gallery.table.thumbnail(1)
    assert gallery.publish(place).added == 0 and "damaged" not in capfd.readouterr().err


def test_a_copy_that_does_not_say_whose_it_is_is_made_again_beside_the_gallery_only(pictures, place, opened):
    gallery = opened(pictures)
    gallery.publish()
    before = [hit.path for hit in gallery.search(text="a star", k=9, approximate=True)]
    beside = approximate._copy_beside(gallery)
    for how in ("cut", "noise", "gone"):
        for copy in (beside, place): damage(copy / "about.lance", how)
        with pytest.raises(PliError, match="remove it, and pli index FOLDER makes it again|no copy of a gallery"): gallery.publish(place)
        gallery._copy = None
        assert [hit.path for hit in gallery.search(text="a star", k=9, approximate=True)] == before


def test_days_before_any_file_and_after_all_are_answered_as_in_an_exact_search(both):
    exact, copy = both
    for where in ({"since": "0001"}, {"since": "1600"}, {"since": "1677-09-21"}, {"until": "9999"}, {"until": "2262-04-12"}, {"since": "0001", "until": "9999"}, {"folder": "."}):
        assert len(copy.search(text="a star", where=where, k=99)) == len(exact.search(text="a star", where=where, k=99)) == len(exact)
    for where in ({"until": "0001"}, {"until": "1600"}, {"since": "2300"}, {"since": "9999-12-31"}, {"name": "[z-a]*"}, {"name": "[]"}):
        for one in both:
            with pytest.raises(PliError, match="no picture is left to search: none fits"): one.search(text="a star", where=where)
    with pytest.raises(PliError, match="write them more simply"): copy.search(text="a star", where={"name": "?" * 10**6})


# strangers' copies

def change(place: Path, **facts) -> None:
    "Say something else about a copy."
    table = lancedb.connect(place).open_table("about")
    known = {row["name"]: row["value"] for row in table.to_arrow().to_pylist()} | {name: json.dumps(fact) for name, fact in facts.items()}
    table.add([{"name": name, "value": value} for name, value in known.items()], mode="overwrite")


@pytest.mark.parametrize("facts, words", [({"format": 99}, "format 99"), ({"width": 10**9}, "damaged"), ({"image_mean": [1.0]}, "damaged"), ({"image_mean": "x"}, "damaged"), ({"rows": 7}, "should hold 7"), ({"snapshot": 10**6}, "damaged"),
                                          ({"key": "f" * 16}, "only a model with the same picture tower"), ({"model": "hf-hub:some/body"}, "say with --model"), ({"model": "../elsewhere"}, "say with --model"), ({"pretrained": "/dev/zero"}, "say with --model")])
def test_a_description_that_is_not_ours_is_refused(place, facts, words):
    change(place, **facts)
    with pytest.raises(PliError, match=words): Gallery.open(place)


def test_a_path_that_climbs_out_and_a_feature_that_is_no_number_are_refused(place, opened):
    table = lancedb.connect(place).open_table("pictures")
    rows = table.search().limit(None).to_arrow()
    for name, value, words in (("path", b"../../etc/passwd", "outside its folder"), ("feature", [float("inf")] * 128, "features are damaged|not finite")):
        broken = [row | {name: value} for row in rows.to_pylist()]
        import pyarrow as pa
        table.add(pa.Table.from_pylist(broken, schema=schema_of(128)), mode="overwrite")
        change(place, snapshot=table.version)
        with pytest.raises(PliError, match=words): opened(place).search(text="a star")


def test_a_table_with_other_columns_or_with_code_to_run_is_refused(place, tmp_path):
    import pyarrow as pa
    database = lancedb.connect(place)
    rows = database.open_table("pictures").search().limit(None).to_arrow()
    database.drop_table("pictures")
    said = {b"embedding_functions": json.dumps([{"name": "openai", "model": {}, "source_column": "name", "vector_column": "feature"}]).encode()}
    database.create_table("pictures", rows.replace_schema_metadata(said))
    with pytest.raises(PliError, match="no copy of a gallery"): GalleryCopy(place)
    database.drop_table("pictures")
    database.create_table("pictures", rows.append_column("more", pa.array([1] * len(rows))))
    with pytest.raises(PliError, match="no copy of a gallery"): GalleryCopy(place)


def test_a_place_that_holds_something_else_is_left_alone(drawn, pictures, place, tmp_path, opened):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    paint(pictures / "new.png", "red")
    gallery, other = opened(drawn), opened(pictures)
    other.table.say(uid="f" * 16)
    with pytest.raises(PliError, match="is not empty and holds no copy"): gallery.publish(tmp_path / "full")
    with pytest.raises(PliError, match="is not a folder"): gallery.publish(tmp_path / "full" / "letter.txt")
    with pytest.raises(PliError, match="copy of another gallery"): other.publish(place)
    with pytest.raises(PliError, match="such an address is not known"): gallery.publish("db://some/where")
    assert os.listdir(tmp_path / "full") == ["letter.txt"]
    with pytest.raises(PliError, match="there is no copy"): open_copy(tmp_path / "full")


# the command line

def test_the_command_line_publishes_and_searches(pictures, capfd, tmp_path):
    status, out, err = pli(capfd, "index", pictures, "--approximate", "--publish", tmp_path / "copy")
    assert (status, out) == (0, "") and err.count("40 pictures: ") == 3
    base = ("in red", "--image", pictures / "pair_000001.png", "--k", 5)
    exact = pli(capfd, "search", pictures, *base)[1]
    assert pli(capfd, "search", pictures, *base, "--approximate")[:2] == (0, exact)
    status, out, err = pli(capfd, "search", tmp_path / "copy", *base, "--figure", tmp_path / "hits.png")
    assert (status, out) == (0, exact) and "a copy of 20" in err and Image.open(tmp_path / "hits.png").width > 300
    assert [record["path"] for record in json.loads(pli(capfd, "search", tmp_path / "copy", *base, "--json")[1])] == [line.split()[-1] for line in exact.splitlines()]


@pytest.mark.parametrize("words, told", [(("index", "COPY"), "is a copy of a gallery"), (("search", "COPY", "a", "--copy-to", "x"), "--copy-to needs the pictures"), (("search", "COPY", "a", "--explain", "1"), "--explain needs the pictures"),
                                         (("index", "PICTURES", "--publish", "ftp://a/b"), "such an address is not known"), (("search", "s3://bucket", "a"), "such an address is not known")])
def test_what_a_copy_cannot_do_is_said_before_any_work(pictures, copied, capfd, words, told):
    words = [{"COPY": copied, "PICTURES": pictures}.get(word, word) for word in words]
    status, out, err = pli(capfd, *words)
    assert (status, out) == (1, "") and told in err and err.count("\n") == 1


def test_without_lancedb_the_way_to_install_it_is_said_before_any_work(drawn, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    shutil.copytree(drawn, tmp_path / "bare", ignore=shutil.ignore_patterns(".pli"))
    for words in (("index", tmp_path / "bare", "--approximate"), ("index", tmp_path / "bare", "--publish", "s3://bucket/name"), ("search", tmp_path / "bare", "a star", "--approximate"), ("search", "s3://bucket/name", "a star")):
        status, out, err = pli(capfd, *words)
        assert (status, out) == (1, "") and 'pip install "pli[lance]"' in err and err.count("\n") == 1
    assert not (tmp_path / "bare" / ".pli").exists()


# an object store

@pytest.fixture(scope="module")
def bucket():
    "An S3 server on loopback with an empty bucket."
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true"}.items(): patch.setenv(name, value)
        import boto3
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


def test_an_object_store_from_first_index_to_a_search_after_changes(bucket, pictures, capfd):
    place = f"{bucket}/photos/mine"
    status, out, err = pli(capfd, "index", pictures, "--publish", place)
    assert (status, out) == (0, "") and "40 written" in err
    words = ("in red", "--image", pictures / "pair_000001.png", "--k", 5)
    exact = pli(capfd, "search", pictures, *words)[1]
    assert pli(capfd, "search", place, *words)[:2] == (0, exact)
    paint(pictures / "new.png", "red")
    (pictures / "pair_000002.png").unlink()
    assert "1 written, 1 removed" in pli(capfd, "index", pictures, "--publish", place)[2]
    copy = Gallery.open(place)
    paths = [hit.path for hit in copy.search(text="in red", k=99, composer=None)]
    assert "new.png" in paths and "pair_000002.png" not in paths and len(paths) == 40 and copy.search(text="a star").sheet().width > 300


@pytest.mark.parametrize("place, environment, words", [("s3://nowhere/x", {}, "there is no such bucket"), ("s3://bucket/nothing", {}, "there is no copy of a gallery"), ("s3://bucket/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
                                                       ("s3://bucket/x", {"AWS_ALLOW_HTTP": "false"}, "AWS_ALLOW_HTTP"), ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": None, "AWS_EC2_METADATA_DISABLED": "true"}, "AWS_ACCESS_KEY_ID")])
def test_what_is_wrong_with_an_object_store_is_told_in_one_line(bucket, monkeypatch, capfd, place, environment, words):
    for name, value in environment.items(): monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    status, out, err = pli(capfd, "search", place, "a star")
    assert (status, out) == (1, "") and words in err and err.count("\n") == 1


def test_a_picture_that_a_copy_does_not_hold_is_told(both):
    copy = both[1]
    with pytest.raises(PliError, match="picture 10000000 is not in the copy"): copy.table.picture(10_000_000)
    assert copy.table.several([10_000_000]) == []
