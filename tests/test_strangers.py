"What strangers wrote, in every field of every file that a command reads: nothing of it reaches a terminal or a page as anything but text."
import copy
import json
import re
from pathlib import Path

import pytest
from layouts import add_pairs, make_circo, make_cirr, make_fashioniq, picture, write
from test_cli import TINY

from pli.benchmarks.registry import read_benchmark
from pli.cli.main import main
from pli.evaluation.writers import format_markdown, code_span, escape_markdown

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e`</td>|<script>alert(1)</script>&\nsecond line"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")           # tabs and line ends apart


def harmless(text: str, page: bool = False) -> None:
    found = RAW.search(text)
    assert not found, (hex(ord(found[0])), text[max(0, found.start() - 80) : found.end() + 20])
    if page:
        outside = re.sub(r"```.*?```", "", text, flags=re.S)
        assert "<script" not in outside and "</td>" not in outside


def run(capsys, *words) -> tuple[int, str, str]:
    try: status = main([str(word) for word in words])
    except SystemExit as stopped: status = stopped.code
    out, err = capsys.readouterr()
    for text in (out, err): harmless(text)
    assert status == 0 or err.count("\n") == 1, (words, err)
    return status, out, err


def look(folder: Path) -> int:
    "Every text file below a folder; how many there are."
    files = [path for path in folder.rglob("*") if path.suffix in (".md", ".json", ".csv", ".tex", ".txt", ".jsonl")]
    for path in files: harmless(path.read_text(encoding="utf-8").replace("\t", " "), page=path.suffix == ".md")
    return len(files)


def leaves(value, path=()):
    "The way to every string in a record, keys of objects included."
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key), True
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value[:3]): yield from leaves(part, (*path, i))
    elif isinstance(value, str): yield path, False


def spoiled(record, path: tuple, key: bool):
    "A copy in which one string, or the name of one entry, is hostile."
    record = copy.deepcopy(record)
    part = record
    for step in path[:-1]: part = part[step]
    if key: part[EVIL] = part.pop(path[-1])
    else: part[path[-1]] = EVIL
    return record


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    "Four pictures and eight queries of two kinds, one of them hostile, with a report in every format."
    folder = tmp_path_factory.mktemp("own")
    names = [picture(folder / f"{name}.png").name for name in "abcdef"]
    write(folder / "gallery.json", names)
    write(folder / "queries.json", [{"reference_img_id": names[i % 6], "relative_caption": EVIL if i == 1 else f"word {i}", "gt_img_ids": [names[(i + 1) % 6]], "kind": EVIL if i % 2 else "plain", "id": EVIL if i == 3 else i} for i in range(8)])
    return folder


def test_markup():
    assert escape_markdown("a <b> & `c` | d") == "a &lt;b&gt; &amp; &#96;c&#96; \\| d" and escape_markdown("x\ny\x1b") == "x\\ny\\x1b"
    assert escape_markdown("![t](http://x) [a][b] [c]: d") == "![t&#93;(http://x) [a&#93;[b] [c&#93;: d" and escape_markdown("2.9 [2.3, 3.5] (3)") == "2.9 [2.3, 3.5] (3)"
    assert format_markdown(["`a`"], [["<"]], code=True).split("\n")[::2] == ["| `a` |", "| &lt; |"] and format_markdown(["`a`"], []).startswith("| &#96;a&#96; |")
    assert code_span("pli score") == "`pli score`" and code_span("a`b") == "a&#96;b"


def test_evaluate_with_hostile_queries(own, tmp_path, capsys):
    outs = [word for ending in ("json", "csv", "md", "tex") for word in ("--out", tmp_path / "out" / f"report.{ending}")]
    asked = ["evaluate", "--queries", own / "queries.json", "--gallery", own / "gallery.json", *TINY, "--no-cache", *outs]
    assert run(capsys, *asked, "--sweep")[0] == 0 and look(tmp_path / "out") == 4
    assert run(capsys, *asked, "--chosen-on", "neither")[0] == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["benchmark"]["kinds"]["names"] == ["plain", EVIL]
    for name in ("queries", "gallery"):
        record = json.loads((own / f"{name}.json").read_text())
        for path, key in list(leaves(record))[:9]:
            write(tmp_path / f"{name}.json", spoiled(record, path, key))
            files = {"queries": own / "queries.json", "gallery": own / "gallery.json"} | {name: tmp_path / f"{name}.json"}
            status, _, err = run(capsys, "evaluate", "--queries", files["queries"], "--gallery", files["gallery"], "--root", own, *TINY, "--no-cache", "--composer", "sum:1", *outs)
            assert status == 0 or err, path
    look(tmp_path / "out")


def test_compare_with_hostile_reports(own, tmp_path, capsys):
    asked = ["evaluate", "--queries", own / "queries.json", "--gallery", own / "gallery.json", *TINY, "--no-cache", "--composer", "sum:1", "--out", tmp_path / "a.json"]
    assert run(capsys, *asked)[0] == 0
    record = json.loads((tmp_path / "a.json").read_text())
    record["benchmark"]["missing"] = {"pictures": 1, "names": ["x"], "queries left out": {"plain": 1}, "queries of the split": {"plain": 5}}
    record["bounds"] = {}
    write(tmp_path / "a.json", record)
    outs, worked, count = ["--out", tmp_path / "c.md", "--out", tmp_path / "c.json"], 0, 0
    for path, key in leaves(record):
        if path[0] in ("machine", "versions") and len(path) > 1 and not key: continue
        write(tmp_path / "b.json", spoiled(record, path, key))
        for one, other in (("b.json", "b.json"), ("a.json", "b.json")):
            worked += run(capsys, "compare", tmp_path / one, tmp_path / other, *outs)[0] == 0
            harmless((tmp_path / "c.md").read_text(), page=True)
            harmless((tmp_path / "c.json").read_text())
            count += 1
    assert count > 60 and worked > 20


@pytest.mark.parametrize("name", ["cirr", "circo", "fashioniq"])
def test_score_and_submit_with_hostile_files(name, tmp_path, capsys):
    root = {"cirr": make_cirr, "circo": make_circo, "fashioniq": make_fashioniq}[name](tmp_path / name, pictures=False)
    if name == "fashioniq": add_pairs(root)
    benchmark = read_benchmark(name, root)
    lists = {query: [other for other in benchmark.pictures if other != benchmark.pictures[reference]] for query, reference in zip(benchmark.ids, benchmark.references.tolist())}
    record = {"format": "pli-rankings-1", "benchmark": name, "split": "val", "protocol": dict(benchmark.protocol), "about": "x", "rankings": lists}
    outs = [word for ending in ("json", "csv", "md", "tex") for word in ("--out", tmp_path / "out" / f"report.{ending}")]
    for path, key in list(leaves(record))[:9]:
        write(tmp_path / "r.json", spoiled(record, path, key))
        run(capsys, "score", name, "--root", root, "--predictions", tmp_path / "r.json", *outs)
    for file in sorted(path for path in root.rglob("*") if path.is_file() and ("val" in path.name or "image_info" in path.name)):
        before = file.read_text()
        if file.suffix == ".txt": changed = [EVIL, before.replace(";", f";{EVIL}", 1), before.replace("/", EVIL, 1), before.replace(" \n", f"{EVIL};x \n", 1)]
        else:
            said = json.loads(before)
            changed = [json.dumps(spoiled(said, *where)) for where in list(leaves(said))[:9]]
        for text in changed:
            file.write_text(text)
            protocol = ["--protocol", "masked-tuning"] if file.suffix == ".txt" else []
            run(capsys, "score", name, "--root", root, "--predictions", tmp_path / "r.json", *protocol, *outs)
        if name != "fashioniq": run(capsys, "submit", name, "--root", root, "--split", "val", "--composer", "sum:1", "--out", tmp_path / "out", *TINY, "--no-cache", "--list-missing", tmp_path / "out" / "missing.txt")
        file.write_text(before)
    if (tmp_path / "out").exists(): look(tmp_path / "out")


def test_cache_with_a_hostile_model_file(tmp_path, capsys):
    (tmp_path / "0123456789abcdef").mkdir()
    about = {"model": "m", "precision": "float32", "made": "today", "transform": {"name": "model"}}
    for path, key in leaves(about):
        write(tmp_path / "0123456789abcdef" / "model.json", spoiled(about, path, key))
        assert run(capsys, "cache", "--cache", tmp_path)[0] == 0
    run(capsys, "cache", "--cache", tmp_path, "--clear", EVIL)


def test_study_report_with_hostile_results(tmp_path, capsys):
    studies = (path.parent for path in sorted(Path(__file__).parent.parent.glob("results/study/*/queries.json")))
    source = min(studies, key=lambda folder: sum(path.stat().st_size for path in folder.iterdir()))     # the page is made once for every value spoilt
    plan = Path(__file__).parent.parent / "studies" / f"{source.name}.toml"
    results = sorted(source.rglob("*.json"))
    chosen = [source / "queries.json", next(path for path in results if path.name not in ("queries.json", "report.json"))]
    folder = tmp_path / "study"
    for path in results:
        if path.name != "report.json": (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True); (folder / path.relative_to(source)).write_bytes(path.read_bytes())
    for file in chosen:
        target, before = folder / file.relative_to(source), json.loads(file.read_text())
        ways = [where for where in leaves(before) if len(where[0]) <= 2]
        for path, key in ways[:: max(1, len(ways) // 8)]:
            write(target, spoiled(before, path, key))
            run(capsys, "study", plan, "--out", folder, "--report")
        write(target, before)
    look(folder)
