"A gallery when things go wrong: real processes, real files, real small disks."
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pli.backbones import load_backbone
from pli.cli import main
from pli.core import PliError
from pli.gallery.index import Indexing, alone_with, update
from pli.gallery.store import PictureTable

FORK = multiprocessing.get_context("fork")   # a real process, without the seconds that importing torch takes


def picture(path: Path, number: int, size=(40, 30)) -> Path:
    "A picture unlike any other of its number."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(path)
    return path


@pytest.fixture(scope="module")
def backbone(): return load_backbone("pli-tiny-48")


@pytest.fixture()
def folder(tmp_path) -> Path:
    for number in range(10): picture(tmp_path / "photos" / f"{'ab'[number % 2]}" / f"{number}.png", number)
    return tmp_path / "photos"


def pli(capfd, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capfd.readouterr()


def paths(table: PictureTable) -> list[str]: return sorted(found.path for found in table.select("feature IS NOT NULL"))


# two at once

class Child:
    "A forked process that runs a function, which says what it has to say into a pipe; it is killed at the end of the `with`, if it still lives."
    def __init__(self, work, *values):
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=work, args=(other, *values))
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
