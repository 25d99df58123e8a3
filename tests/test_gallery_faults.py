"A gallery when things go wrong: real processes, real files, real small disks."
import contextlib
import csv
import io
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from galleries import backbone, folder, picture  # noqa: F401: fixtures

from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.core import PliError
from pli.gallery.index import Indexing, NewPictures, alone_with, small_picture, update
from pli.gallery.store import SCHEMA, PictureTable, Row, read_vectors

# Real processes, without the seconds that importing torch takes, forked from a server that has never computed: a process that has keeps
# threads (OpenMP's), and what is forked from it waits for them for ever.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pli.cli.main", "pli.gallery.index"])


def pli(capfd, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capfd.readouterr()


def paths(table: PictureTable) -> list[str]: return sorted(found.path for found in table.select("feature IS NOT NULL"))


# two at once

def begin(work, environment: dict, *values) -> None:
    "The server has the environment of its start, not of the test; what is begun by the function begins as it does elsewhere."
    os.environ.update(environment)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    work(*values)


class Child:
    "A process that runs a function, which says what it has to say into a pipe; it is killed at the end of the `with`, if it still lives."
    def __init__(self, work, *values):
        self.pipe, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=begin, args=(work, dict(os.environ), other, *values))
        self.process.start()
        other.close()

    def __enter__(self): return self

    def __exit__(self, *_): self.kill()

    @property
    def pid(self) -> int: return self.process.pid

    def hear(self, seconds: float = 120):
        assert self.pipe.poll(seconds), "nothing was said"
        return self.pipe.recv()

    def kill(self) -> None:
        if self.process.is_alive(): os.kill(self.pid, signal.SIGKILL)
        self.process.join()


def write(pipe, table: Path, folder: Path, workers: int = 0) -> None:
    "Index, and tell how many pictures the model saw."
    backbone = load_backbone("pli-tiny-48")
    with PictureTable(table, create=True) as table:
        pipe.send("ready")
        pipe.recv()
        pipe.send(update(table, folder, backbone, workers=workers, wait=True).encoded)


def hold(pipe, table: Path) -> None:
    "Hold a gallery's lock until something is heard."
    with PictureTable(table) as table, alone_with(table):
        pipe.send("ready")
        pipe.recv()


def holding(folder: Path) -> Child:
    other = Child(hold, next((folder / ".pli").glob("*/gallery.sqlite")))
    assert other.hear() == "ready"
    return other


def test_two_indexers_at_once_share_no_work(tmp_path):
    for number in range(150): picture(tmp_path / "photos" / f"{number}.png", number)
    with Child(write, tmp_path / "gallery.sqlite", tmp_path / "photos") as one, Child(write, tmp_path / "gallery.sqlite", tmp_path / "photos") as other:
        for each in (one, other): assert each.hear() == "ready"
        for each in (one, other): each.pipe.send("go")
        assert sorted([one.hear(), other.hear()]) == [0, 150]


def test_the_second_indexer_waits_with_a_word(folder, backbone, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    picture(folder / "new.png", 50)
    said = []
    with holding(folder) as other, PictureTable(next((folder / ".pli").glob("*/gallery.sqlite"))) as table:
        assert update(table, folder, backbone, wait=True, say=lambda line: (said.append(line), other.pipe.send("go on"))).added == 1
    assert said == [f"process {other.pid} is indexing this folder: waiting until it is done"]


def test_a_search_goes_on_while_another_process_indexes(folder, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    picture(folder / "new.png", 50)
    with holding(folder) as other: status, out, err = pli(capfd, "search", folder, "a cat", "--json")
    assert status == 0 and f"process {other.pid} is indexing this folder" in err and "the 10 pictures that are there are searched" in err
    assert len(json.loads(out)) == 10
    assert len(json.loads(pli(capfd, "search", folder, "a cat", "--json")[1])) == 11


def test_a_killed_indexer_leaves_no_lock(folder, backbone, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    with PictureTable(next((folder / ".pli").glob("*/gallery.sqlite"))) as table:
        with holding(folder) as other:
            with pytest.raises(Indexing, match=f"process {other.pid} is indexing"): update(table, folder, backbone)
            other.kill()
            assert table.path.with_name(".gallery.sqlite.lock").exists()         # the file is left, nobody holds it
            assert update(table, folder, backbone).pictures == 10
        assert not table.path.with_name(".gallery.sqlite.lock").exists()


def children(process: int) -> list[int]: return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to find a process's children")
def test_an_indexer_that_is_killed_takes_its_reading_processes_with_it(tmp_path, backbone):
    "Forked processes inherit what is open; seen: two of them held the lock, and waited to hand over a batch, for ever."
    for number in range(1000): picture(tmp_path / "photos" / f"{number}.png", number)
    with Child(write, tmp_path / "gallery.sqlite", tmp_path / "photos", 2) as other, PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        assert other.hear() == "ready"
        other.pipe.send("go")
        while not len(table): time.sleep(0.02)
        readers = children(other.pid)
        other.kill()
        count = len(table)
        assert len(readers) == 2 and 0 < count < 1000
        assert update(table, tmp_path / "photos", backbone).encoded == 1000 - count          # no lock is left, at once
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{each}").exists() for each in readers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


TORN = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
for i in range(2000): connection.execute("INSERT INTO picture (path, size, changed, content, thumbnail) VALUES (?, 1, 1, ?, ?)", (b"p%d" % i, b"c" * 32, b"z" * 3000))
os.kill(os.getpid(), 9)
"""


def test_a_reader_takes_back_what_a_killed_writer_had_begun(tmp_path, folder, backbone):
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table: update(table, folder, backbone)
    subprocess.run([sys.executable, "-c", TORN, str(table.path)])
    assert (tmp_path / "gallery.sqlite-journal").stat().st_size > 0
    with PictureTable(table.path, writable=False) as table:
        assert len(table) == 10
        with pytest.raises(PliError, match="cannot be written to"): table.say(x=1)


# places that cannot be written to, and disks that end

class mounted:
    "A small disk of its own (tmpfs) at a place; skipped where this system lets nobody mount one."
    def __init__(self, place: Path, size: str): self.place, self.size = place, size

    def __enter__(self) -> Path:
        self.place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.place)], capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode: pytest.skip(f"no disk can be mounted here: {done.stderr.strip() if done else 'no mount'}")
        return self.place

    def grow(self, size: str) -> None: subprocess.run(["mount", "-o", f"remount,size={size}", str(self.place)], check=True)

    def __exit__(self, *_): subprocess.run(["umount", "--lazy", str(self.place)], check=True)


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(tmp_path, backbone):
    for number in range(150): picture(tmp_path / "photos" / f"{number}.png", number)
    with mounted(tmp_path / "disk", "224k") as disk:
        small = disk / "gallery.sqlite"
        with PictureTable(small, create=True) as table:
            with pytest.raises(PliError, match="the disk is full; make room and start again, nothing is lost"): update(table, tmp_path / "photos", backbone)
        with PictureTable(small) as table:
            count = len(paths(table))
            assert 0 < count < 150
            subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
            assert update(table, tmp_path / "photos", backbone).encoded == 150 - count


def test_a_disk_without_room_for_the_matrix_is_searched_all_the_same(tmp_path):
    "Writing to a mapped file on a full disk would end the process with a signal."
    with mounted(tmp_path / "disk", "1m") as disk, PictureTable(disk / "gallery.sqlite", create=True) as table:
        table.put([Row(f"{i}.png".encode(), 1, 1, bytes([i]) * 32, feature=torch.nn.functional.normalize(torch.randn(512), dim=0)) for i in range(200)])
        (disk / "rest").write_bytes(b"x" * (shutil.disk_usage(disk).free - 40_000))
        assert len(read_vectors(table, 512)) == 200
        assert not list(disk.glob("*.npy")) and not list(disk.glob(".*.part"))


def test_a_drive_that_is_away_loses_nothing(tmp_path, backbone):
    folder = tmp_path / "photos"
    for number in range(3): picture(folder / f"{number}.png", number)
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        with mounted(folder / "drive", "2m"):
            for number in range(3, 6): picture(folder / "drive" / f"{number}.png", number)
            assert update(table, folder, backbone).encoded == 6
        changes = update(table, folder, backbone)
        assert len(table) == 6 and "was a drive of its own" in "\n".join(changes.lines())
        assert update(table, folder, backbone, forget=True).removed == 3


def as_nobody(pipe, *words) -> None:
    "Run a command as a user who owns nothing. It runs once before, as who we are: what it imports may lie where nobody may read."
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        cache, os.environ["PLI_CACHE"] = os.environ["PLI_CACHE"], place
        picture(Path(place) / "photos" / "0.png", 0)
        main(["index", str(Path(place) / "photos"), "--model", "pli-tiny-48"])
        os.environ["PLI_CACHE"], _ = cache, "x".encode("utf-8-sig")
    if os.geteuid() == 0: os.setgroups([]), os.setgid(65534), os.setuid(65534)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(io.StringIO()) as told: status = main(list(words))
    pipe.send((status, told.getvalue()))


@pytest.fixture()
def open_place():
    "A folder that every user may enter, and one of its own for somebody else's cache."
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    (place / "cache").mkdir()
    (place / "cache").chmod(0o777)
    yield place
    for path in place.rglob("*"):
        if path.is_dir() and not path.is_symlink(): path.chmod(0o755)
    shutil.rmtree(place)


def test_a_folder_that_cannot_be_written_to_has_its_gallery_in_the_cache(open_place, monkeypatch):
    for number in range(4): picture(open_place / "photos" / f"{number}.png", number)
    (open_place / "photos" / "shut").mkdir()
    shutil.copy(open_place / "photos" / "0.png", open_place / "photos" / "shut" / "x.png")
    (open_place / "photos" / "shut").chmod(0)
    (open_place / "photos").chmod(0o555)
    monkeypatch.setenv("PLI_CACHE", str(open_place / "cache"))
    for told in ("4 added", "nothing new"):
        with Child(as_nobody, "index", str(open_place / "photos"), "--model", "pli-tiny-48") as other: status, err = other.hear()
        assert status == 0 and told in err and "1 folder cannot be read: shut" in err, err
    assert not (open_place / "photos" / ".pli").exists()
    home, = (path for path in (open_place / "cache" / "galleries").iterdir() if path.name != "known")
    with PictureTable(next(home.glob("*/gallery.sqlite"))) as table: assert len(table) == 4


def test_a_gallery_beside_pictures_that_may_only_be_read_is_read_and_not_made_again(open_place, monkeypatch, capfd):
    "As on a shared drive whose owner has indexed it; another model's gallery still goes to the cache."
    for number in range(4): picture(open_place / "photos" / f"{number}.png", number)
    assert pli(capfd, "index", open_place / "photos", "--model", "pli-tiny-48")[0] == 0
    for path in [open_place / "photos", *(open_place / "photos").rglob("*")]: path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("PLI_CACHE", str(open_place / "cache"))
    for words in ([], ["--model", "pli-tiny-48"]):
        with Child(as_nobody, "search", str(open_place / "photos"), "--image", str(open_place / "photos" / "0.png"), *words) as other: status, err = other.hear()
        assert status == 0 and "cannot be written to, so it is searched as it is" in err and "added" not in err, err
    assert not list((open_place / "cache").glob("galleries/*/*/gallery.sqlite"))
    with Child(as_nobody, "index", str(open_place / "photos"), "--model", "pli-tiny-48", "--preprocess", "target-pad") as other: status, err = other.hear()
    assert status == 0 and "4 added" in err and len(list((open_place / "cache").glob("galleries/*/*/gallery.sqlite"))) == 1, err


def test_a_named_place_that_cannot_be_written_to_is_said_before_the_model_has_worked(open_place, monkeypatch):
    for number in range(4): picture(open_place / "photos" / f"{number}.png", number)
    (open_place / "place").mkdir()
    (open_place / "place").chmod(0o555)
    monkeypatch.setenv("PLI_CACHE", str(open_place / "cache"))
    with Child(as_nobody, "index", str(open_place / "photos"), "--model", "pli-tiny-48", "--gallery", str(open_place / "place")) as other: status, err = other.hear()
    assert status == 1 and str(open_place / "place") in err and "--gallery names another place" in err and err.count("\n") == 1, err


# names and times

def test_names_of_every_kind_come_out_as_they_are(tmp_path, capfd):
    folder = tmp_path / "photos"
    names = ["with space.png", "quote'\".png", "comma, \"and\".png", unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png"), "x" * 251 + ".png", "ü" * 125 + "a.png", "new\nline.png", "\x1b[31m.png", "-rf.png", "=1+1.png"]
    for number, name in enumerate(names): picture(folder / name, number)
    os.rename(picture(folder / "odd.png", 50), os.fsencode(folder) + b"/\xff\xfe.png")
    names.append(os.fsdecode(b"\xff\xfe.png"))
    base = ("search", folder, "a cat", "--model", "pli-tiny-48", "--k", 99)
    assert sorted(record["path"] for record in json.loads(pli(capfd, *base, "--json")[1])) == sorted(names)
    assert pli(capfd, *base, "--figure", tmp_path / "hits.csv", "--copy-to", tmp_path / "copies", "--link-to", tmp_path / "links")[0] == 0
    with open(tmp_path / "hits.csv", newline="", encoding="utf-8", errors="surrogateescape") as file: assert sorted(row["path"] for row in csv.DictReader(file)) == sorted(names)
    for place in ("copies", "links"):
        made = sorted((tmp_path / place).iterdir())
        assert len(made) == len(names) and len({path.read_bytes() for path in made}) == len(names)
    status, out, err = pli(capfd, *base)
    assert status == 0 and len(out.splitlines()) == len(names) and "\x1b" not in out + err


def test_a_rename_of_case_only_is_a_move(folder, tmp_path, backbone):
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        update(table, folder, backbone)
        ids = {found.path: found.id for found in table.select()}
        (folder / "a" / "0.png").rename(folder / "a" / "0.PNG")
        (folder / "b").rename(folder / "B")
        changes = update(table, folder, backbone)
        assert (changes.encoded, changes.moved, changes.removed) == (0, 6, 0)
        assert {found.path.lower(): found.id for found in table.select()} == ids


def test_a_clock_that_runs_backwards_hides_no_change(folder, tmp_path, backbone):
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        update(table, folder, backbone)
        for number, nanoseconds in ((0, 0), (2, -10**18), (4, 10**18), (6, 9 * 10**18)):
            picture(folder / "a" / f"{number}.png", 100 + number)
            os.utime(folder / "a" / f"{number}.png", ns=(nanoseconds, nanoseconds))
        assert update(table, folder, backbone).changed == 4 and update(table, folder, backbone).encoded == 0
        assert all(found.date[:2] in ("19", "20", "21", "22") for found in table.select())


def test_a_time_that_cannot_be_is_no_date(tmp_path):
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        table.put([Row(b"a.png", 1, 2**62, b"c" * 32), Row(b"b.png", 1, -2**62, b"c" * 32)])
        assert len([found.date for found in table.select()]) == 2


# memory

def measure(pipe, table: Path, folder: Path) -> None:
    import resource
    with PictureTable(table, create=True) as opened:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        update(opened, folder, load_backbone("pli-tiny-48"))
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
def test_memory_stays_flat_while_indexing(tmp_path):
    "The peak of 2,000 pictures is that of 500, but for a few bytes a name; kept pixels would be 500 kB each."
    grown = {}
    for count in (500, 2000):
        for number in range(count): picture(tmp_path / str(count) / f"{number}.jpg", number, (480, 360), "JPEG")
        with Child(measure, tmp_path / f"{count}.sqlite", tmp_path / str(count)) as other: grown[count] = other.hear(1200)
    assert grown[2000] < grown[500] + 30_000, grown                              # kilobytes


# a stranger's gallery

def test_a_table_that_is_a_link_is_refused(tmp_path):
    PictureTable(tmp_path / "real.sqlite", create=True).close()
    (tmp_path / "gallery.sqlite").symlink_to(tmp_path / "real.sqlite")
    for writable in (True, False):
        with pytest.raises(PliError, match="is not a file but a link"): PictureTable(tmp_path / "gallery.sqlite", writable=writable)
    (tmp_path / "gallery.sqlite").unlink()
    (tmp_path / "gallery.sqlite").symlink_to(tmp_path / "nowhere.sqlite")
    with pytest.raises(PliError, match="is not a file but a link"): PictureTable(tmp_path / "gallery.sqlite", create=True)
    assert not (tmp_path / "nowhere.sqlite").exists()


@pytest.mark.parametrize("name", [".gallery.sqlite.lock", "gallery.sqlite-journal", "gallery.sqlite-wal", "features-1.npy", ".features-1.npy.{pid}.part"])
def test_links_in_a_strangers_gallery_lead_to_no_file_of_ours(folder, tmp_path, backbone, name):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    place = tmp_path / "theirs"
    PictureTable(place / "gallery.sqlite", create=True).close()
    (place / name.format(pid=os.getpid())).symlink_to(victim)
    with contextlib.suppress(PliError), PictureTable(place / "gallery.sqlite") as table:
        update(table, folder, backbone)
        read_vectors(table, 128)
    assert victim.read_text() == "precious"


def journal_that_names(victim: Path, pages: int) -> bytes:
    "A journal as SQLite leaves one after a crash of several databases at once: header, no page, the name of the journal of all."
    magic, name, page = bytes.fromhex("d9d505f920a163d7"), str(victim).encode(), 4096
    head = (magic + struct.pack(">IIIII", 0, 1234, pages, 512, page)).ljust(512, b"\0")
    return head + struct.pack(">I", 0x40000000 // page + 1) + name + struct.pack(">II", len(name), sum(name)) + magic


def test_a_journal_that_names_another_file_deletes_nothing(folder, tmp_path, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    table, victim = next((folder / ".pli").glob("*/gallery.sqlite")), tmp_path / "thesis.txt"
    victim.write_text("precious")
    journal = table.with_name("gallery.sqlite-journal")
    journal.write_bytes(journal_that_names(victim, table.stat().st_size // 4096))
    for words in (("search", folder, "a cat", "--no-index"), ("search", folder, "a cat"), ("gallery", "show", folder), ("gallery", "duplicates", folder)):
        status, out, err = pli(capfd, *words)
        assert status and "gallery.sqlite-journal: names another file, which would be deleted" in err, words
    assert pli(capfd, "gallery", "list")[0] == 0 and victim.read_text() == "precious"
    sqlite3.connect(table).execute("SELECT count(*) FROM picture")               # what it would have done
    assert not victim.exists()


@pytest.mark.parametrize("name", ["gallery.sqlite-journal", "gallery.sqlite-wal", "gallery.sqlite-shm"])
def test_a_pipe_beside_a_table_is_refused_and_not_waited_for(tmp_path, name):
    PictureTable(tmp_path / "gallery.sqlite", create=True).close()
    os.mkfifo(tmp_path / name)
    for writable in (True, False):
        with pytest.raises(PliError, match=f"{name}: is not a file but a pipe"): PictureTable(tmp_path / "gallery.sqlite", writable=writable)


def test_a_table_that_writes_ahead_is_refused(tmp_path):
    PictureTable(tmp_path / "gallery.sqlite", create=True).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "gallery.sqlite")) as other: other.execute("PRAGMA journal_mode = WAL")
    with pytest.raises(PliError, match="writes ahead"): PictureTable(tmp_path / "gallery.sqlite")
    (tmp_path / "gallery.sqlite-wal").write_bytes(b"")
    with pytest.raises(PliError, match="gallery.sqlite-wal: pli makes no such file"): PictureTable(tmp_path / "gallery.sqlite")


def test_an_older_gallery_is_named(tmp_path):
    path = tmp_path / "gallery.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(SCHEMA["about"])
        connection.execute("CREATE TABLE picture (id INTEGER PRIMARY KEY, path TEXT, feature BLOB)")
        connection.execute("INSERT INTO about VALUES ('version', '0')")
    connection.close()
    with pytest.raises(PliError, match="was made by version 0 of the gallery's format, this pli reads 1; remove its folder"): PictureTable(path)


def test_what_a_stranger_calls_a_date_does_not_reach_the_terminal(folder, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    with PictureTable(next((folder / ".pli").glob("*/gallery.sqlite"))) as table:
        table.connection.execute("UPDATE picture SET taken = ?", ("\x1b[31m2024",))
    for way in ((), ("--json",), ("--since", "2020"), ("--by-date",)):
        status, out, err = pli(capfd, "search", folder, "a cat", "--no-index", *way)
        assert status == 1 and "is damaged; remove the gallery's folder" in err and "\x1b" not in out + err


# values of other types: SQLite keeps a value of any type in any column

ASKED = (("search", "a cat", "--no-index"), ("gallery", "show"), ("index",))


def damaged(folder: Path, statement: str, *values) -> Path:
    table = next((folder / ".pli").glob("*/gallery.sqlite"))
    with sqlite3.connect(table) as connection: connection.execute(statement, values)
    connection.close()
    for matrix in table.parent.glob("features-*"): matrix.unlink()
    return table


def told(capfd, folder: Path, *words: str) -> tuple[int, str]:
    "One command over a folder; there is never a traceback, and what stops it is one line that names the gallery."
    command, *rest = words
    before = [command, rest.pop(0), folder] if command == "gallery" else [command, folder]
    status, out, err = pli(capfd, *before, *rest)
    assert "Traceback" not in err, err
    assert status in (0, 1), err
    if status: assert "gallery.sqlite" in err.strip().splitlines()[-1], err
    return status, err


@pytest.mark.parametrize("name, value", [
    ("width", '"wide"'), ("width", "0"), ("width", "1e3"), ("width", "true"), ("width", "64"), ("width", "99999999999"), ("generation", "-1"), ("generation", '"1"'), ("uid", "null"), ("uid", '"../../x"'),
    ("model", "7"), ("model", '["a"]'), ("model", '"a\\u0000b"'), ("pretrained", "{}"), ("preprocess", "3"), ("quick_gelu", "1"), ("root", "5"), ("root", '"\\u0000"'), ("root", '"\\ud800"'), ("root", "{}"), ("drives", "7"),
    ("drives", "[3]"), ("drives", '"abc"'), ("key", "[]"), ("key", '"0123456789abcdef"'), ("updated", "[1]"), ("made", "NaN"), ("features", "[]"), ("id", '"x"'), ("width", "[" * 100_000), ("model", '"' + "a" * 20_000 + '"')])
def test_a_description_with_a_value_of_another_kind_is_named(folder, capfd, name, value):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    damaged(folder, "INSERT INTO about VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", name, value)
    for words in ASKED:
        status, err = told(capfd, folder, *words)
        assert status == 1 and "damaged" in err or words[0] == "gallery" and (name, value) in (("width", "64"), ("key", '"0123456789abcdef"')), (words, err)


def test_endless_and_unreadable_descriptions_are_named(folder, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    for statement in ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 200000) INSERT INTO about SELECT 'a' || x, '1' FROM n",
                      "UPDATE about SET value = CAST(x'ff' AS TEXT) WHERE name = 'model'", "INSERT OR REPLACE INTO about VALUES (x'00', 1)"):
        damaged(folder, statement)
        for words in ASKED: assert told(capfd, folder, *words)[0] in (0, 1)
    assert told(capfd, folder, *ASKED[0])[0] == 1


@pytest.mark.parametrize("change", [
    "path = 'text.png'", "path = 7", "size = 'large'", "changed = x'00'", "changed = 1.5", "content = 'abc'", "content = 9", "width = x'ff'", "height = 'x'", "taken = 5", "taken = 'soon'", "taken = x'00'",
    "broken = x'00'", "broken = CAST(x'ff' AS TEXT)", "taken = CAST(x'ff' AS TEXT)", "thumbnail = 'text'", "thumbnail = 5", "thumbnail = x'ffd8ff'", "feature = 'text'", "feature = 3", "feature = x'00'", "feature = zeroblob(512)"])
def test_a_row_with_a_value_of_another_kind_is_named(folder, tmp_path, capfd, change):
    "Or put right by the next index; a damaged small picture is a grey field."
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    first = sorted(folder.rglob("*.png"))[0]
    damaged(folder, f"UPDATE picture SET {change} WHERE id = 1")
    for words in (("search", "a cat", "--no-index"), ("search", "a cat", "--no-index", "--figure", str(tmp_path / "a.png")), ("search", f"--image={first}", "--no-index", "--explain", "1", f"--figure={tmp_path / 'b.png'}"),
                  ("search", "a cat", "--no-index", "--composer", "product", f"--image={first}"), ("gallery", "show"), ("gallery", "duplicates"), ("index", f"--publish={tmp_path / 'copy'}"), ("search", "a cat")):
        told(capfd, folder, *words)


def test_a_small_picture_that_is_none_or_far_too_large_is_a_grey_field():
    from io import BytesIO
    large, small = BytesIO(), BytesIO()
    Image.new("RGB", (4000, 4000)).save(large, "JPEG")
    Image.new("RGB", (30, 20)).save(small, "JPEG")
    bomb = bytearray(large.getvalue())
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"                # 65,500 pixels on either side
    for data in (None, b"", b"\xff\xd8\xff", small.getvalue()[:-200], large.getvalue(), bytes(bomb), b"GIF89a"): assert small_picture(data) is None
    assert small_picture(small.getvalue()).size == (30, 20)


@pytest.mark.parametrize("how", ["fewer", "other ids", "other features", "not a number", "none"])
def test_a_matrix_that_holds_something_else_is_made_again(folder, tmp_path, backbone, how):
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        update(table, folder, backbone)
        good = read_vectors(table, 128)
        features, ids = good.features.clone(), good.ids.copy()
        path = next(tmp_path.glob("features-*.npy"))
        held = np.load(path)
        if how == "fewer": held = held[:-1]
        elif how == "other ids": held["id"] += 1
        elif how == "other features": held["feature"] = held["feature"][::-1]
        elif how == "not a number": held["feature"][0, 0] = np.nan
        else: held = held[:0]
        np.save(path, held)
        found = read_vectors(table, 128)
        assert torch.equal(found.features, features) and found.ids.tolist() == ids.tolist()
        assert len(np.load(path)) == len(ids)


def test_a_file_that_changes_while_it_is_read_with_size_and_time_kept_is_left_for_the_next_time(folder, tmp_path, backbone):
    first = sorted(folder.rglob("*.png"))[0]
    data, seen = first.read_bytes(), os.stat(first)
    with PictureTable(tmp_path / "gallery.sqlite", create=True) as table:
        def pixels(picture):
            first.write_bytes(data)
            os.utime(first, ns=(seen.st_atime_ns, seen.st_mtime_ns))
            return backbone.pixels(picture)
        read = NewPictures(folder, [(os.fsencode(first.relative_to(folder).as_posix()), seen.st_size, seen.st_mtime_ns)], pixels, table.path)[0]
    assert read.gone == "it changed while it was read"


def test_bytes_in_an_error_of_the_database_that_are_no_text_are_no_traceback(folder, capfd):
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    table = next((folder / ".pli").glob("*/gallery.sqlite"))
    data = bytearray(table.read_bytes())
    place = data.index(b"CREATE TABLE about")
    for at in (place - 1, place + 3, place + 13, place - 20):
        spoilt = bytearray(data)
        spoilt[at] = 0xFF
        table.write_bytes(spoilt)
        for words in ASKED: assert told(capfd, folder, *words)[0] in (0, 1)


@pytest.mark.parametrize("change", ["path = 5", "path = x'2f6574632f706173737764'"])
def test_a_broken_picture_with_an_odd_path_is_named(folder, capfd, change):
    (folder / "bad.png").write_bytes(b"no picture")
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    damaged(folder, f"UPDATE picture SET {change} WHERE broken IS NOT NULL")
    status, out, err = pli(capfd, "search", folder, "a cat", "--no-index")
    assert status == 1 and ("is damaged" in err or "outside its folder" in err) and "Traceback" not in err


def test_hits_are_not_written_over_pictures_or_among_them(folder, tmp_path, capfd):
    first = sorted(folder.rglob("*.png"))[0]
    before = first.read_bytes()
    for place in (first, folder / "hits.png"):
        status, out, err = pli(capfd, "search", folder, "a cat", "--model", "pli-tiny-48", "--figure", place)
        assert status == 1 and "lies in the searched folder" in err and first.read_bytes() == before and not (folder / "hits.png").exists()
    assert pli(capfd, "search", folder, "a cat", "--model", "pli-tiny-48", "--k", "2", "--copy-to", tmp_path / "hits")[0] == 0
    status, out, err = pli(capfd, "search", folder, "a dog", "--model", "pli-tiny-48", "--k", "2", "--copy-to", tmp_path / "hits")
    assert status == 1 and "is not empty" in err and len(list((tmp_path / "hits").iterdir())) == 2


def test_copies_of_the_reference_that_are_left_out_are_said(folder, capfd):
    first = sorted(folder.rglob("*.png"))[0]
    assert pli(capfd, "index", folder, "--model", "pli-tiny-48")[0] == 0
    assert "left out" not in pli(capfd, "search", folder, "--image", first, "--no-index")[2]
    for name in ("one.png", "two.png"): shutil.copy(first, folder / name)
    status, out, err = pli(capfd, "search", folder, "--image", first)
    assert status == 0 and "lies in the gallery 3 times; all of them are left out" in err and "one.png" not in out


def test_the_gallery_of_one_model_can_be_forgotten(folder, capfd):
    for model in ("pli-tiny-48", "pli-tiny-64"): assert pli(capfd, "index", folder, "--model", model)[0] == 0
    status, out, err = pli(capfd, "gallery", "forget", folder, "--model", "ViT-B-32", "--yes")
    assert status == 1 and "pli-tiny-48" in err and len(list((folder / ".pli").glob("*/gallery.sqlite"))) == 2
    assert pli(capfd, "gallery", "forget", folder, "--model", "pli-tiny-64", "--yes")[0] == 0
    assert pli(capfd, "search", folder, "a cat")[0] == 0                                # one is left: no model need be named
