"pli.core: what strangers wrote is safe to print, what they named is safe to open, and what is written is whole and readable."
import os
import signal
import stat
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pli.core
from pli.core import MissingFile, PliError, atomic, check_writable, first_line, format_bytes, lock_holder, open_regular, pick_device
from pli.core import pluralize, printable, read_json, read_regular, read_sealed, remove_part_files, save_tensors, sealed, write_json

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


# --- printing

@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=300), st.integers(8, 250))
@example("a\x9b31mred\x1b]0;title\x07", 200)
@example("photo\u202egpj.exe \u2066x\u2069 \u200b\u200d\ufeff \u2028\u2029\x85", 200)
@example("\u3164\u2800\u115f" * 80, 200)
@example("\U000e0041\ud800" * 90, 100)
def test_printable_is_one_visible_line_of_bounded_length(text, most):
    seen = printable(text, most)
    assert len(seen) <= most + 3 and len(seen.splitlines()) <= 1
    assert seen.isprintable() and not set(seen) & set("\u3164\u2800\u115f\u1160\uffa0\u034f")
    assert not {unicodedata.category(c) for c in seen} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Cn"}
    assert printable(seen, most + 3) == seen                      # nothing left to disarm
    seen.encode("utf-8")
    if text.isprintable() and text.isascii() and len(text) <= most: assert seen == text


def test_printable_cuts_between_words_and_never_inside_an_escape():
    assert printable("one two three four", 12) == "one two..." and printable("x" * 50, 12) == "x" * 12 + "..."
    assert printable("\x1b" * 99, 10) == "\\x1b" * 2 + "..." and printable("one two", 7) == "one two"
    assert printable("caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600") == "caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600"


def test_first_line_of_an_error():
    assert first_line(ValueError("\n  a \x1b[1m b\nc")) == "a \\x1b[1m b" and first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("Error(s) in loading state_dict for CLIP:\n\tsize mismatch for a\n\tb")) == "Error(s) in loading state_dict for CLIP: size mismatch for a"
    long = first_line(RuntimeError("words " * 100))
    assert len(long) <= 203 and long.endswith("words...")


# --- opening

@needs_pipes
def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path):
    import socket
    os.mkfifo(tmp_path / "pipe"), (tmp_path / "folder").mkdir(), os.symlink("/dev/zero", tmp_path / "endless"), os.symlink("loop", tmp_path / "loop")
    (tmp_path / "a.txt").write_text("fine"), os.symlink("a.txt", tmp_path / "link"), os.symlink(tmp_path / "pipe", tmp_path / "linked pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)                                   # the name of a socket may hold 107 bytes only
        try: server.bind("socket")
        finally: os.chdir(here)
        for name, words in {"pipe": "a pipe, not a file", "linked pipe": "a pipe, not a file", "folder": "a folder, not a file", "endless": "a device, not a file",
                            "socket": "a socket, not a file", "loop": "cannot be read", "gone": "no such file", "a.txt/b": "no such file", "a\0b": "null"}.items():
            for read in (open_regular, read_regular, read_json):
                with pytest.raises(PliError, match=words): read(tmp_path / name)
    with pytest.raises(MissingFile): open_regular(tmp_path / "gone")
    assert read_regular(tmp_path / "link") == b"fine"
    with open_regular(tmp_path / "a.txt") as file: assert file.read() == b"fine" and not os.get_inheritable(file.fileno())


def test_sizes_are_judged_before_and_while_reading(tmp_path):
    with open(tmp_path / "large", "wb") as file: file.truncate(2**40)           # a file of holes: no byte is on the disk
    with pytest.raises(PliError, match="large: holds 1,099,511,627,776 bytes, more than the 1,073,741,824"): read_json(tmp_path / "large")
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(PliError, match="holds 5 bytes, more than the 4"): read_regular(tmp_path / "a", 4)
    if Path("/proc/self/maps").exists():                                        # says that it holds 0 bytes
        with pytest.raises(PliError, match="more than the 10 bytes"): read_regular("/proc/self/maps", 10)


def test_messages_about_foreign_json_are_disarmed(tmp_path):
    path = tmp_path / "a\x1b[31m.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b"1" * 5000):
        path.write_bytes(content)
        with pytest.raises(PliError, match="not valid JSON") as caught: read_json(path)
        assert str(caught.value).isprintable()
    path.unlink()
    with pytest.raises(PliError) as caught: read_json(path)
    assert "\x1b" not in str(caught.value)


# --- writing

@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("mask, wanted", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_new_files_have_the_usual_permissions(tmp_path, mask, wanted):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic(tmp_path / "b.safetensors") as temporary: save_file({"x": torch.zeros(2)}, temporary)
        with atomic(tmp_path / "c.bin") as temporary:
            temporary.write_bytes(b"x")
            temporary.chmod(0o400)                                              # a library with ideas of its own
    finally: os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b.safetensors", "c.bin")] == [wanted] * 3


def test_bytes_reach_the_disk_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    "The order is the promise for a power cut: bytes, name, folder."
    seen, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("name"), replace(a, b)))
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "bytes"), fsync(number)))
    write_json(tmp_path / "a.json", {})
    assert seen == ["bytes", "name", "folder"]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)
    def full(number): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pli.core.os, "fsync", full)
    with pytest.raises(OSError, match="a.json: cannot be written, the disk is full"): write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1 and os.listdir(tmp_path) == ["a.json"]


def test_a_leftover_of_the_same_process_number_is_no_obstacle(tmp_path):
    left = tmp_path / f".a.json.{os.getpid()}.part"
    left.write_text("half"), left.chmod(0o400)
    write_json(tmp_path / "a.json", 1)
    assert read_json(tmp_path / "a.json") == 1 and os.listdir(tmp_path) == ["a.json"]


def test_killed_while_writing(tmp_path):
    "A process that dies inside `atomic` leaves the old file."
    write_json(tmp_path / "a.json", "old")
    code = "import os, sys; from pli.core import atomic\nwith atomic(sys.argv[1]) as t: t.write_text('\"ne'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")]).returncode != 0
    assert read_json(tmp_path / "a.json") == "old"


def test_devices_that_are_not_there():
    with pytest.raises(PliError, match="Try --device auto"): pick_device("abacus\x1b[31m")


def test_tensors_are_written_as_safetensors_reads_them_and_always_alike(tmp_path):
    tensors = {"wide": torch.randn(3, 5, dtype=torch.float64), "flat": torch.tensor([True, False]), "none": torch.zeros(0, 4), "number": torch.tensor(7, dtype=torch.int32),
               "turned": torch.randn(4, 6).half().T, "short": torch.randn(3).bfloat16(), "bytes": torch.arange(9, dtype=torch.uint8)}
    about = {"z": "caf\u00e9", "a": "2", "m": '{"x": 1}'}
    save_tensors(tmp_path / "a.safetensors", tensors, about)
    save_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), about)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file: assert file.metadata() == about
    with pytest.raises(PliError, match="c.safetensors: tensor 'odd' holds torch.complex64"): save_tensors(tmp_path / "c.safetensors", {"odd": torch.zeros(1, dtype=torch.complex64)})
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes")
def test_dying_in_a_write_leaves_nothing_that_stays(tmp_path):
    "The kernel ends the process in the middle of a tensor; who writes the file next takes its leftovers away, whatever they are called."
    code = ("import resource, signal, sys, torch; from pli.core import save_tensors; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); save_tensors(sys.argv[1], {'x': torch.zeros(9999)})")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors")]).returncode == -signal.SIGXFSZ and len(os.listdir(tmp_path)) == 1
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(9)})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_only_what_nobody_writes_is_swept(tmp_path):
    for name in (".a.json.1.part", ".b.json.1.part", ".a.json.part", "a.part", ".a.json.x.part"): (tmp_path / name).write_text("half")
    with atomic(tmp_path / "c.json") as temporary:
        temporary.write_text("1")
        code = "import sys; from pathlib import Path; from pli.core import remove_part_files; remove_part_files(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)               # another process, which sees the lock
        assert temporary.exists()
    assert sorted(os.listdir(tmp_path)) == [".a.json.part", ".a.json.x.part", "a.part", "c.json"]
    remove_part_files(tmp_path / "nowhere")


def test_every_flipped_bit_of_a_sealed_record_is_noticed_or_says_the_same(tmp_path):
    path, record = tmp_path / "a.json", {"steps": 8, "text": "caf\u00e9", "list": [0.1, True, None]}
    write_json(path, sealed(record))
    good, noticed = path.read_bytes(), 0
    for place in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1:])
            try: found = read_sealed(path, "remove it")
            except PliError as error: noticed += str(error).endswith("remove it") and "\n" not in str(error)
            else: assert found == record or {key: found.get(key) for key in record} == record     # white space, or the name of the digest
    assert noticed > 0.9 * 8 * len(good)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert lock_holder(tmp_path / ".lock") == "another process"


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setattr(pli.core.os, "fstat", lambda number: os.stat_result((*os.stat(tmp_path / "a")[:6], 2, 0, 0, 0)))
    assert read_regular(tmp_path / "a", sys.maxsize - 1) == b"12345"


def test_a_folder_that_is_removed_during_a_write_is_named(tmp_path):
    with pytest.raises(PliError, match="a.json: its folder was removed or replaced while it was written"):
        with atomic(tmp_path / "new" / "a.json") as temporary:
            temporary.write_text("1")
            (tmp_path / "new").rename(tmp_path / "old")


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 1}', '[{"deep": {"a\\u001b": 1, "a\\u001b": 2}}]'])
def test_an_entry_that_is_there_twice_is_told(tmp_path, text):
    "Python's own json takes the last of them without a word."
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(PliError, match=r"record.json: the entry 'a.*' is there twice; which one is meant") as caught: read_json(tmp_path / "record.json")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("make, words", [(lambda path: os.mkfifo(path), "a pipe"), (lambda path: path.symlink_to("/dev/null"), "a device"), (lambda path: path.mkdir(), "a folder")])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make, words):
    "A process with the rights to do so would put a file in the place of /dev/null."
    path = tmp_path / "out.txt"
    make(path)
    before = os.lstat(path)
    with pytest.raises(PliError, match=f"out.txt: is {words} and would be replaced"), atomic(path): raise AssertionError("begun")
    with pytest.raises(PliError, match="would be replaced"), atomic("/dev/pli-test"): raise AssertionError("begun")
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode) and os.listdir(tmp_path) == ["out.txt"]


def test_a_large_object_with_one_name_twice_is_told_soon():
    "Looking every name up among all others would take hours here."
    from pli.core import unique_entries
    with pytest.raises(PliError, match="the entry '199999' is there twice"): unique_entries([(str(number), 0) for number in range(200_000)] + [("199999", 1)])


def test_a_place_is_tried_before_long_work(tmp_path):
    "What could be written is told from what could not, and nothing stays behind."
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for good in (tmp_path / "new", tmp_path / "file", tmp_path / "a" / "b" / "new"): check_writable(good)
    check_writable(tmp_path / "a" / "b", folder=True)
    check_writable(tmp_path, folder=True)
    for bad, folder in ((tmp_path, False), (tmp_path / "file" / "new", False), (tmp_path / "file", True), (tmp_path / "loop", True), (tmp_path / ("x" * 300), False), ("a\0b", False), ("/proc/new" if sys.platform == "linux" else tmp_path, False)):
        with pytest.raises(PliError, match="cannot be written|is a folder"): check_writable(bad, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_bytes_that_are_no_text_are_written_as_json_can(tmp_path):
    write_json(tmp_path / "names.json", ["bad\udcff", "ü"])
    assert (tmp_path / "names.json").read_bytes() == '[\n "bad\\udcff",\n "ü"\n]\n'.encode() and read_json(tmp_path / "names.json") == ["bad\udcff", "ü"]


def test_one_is_not_several_and_a_small_size_is_not_nothing():
    assert [pluralize(number, "picture") for number in (0, 1, 2000)] == ["0 pictures", "1 picture", "2,000 pictures"]
    assert [pluralize(number, "gallery is", "galleries are") for number in (1, 2)] == ["1 gallery is", "2 galleries are"]
    assert [format_bytes(count) for count in (0, 1, 999, 1000, 39_600, 999_499, 999_500, 605e6, 999_949_999, 999_950_000)] == [
        "0 bytes", "1 byte", "999 bytes", "1 kB", "40 kB", "999 kB", "1.0 MB", "605.0 MB", "999.9 MB", "1.0 GB"]
