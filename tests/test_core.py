"pli.core: what strangers wrote is safe to print, what they named is safe to open, and what is written is whole and readable."
import os
import stat
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import pli.core
from pli.core import MissingFile, PliError, atomic, first_line, open_regular, pick_device, read_json, read_regular, shown, write_json

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


# --- printing

@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=300), st.integers(8, 250))
@example("a\x9b31mred\x1b]0;title\x07", 200)
@example("photo\u202egpj.exe \u2066x\u2069 \u200b\u200d\ufeff \u2028\u2029\x85", 200)
@example("\u3164\u2800\u115f" * 80, 200)
@example("\U000e0041\ud800" * 90, 100)
def test_shown_is_one_visible_line_of_bounded_length(text, most):
    seen = shown(text, most)
    assert len(seen) <= most + 3 and len(seen.splitlines()) <= 1
    assert seen.isprintable() and not set(seen) & set("\u3164\u2800\u115f\u1160\uffa0\u034f")
    assert not {unicodedata.category(c) for c in seen} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Cn"}
    assert shown(seen, most + 3) == seen                      # nothing left to disarm
    seen.encode("utf-8")
    if text.isprintable() and text.isascii() and len(text) <= most: assert seen == text


def test_shown_cuts_between_words_and_never_inside_an_escape():
    assert shown("one two three four", 12) == "one two..." and shown("x" * 50, 12) == "x" * 12 + "..."
    assert shown("\x1b" * 99, 10) == "\\x1b" * 2 + "..." and shown("one two", 7) == "one two"
    assert shown("caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600") == "caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600"


def test_first_line_of_an_error():
    assert first_line(ValueError("\n  a \x1b[1m b\nc")) == "a \\x1b[1m b" and first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("Error(s) in loading state_dict for CLIP:\n\tsize mismatch for a\n\tb")) == "Error(s) in loading state_dict for CLIP: size mismatch for a"
    long = first_line(RuntimeError("words " * 100))
    assert len(long) <= 203 and long.endswith("words...")


def test_shown_stays_importable_where_it_was():
    import pli.data
    assert pli.data.shown is shown and pli.data.first_line is first_line


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
