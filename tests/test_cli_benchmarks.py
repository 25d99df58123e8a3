"evaluate, compare, submit, score and cache on the official layouts, as a person types them."
import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import edit, make_circo, make_cirr, make_fashioniq, make_genecis, picture, write
from PIL import Image
from test_cli import ENVIRONMENT, TINY, files, many

import pli.benchmarks.registry
from pli import world
from pli.benchmarks.records import lookup
from pli.benchmarks.registry import BENCHMARKS, benchmark_names, find_reader, protocol_composer, read_benchmark
from pli.cli.main import main, make_parser
from pli.cli.evaluate import with_weight
from pli.core import PliError, rng_for, unit
from pli.evaluation.ranks import Features
from pli.evaluation.report import decode_ranks
from pli.studies.predictions import rankings_of, read_rankings, write_features, write_rankings

MAKERS = {"fashioniq": make_fashioniq, "cirr": make_cirr, "circo": make_circo, "genecis": make_genecis}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    "The four benchmarks, small, in their layouts; a cache of its own."
    folder = tmp_path_factory.mktemp("official")
    for name, make in MAKERS.items(): make(folder / name)
    return folder


def asked(official: Path, name: str, *more) -> list:
    return ["evaluate", "--benchmark", name, "--root", official / name, *TINY, *more]


def test_the_command_knows_the_benchmarks_that_there_are():
    for command in ("evaluate", "score"):
        told = make_parser()._subparsers._group_actions[0].choices[command].format_help()
        assert all(name in told for name in BENCHMARKS)


def test_a_benchmark_that_is_added_is_known_to_the_command_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(BENCHMARKS, "mine", BENCHMARKS["circo"])
    assert make_parser().parse_args(["score", "mine", "--root", "x"]).benchmark == "mine"
    with pytest.raises(SystemExit): make_parser().parse_args(["score", "yours", "--root", "x"])
    assert "invalid choice: 'yours'" in capsys.readouterr().err


SHELF = '''
from dataclasses import replace
from pli.benchmarks.own import read_queries
from pli.benchmarks.protocols import Reader

def read(root, split, protocol):
    asked = read_queries(root / "queries.json", root / "gallery.json")
    return replace(asked, name="shelf", protocol=protocol, without_reference=protocol["reference"] == "left-out")

SHELF = Reader(("",), "", {"reference": ("left-out", "kept")}, {"default": {}, "theirs": {"reference": "kept"}}, read)
NONE = "not a reader"
'''


def test_a_benchmark_of_an_installed_package_is_one_file_and_one_name(tmp_path, monkeypatch, capsys):
    "Without touching a file of this package: read, ranked, scored and told by its name."
    site, root = tmp_path / "site", world.save_world(tmp_path / "world", pairs=4, queries=12, gallery_size=60, size=12)
    about = site / "shelf-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "shelf_benchmark.py").write_text(SHELF)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: shelf\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[pli.benchmarks]\nshelf = shelf_benchmark:SHELF\nnone = shelf_benchmark:NONE\ngone = shelf_benchmark:GONE\n")
    with pytest.raises(PliError, match="'shelf' is unknown; choose from fashioniq, cirr, circo, genecis"): read_benchmark("shelf", root)
    monkeypatch.syspath_prepend(str(site))
    assert benchmark_names() == ("fashioniq", "cirr", "circo", "genecis", "gone", "none", "shelf") and "shelf" not in BENCHMARKS
    asked = read_benchmark("shelf", root, protocol="theirs")
    assert asked.protocol == {"reference": "kept"} and not asked.without_reference and protocol_composer("shelf", "theirs") is None
    with pytest.raises(PliError, match="benchmark gone: shelf_benchmark:GONE cannot be loaded"): find_reader("gone")
    with pytest.raises(PliError, match="benchmark none: the package brings no Reader but a str"): find_reader("none")
    chance = rng_for(0, "features")
    features = Features(unit(torch.randn(len(asked.pictures), 8, generator=chance)), unit(torch.randn(len(asked), 8, generator=chance)))
    write_rankings(tmp_path / "ranked.json", asked, rankings_of(features, asked, "text"))
    score = ["score", "shelf", "--root", str(root), "--predictions", str(tmp_path / "ranked.json")]
    assert main([*score, "--protocol", "theirs"]) == 0 and "shelf" in capsys.readouterr().out
    assert main(score) != 0 and "made by another protocol, reference=kept; here it is reference=left-out" in capsys.readouterr().err
    with pytest.raises(PliError, match="its rankings were made by another protocol"): read_rankings(tmp_path / "ranked.json", read_benchmark("shelf", root))


def test_benchmarks_know_nothing_of_each_other_or_of_the_registry():
    "What is below the registry does not import it, and no benchmark imports another."
    room, own = Path(pli.benchmarks.registry.__file__).parent, ("fashioniq", "cirr", "circo", "genecis")
    for path in room.glob("*.py"):
        imported = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        imported = {name.rsplit(".", 1)[-1] for name in imported if name}
        if path.stem != "registry": assert "registry" not in imported and not {*own} & imported, path
        else: assert {*own} <= imported


def test_every_benchmark_from_pictures_to_four_files(official, tmp_path):
    outs = [word for ending in ("json", "csv", "md", "tex") for word in ("--out", f"new/report.{ending}")]
    done = many([(tmp_path / name, asked(official, name, *outs)) for name in MAKERS if not (tmp_path / name).mkdir()])
    for name, (status, out, err) in zip(MAKERS, done):
        assert (status, err) == (0, ""), name
        found = {path.suffix: path.read_text() for path in (tmp_path / name / "new").iterdir()}
        record = json.loads(found[".json"])
        assert record["benchmark"]["name"] == name and record["model"] == "pli-tiny-48" and record["preprocess"] == "model" and len(record["weights"]) >= 16 and record["command"].startswith("pli evaluate")
        assert list(record["specs"]) == ["image", "text", "sum:0.25"] and record["chosen on"] == "given"
        for section in record["kinds"].values(): assert set(section["halves"]) == {"measure", "composer", "image only", "text only", "solved by one half", "composing adds"}
        for text in (out, *(found[ending] for ending in (".csv", ".md", ".tex"))): assert record["benchmark"]["protocol"] in text.replace("\\_", "_") or ending == ".csv" and csv
        measures = {row["measure"] for row in csv.DictReader(found[".csv"].splitlines())}
        assert measures >= set(next(iter(record["kinds"].values()))["composers"]["image"])
        assert "one half alone solves" in out and "points to the better half" in found[".md"]
    kinds = [list(json.loads((tmp_path / name / "new" / "report.json").read_text())["kinds"]) for name in MAKERS]
    assert kinds == [["mean", "dress", "shirt", "toptee"], ["all"], ["all"], ["mean", "change_attribute", "change_object", "focus_attribute", "focus_object"]]
    assert set(json.loads((tmp_path / "circo" / "new" / "report.json").read_text())["aspects"]) == {"cardinality", "addition", "negation", "viewpoint"}


def test_protocols_and_weights_are_what_is_said(official, tmp_path):
    cases = [asked(official, "fashioniq", "--protocol", "reference=left-out,joining=and,orders=both,gallery=val", "--composer", "sum", "--weight", "0.5", "--composer", "product:2", "--out", "a.json"),
             asked(official, "cirr", "--composer", "sum", "--preprocess", "target-pad", "--no-cache", "--out", "b.json"),
             asked(official, "cirr", "--composer", "sum", "--composer", "image", "--out", "c.json")]
    for status, out, err in many([(tmp_path, case) for case in cases]): assert (status, err) == (0, "")
    one, padded, plain = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json", "c.json"))
    assert list(one["specs"]) == ["image", "text", "sum:0.5", "product:2"] and "gallery=val" in one["benchmark"]["protocol"] and "orders=both" in one["benchmark"]["protocol"]
    assert one["benchmark"]["queries"] == 36 and len(decode_ranks(one, "sum:0.5")) == 36
    assert list(padded["specs"]) == list(plain["specs"]) == ["image", "text", "sum:0.25"] and (padded["preprocess"], plain["preprocess"]) == ("target-pad", "model")
    assert padded["weights"] == plain["weights"]


def test_weights_are_chosen_on_development_splits_only(official, tmp_path):
    cases = [asked(official, "cirr", "--sweep", "--composer", "sum", "--curve", "curve.png", "--out", "cirr.json"), asked(official, "fashioniq", "--split", "train", "--sweep", "--composer", "sum"),
             asked(official, "fashioniq", "--sweep"), asked(official, "genecis", "--sweep"), asked(official, "cirr", "--curve", "no.png"), asked(official, "cirr", "--chosen-on", "all"),
             asked(official, "cirr", "--sweep", "--composer", "sum:1", "--curve", "no.png")]
    done = many([(tmp_path, case) for case in cases])
    assert [status for status, _, _ in done] == [0, 0, 1, 1, 1, 1, 1]
    record = json.loads((tmp_path / "cirr.json").read_text())
    assert list(record["specs"]) == ["image", "text", "sum", "best"] and "sum:4" in done[0][1]
    with Image.open(tmp_path / "curve.png") as image: assert image.width > 300
    assert "fashioniq val is what papers report" in done[2][2] and "genecis is what papers report" in done[3][2].replace("genecis  ", "genecis ")
    assert "--curve draws what --sweep tries" in done[4][2] and "--chosen-on needs --sweep" in done[5][2] and "--curve needs a composer without a weight" in done[6][2]
    assert not (tmp_path / "no.png").exists() and all(err.count("\n") == (status != 0) for status, _, err in done)


@pytest.mark.parametrize("specs, weight, found", [(["sum"], 0.5, ["sum:0.5"]), (["sum", "product:2"], 1, ["sum:1", "product:2"]), (["sum"], None, ["sum"]), ([], None, [])])
def test_a_weight_finds_its_composer(specs, weight, found):
    assert with_weight(specs, weight) == found


@pytest.mark.parametrize("specs, weight", [([], 0.5), (["sum", "product"], 0.5), (["sum:1"], 0.5), (["sum"], -1), (["slerp"], 2), (["image"], 0.5), (["max"], 1)])
def test_a_weight_without_its_composer(specs, weight):
    with pytest.raises(PliError): with_weight(specs, weight)


MISTAKES = [
    (["--benchmark", "cirr", *TINY], "--root is missing: the folder of cirr's official files"),
    (["--queries", "q.json", *TINY], "--queries and --gallery, which go together"),
    ([*TINY], "give --benchmark and --root, or --queries and --gallery"),
    (["--benchmark", "cirr", "--root", ".", "--queries", "q.json", *TINY], "leave out --queries and --gallery"),
    (["--queries", "q.json", "--gallery", "g.json", "--split", "val", *TINY], "--split and --protocol belong to --benchmark"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--split", "test", *TINY], "val"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--split", "test1", *TINY], "pli submit cirr writes the files for it"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--protocol", "loose", *TINY], "loose"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--preprocess", "stretch", *TINY], "stretch"),
    (["--benchmark", "cirr", "--root", "{circo}", *TINY], "cap.rc2.val.json"),
    (["--benchmark", "cirr", "--root", "nowhere", *TINY], "nowhere"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--composer", "max", *TINY], "unknown composer 'max'"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--out", "report.txt", *TINY], "report.txt: a report is written as .json"),
    (["--benchmark", "cirr", "--root", "{cirr}", "--out", ".", *TINY], "is a folder"),
]


def test_every_mistake_is_a_line(official, tmp_path):
    done = many([(tmp_path, ["evaluate", *(str(word).format(cirr=official / "cirr", circo=official / "circo") for word in words)]) for words, _ in MISTAKES])
    for (words, says), (status, out, err) in zip(MISTAKES, done):
        assert status == 1 and out == "" and says in err and err.startswith("pli evaluate: ") and err.count("\n") == 1, words
    assert not files(tmp_path)


def test_missing_pictures_stop_before_any_work_or_are_said_everywhere(official, tmp_path):
    shutil.copytree(official / "fashioniq", tmp_path / "fashioniq")
    gone = sorted((tmp_path / "fashioniq" / "images").glob("Dva*"))[:3]
    for path in gone[:2]: path.unlink()
    gone[2].write_bytes(b"")
    cases = [asked(tmp_path, "fashioniq", "--out", "a.json"), asked(tmp_path, "fashioniq", "--allow-missing", *(word for ending in ("json", "csv", "md", "tex") for word in ("--out", f"b.{ending}")))]
    (status, out, err), (status2, out2, err2) = many([(tmp_path, case) for case in cases])
    assert status == 1 and "--allow-missing" in err and all(path.name in err for path in gone) and err.count("\n") == 1 and not (tmp_path / "a.json").exists()
    assert (status2, err2) == (0, "")
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["benchmark"]["missing"]["pictures"] == 3 == len(record["benchmark"]["missing"]["names"]) and record["benchmark"]["missing"]["queries left out"]["dress"] > 0
    for text in (out2, (tmp_path / "b.md").read_text(), (tmp_path / "b.tex").read_text()): assert "INCOMPLETE: 3 pictures are missing" in text
    assert "3 pictures missing" in (tmp_path / "b.csv").read_text()


def test_what_is_missing_can_be_listed(official, tmp_path):
    shutil.copytree(official / "cirr", tmp_path / "cirr")
    gone = sorted((tmp_path / "cirr" / "dev").iterdir())[:12]
    for path in gone: path.unlink()
    status, out, err = many([(tmp_path, asked(tmp_path, "cirr", "--list-missing", "gone.txt"))])[0]
    assert status == 1 and sorted((tmp_path / "gone.txt").read_text().splitlines()) == sorted(f"dev/{path.name}" for path in gone) and "12 of 60 pictures cannot be used" in err
    status, out, err = many([(tmp_path, ["submit", "cirr", "--root", "cirr", "--split", "val", *TINY, "--out", "sub"])])[0]
    assert status == 1 and "The server wants every query" in err and "--allow-missing" not in err


def test_a_closed_pipe_costs_nothing(official, tmp_path):
    words = " ".join(map(str, asked(official, "cirr", "--out", "x.json")))
    code = f"{sys.executable} -c 'from pli.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))' {words} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=300)
    assert done.stdout.count("\n") == 1 and "Errno" not in done.stderr and (tmp_path / "x.json").exists()


def test_an_unknown_gallery_stops_before_any_work(tmp_path):
    make_circo(tmp_path / "circo", info=False)
    for words in (asked(tmp_path, "circo"), asked(tmp_path, "circo", "--allow-missing"), ["submit", "circo", "--root", "circo", *TINY, "--out", "sub"]):
        status, out, err = many([(tmp_path, words)])[0]
        assert status == 1 and "the list of the pictures that are searched is not there" in err and "image_info_unlabeled2017" in err and not (tmp_path / "sub").exists()


def test_pictures_that_break_only_when_they_are_decoded(official, tmp_path):
    shutil.copytree(official / "cirr", tmp_path / "cirr")
    cut = sorted((tmp_path / "cirr" / "dev").iterdir())[:2]
    for path in cut:
        noise = torch.randint(0, 256, (64, 64, 3), generator=rng_for("noise", path.name)).byte().numpy()
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:6000])                                      # the header is whole
    gone = sorted((tmp_path / "cirr" / "dev").iterdir())[2]
    cases = [asked(tmp_path, "cirr"), asked(tmp_path, "cirr", "--allow-missing", "--out", "two.json"), asked(tmp_path, "cirr", "--allow-missing", "--no-cache", "--out", "three.json", "--list-missing", "three.txt")]
    (status, _, err), (status2, out, err2) = many([(tmp_path, case) for case in cases[:2]])
    assert status == 1 and "2 pictures cannot be used" in err and all(path.name in err for path in cut) and err.count("\n") == 1
    assert (status2, err2) == (0, "") and "INCOMPLETE: 2 pictures are missing" in out
    gone.unlink()
    status, out, err = many([(tmp_path, cases[2])])[0]
    kept = json.loads((tmp_path / "three.json").read_text())["benchmark"]
    assert sorted((tmp_path / "three.txt").read_text().splitlines()) == sorted(f"dev/{path.name}" for path in (*cut, gone))
    assert (status, err) == (0, "") and kept["missing"]["pictures"] == 3 and kept["missing"]["queries of the split"] == {"all": 8} and kept["queries"] + kept["missing"]["queries left out"]["all"] == 8


def test_comparisons_say_what_is_real(official, tmp_path):
    cases = [asked(official, "cirr", "--composer", "sum:0.25", "--out", "a.json"), asked(official, "cirr", "--composer", "sum:4", "--out", "b.json"), asked(official, "fashioniq", "--out", "f.json"),
             ["compare", "a.json", "b.json", "--out", "c.json", "--out", "c.md"], ["compare", "a.json", "a.json", "--composer", "sum:0.25", "image"], ["compare", "a.json", "f.json"],
             ["compare", "half.json", "a.json"], ["compare", "a.json", "c.json"], ["compare", "a.json", "gone.json"], ["compare", "a.json", "a.json", "--composer", "sum:1", "image"], ["compare", "a.json", "a.json"]]
    done = many([(tmp_path, case) for case in cases[:6]])
    record = json.loads((tmp_path / "a.json").read_text())
    record["benchmark"].pop("kinds")
    (tmp_path / "half.json").write_text(json.dumps(record))
    done += many([(tmp_path, case) for case in cases[6:]])
    assert [status for status, _, _ in done] == [0] * 5 + [1] * 5 + [0]
    same = "A and B are the same report and the same composer"
    assert same in done[10][1] and same not in done[4][1] and same not in done[3][1]
    heading = done[3][1].splitlines()
    assert heading[0].startswith("cirr val") and heading[1].startswith("A: a.json (sum:0.25; model pli-tiny-48; pretrained none, random weights; preprocess model; weights ") and heading[2].startswith("B: b.json (sum:4; model pli-tiny-48; ") and "expect about 0.4 to stand out by luck alone" in done[3][1]
    found = json.loads((tmp_path / "c.json").read_text())["comparison"]["all"]
    assert set(found["recall@5"]) == {"difference", "ratio", "verdict", "A", "B"} and len(found) == 8 and "| all | R@1 |" in (tmp_path / "c.md").read_text()
    for err, says in zip((err for _, _, err in done[5:10]), ("not over the same queries", "is not a whole report", "c.json: not a report", "gone.json: no such file", "no composer 'sum:1'; it has image, text, sum:0.25")): assert says in err and err.count("\n") == 1


def test_submissions_and_scores_go_round(official, tmp_path):
    "What is written for the server's val split scores as the evaluation does."
    cases = [asked(official, name, "--composer", "sum:1", "--out", f"{name}.json") for name in ("cirr", "circo")]
    cases += [["submit", name, "--root", official / name, *TINY, "--composer", "sum", "--weight", "1", "--out", f"{name}-{split}", "--split", split] for name, split in (("cirr", "val"), ("circo", "val"))]
    cases += [["submit", name, "--root", official / name, *TINY, "--out", f"{name}-test"] for name in ("cirr", "circo")]
    cases += [["score", "cirr", "--root", official / "cirr", "--predictions", "cirr-val/cirr_val_recall.json", "cirr-val/cirr_val_recall_subset.json", "--out", "scored.json"],
              ["score", "circo", "--root", official / "circo", "--predictions", "circo-val/circo_val.json", "--out", "scored-circo.json"],
              ["score", "cirr", "--root", official / "cirr", "--predictions", "cirr-val/cirr_val_recall.json"], ["compare", "scored.json", "cirr.json"]]
    done = many([(tmp_path, case) for case in cases])
    for (status, out, err), case in zip(done, cases): assert (status, err) == (0, ""), case
    for one, other in (("cirr.json", "scored.json"), ("circo.json", "scored-circo.json")):
        mine, theirs = (json.loads((tmp_path / name).read_text()) for name in (one, other))
        assert mine["kinds"]["all"]["composers"]["sum:1"] == theirs["kinds"]["all"]["composers"]["predictions"] and mine["benchmark"] | {"stated": True} == theirs["benchmark"]
    assert sorted(path.name for path in (tmp_path / "cirr-test").iterdir()) == ["cirr_test1_provenance.json", "cirr_test1_recall.json", "cirr_test1_recall_subset.json"]
    assert sorted(path.name for path in (tmp_path / "circo-test").iterdir()) == ["circo_test.json", "circo_test_provenance.json"]
    assert json.loads((tmp_path / "circo-test" / "circo_test_provenance.json").read_text())["composer"] == "sum:0.25"
    assert "Rs@1" in done[6][1] and "Rs@1" not in done[8][1]                              # without the subset file nothing is said of subsets
    assert "not significant" in done[9][1] and "as stated by whoever scored the file" in done[6][1]


def test_scoring_needs_annotations_and_nothing_else(tmp_path):
    make_genecis(tmp_path / "genecis", pictures=False)
    benchmark = read_benchmark("genecis", tmp_path / "genecis")
    chance = rng_for(0, "features")
    write_features(tmp_path / "q.npz", benchmark.ids, unit(torch.randn(len(benchmark), 8, generator=chance)))
    write_features(tmp_path / "g.safetensors", benchmark.pictures, unit(torch.randn(len(benchmark.pictures), 8, generator=chance)))
    score = ["score", "genecis", "--root", tmp_path / "genecis"]
    cases = [[*score, "--query-features", "q.npz", "--gallery-features", "g.safetensors", "--out", "s.json"], [*score], [*score, "--query-features", "q.npz"],
             [*score, "--predictions", "p.json", "--query-features", "q.npz", "--gallery-features", "g.safetensors"], ["score", "genecis", "--predictions", "p.json"], [*score, "--predictions", "q.npz"]]
    done = many([(tmp_path, case) for case in cases])
    assert [status for status, _, _ in done] == [0, 1, 1, 1, 1, 1] and done[0][2] == ""
    assert json.loads((tmp_path / "s.json").read_text())["kinds"]["mean"]["queries"] == 20
    for err, says in zip((err for _, _, err in done[1:]), ("give either --predictions", "go together", "give either --predictions", "--root is missing", "q.npz")): assert says in err and err.count("\n") == 1


def test_features_are_kept_shown_and_cleared(official, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PLI_CACHE", str(tmp_path / "own"))
    cases = [["cache"], asked(official, "cirr", "--out", "a.json"), ["cache"], asked(official, "cirr", "--out", "b.json"), asked(official, "cirr", "--no-cache", "--out", "c.json"),
             ["cache", "--clear"], ["cache"], asked(official, "cirr", "--cache", "elsewhere", "--out", "d.json")]
    done = many([(tmp_path, case) for case in cases])
    for (status, out, err), case in zip(done, cases): assert (status, err) == (0, ""), case
    assert "nothing" in done[0][1] and "nothing" in done[6][1] and "pli-tiny-48" in done[2][1] and "60" in done[2][1]
    found = [json.loads((tmp_path / f"{name}.json").read_text())["outcomes"] for name in "abcd"]
    assert found[0] == found[1] == found[2] == found[3] and files(tmp_path / "elsewhere")


# ------------------------------------------------------------------ small sets, no answers, lists of what is missing
def own_folder(folder: Path, references, answers=True, names="abcdefg") -> list:
    pictures = [picture(folder / f"{name}.png").name for name in names]
    write(folder / "g.json", pictures)
    records = [{"reference_img_id": pictures[i], "relative_caption": f"word {row}"} | ({"gt_img_ids": [pictures[(i + 1 + row % 2) % len(pictures)]]} if answers else {}) for row, i in enumerate(references)]
    write(folder / "q.json", records)
    return ["evaluate", "--queries", folder / "q.json", "--gallery", folder / "g.json", *TINY, "--no-cache"]


def in_process(capsys, words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_six_queries_about_one_picture_are_reported(tmp_path, capsys):
    status, out, err = in_process(capsys, [*own_folder(tmp_path, [0] * 6), "--out", tmp_path / "r.json"])
    record = json.loads((tmp_path / "r.json").read_text())
    assert (status, err) == (0, "") and "No weight is chosen: all 6 queries have their reference in one half" in out
    assert record["chosen on"] == "given" and record["specs"]["sum"] == ["sum:0.25"] and set(record["specs"]) == {"image", "text", "sum", "slerp", "product", "harris"}
    spread = own_folder(tmp_path, range(6))
    status, out, err = in_process(capsys, spread)
    assert (status, err) == (0, "") and "Only 6 queries: a weight that is chosen on half of them is largely luck" in out


def test_queries_without_answers_are_ranked_and_not_measured(tmp_path, capsys):
    asked = own_folder(tmp_path, range(5), answers=False)
    status, out, err = in_process(capsys, asked)
    assert status == 1 and "names no right answer in 'gt_img_ids' or 'target_img_id'" in err
    status, out, err = in_process(capsys, [*asked, "--rankings", tmp_path / "r.json", "--composer", "sum:0.5"])
    lists = json.loads((tmp_path / "r.json").read_text())["rankings"]
    assert (status, err) == (0, "") and "5 of 5 queries have no known answer: nothing can be measured" in out and "with sum:0.5" in out
    assert [len(set(names)) for names in lists.values()] == [6] * 5 and all("abcdefg"[row] + ".png" not in lists[str(row)] for row in range(5))     # the reference takes no part
    status, out, err = in_process(capsys, [*asked, "--rankings", tmp_path / "r.json", "--out", tmp_path / "x.md"])
    assert status == 1 and "have no known answer, so there is nothing to report" in err and not (tmp_path / "x.md").exists()
    known = own_folder(tmp_path, range(5))
    status, out, err = in_process(capsys, [*known, "--rankings", tmp_path / "k.json", "--composer", "sum:0.5"])
    assert (status, err) == (0, "") and json.loads((tmp_path / "k.json").read_text())["rankings"] == lists and "R@1" in out


@pytest.mark.parametrize("right, said", [('"a.png"', "'a.png' where a list is wanted: write [\"a.png\"]"), ("3", "3 where a list is wanted: write [3]"), ("[]", "names no right answer")])
def test_a_text_where_a_list_is_wanted(tmp_path, capsys, right, said):
    asked = own_folder(tmp_path, range(3))
    edit(tmp_path / "q.json", lambda records: records[1].update(gt_img_ids=json.loads(right)))
    status, out, err = in_process(capsys, asked)
    assert status == 1 and said in err and "record 1" in err and err.count("\n") == 1


def test_a_list_of_what_is_missing_names_cut_bodies_too(tmp_path, capsys):
    root = make_cirr(tmp_path / "cirr")
    gone, cut = sorted((root / "dev").iterdir())[:2]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    asked = ["evaluate", "--benchmark", "cirr", "--root", root, *TINY, "--no-cache", "--list-missing", tmp_path / "missing.txt"]
    status, out, err = in_process(capsys, asked)
    assert status == 1 and "1 more have a good header and cannot be decoded" in err and err.count("\n") == 1
    assert (tmp_path / "missing.txt").read_text().split() == [f"dev/{gone.name}", f"dev/{cut.name}"]


def test_names_that_differ_by_normal_form_alone(tmp_path, capsys):
    asked = own_folder(tmp_path, range(3), names=["b", "gr\u00fcn", "\u00f6l", "d"])
    edit(tmp_path / "q.json", lambda records: json.loads(json.dumps(records, ensure_ascii=False).replace("\u00fc", "u\u0308").replace("\u00f6", "o\u0308")))
    status, out, err = in_process(capsys, asked)
    assert status == 0 and "is written in another Unicode form than in" in err and err.count("\n") == 1
    listed = lookup({"gr\u00fcn": 0}, "split.json")
    assert listed("gru\u0308n", "record 0") == 0 and "record 0" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", [lambda name: f"{int(name):012d}", str, int])
def test_circos_numbers_with_and_without_zeros(tmp_path, capsys, spelling):
    root = make_circo(tmp_path / "circo", pictures=False)
    edit(root / "annotations" / "val.json", lambda records: [record | {"reference_img_id": spelling(record["reference_img_id"]), "target_img_id": spelling(record["target_img_id"]), "gt_img_ids": list(map(spelling, record["gt_img_ids"]))} for record in records])
    benchmark = read_benchmark("circo", root)
    assert benchmark.digest() == read_benchmark("circo", make_circo(tmp_path / "plain", pictures=False)).digest()
    names = list(benchmark.pictures)
    write(tmp_path / "r.json", {query: [spelling(name) for name in names[i:] + names[:i]][:50] for i, query in enumerate(benchmark.ids)})
    write(tmp_path / "plain.json", {query: [int(name) for name in names[i:] + names[:i]][:50] for i, query in enumerate(benchmark.ids)})
    for file in ("r", "plain"): assert in_process(capsys, ["score", "circo", "--root", root, "--predictions", tmp_path / f"{file}.json", "--out", tmp_path / f"{file}-report.json"])[0] == 0
    assert [json.loads((tmp_path / f"{file}-report.json").read_text())["outcomes"] for file in ("r", "plain")][0] == json.loads((tmp_path / "plain-report.json").read_text())["outcomes"]


def test_masked_tuning_on_genecis_composes_as_its_authors(tmp_path, capsys):
    root = make_genecis(tmp_path / "genecis", tasks=("focus_object", "change_object"))
    asked = ["evaluate", "--benchmark", "genecis", "--root", root, "--protocol", "masked-tuning", *TINY, "--cache", tmp_path / "cache"]
    status, out, err = in_process(capsys, [*asked, "--out", tmp_path / "r.json"])
    assert (status, err) == (0, "") and list(json.loads((tmp_path / "r.json").read_text())["specs"]) == ["image", "text", "raw-sum:1"] and "raw-sum" in out
    status, out, err = in_process(capsys, ["evaluate", "--benchmark", "genecis", "--root", root, "--protocol", "pli", *TINY])
    assert status == 1 and "protocol 'pli' is called masked-tuning now" in err
