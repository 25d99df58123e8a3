"The demo through the command line: fair arms, a page that stands alone and says what the numbers say, a run that survives being killed."
import base64
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pli.backbones.loading import load_backbone
from pli.cli.main import main
from pli.core import folder_lock
from pli.demo import ARMS, WORLDS, DemoSettings, arm_settings, command_of, measure_arms, on_weights, page, quick, sentence_on, draw_world_data, sums_by_weight, table_rows
from pli.evaluation.compare import compare
from pli.evaluation.ranks import all_composers
from pli.evaluation.writers import halves_line
from pli.evaluation.report import decode_ranks
from pli.metrics import recall_at
from pli.settings import TuneSettings
from pli.viz.style import Drawing

START = [sys.executable, "-c", "from pli.cli.main import main; import sys; sys.exit(main())", "demo", "--quick", "--device", "cpu", "--out"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SPARSE, FULL = WORLDS


def strict(path: Path) -> dict:
    "JSON as the standard has it: NaN and Infinity are no numbers."
    def refuse(word): raise AssertionError(f"{path} holds {word}")
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "A quick demo from beginning to end."
    folder = tmp_path_factory.mktemp("demo") / "whole"
    done = subprocess.run([*START, folder], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    (folder.parent / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def results(whole) -> dict:
    return strict(whole / "results.json")


class Page(HTMLParser):
    "Reads a page, complains about tags that are not closed in order, keeps tables, paragraphs, pictures."
    VOID = {"meta", "img", "br", "hr", "link", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.marked, self.words = [], set(), [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID: self.open.append(tag)
        if tag == "table": self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
            if ("class", "won") in attributes: self.marked.append(len(self.tables) - 1)
        if tag in ("td", "th"): self.tables[-1][-1].append("")

    def handle_endtag(self, tag): assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        if where in ("td", "th"): self.tables[-1][-1][-1] += data
        self.words[where] = self.words.get(where, "") + " " + data


# --- what is there

def test_the_files_are_there(whole):
    assert sorted(path.name for path in whole.iterdir()) == ["figures", "model", "pictures", "report.html", "results.json", "runs", "start"]
    assert sorted(path.stem for path in (whole / "figures").iterdir()) == ["bars", "curves", "losses", "masks", "neighbours"]
    for path in (whole / "figures").iterdir():
        with Image.open(path) as image: assert image.format == "PNG" and min(image.size) > 200
    assert not list(whole.rglob("*.part"))
    mine, last = (load_file(folder / "open_clip_model.safetensors") for folder in (whole / "model", whole / "runs" / SPARSE.replace(" ", "-") / "masked-tuning" / "last"))
    assert all(torch.equal(value, last[name]) for name, value in mine.items())
    assert load_backbone(str(whole / "model")).grid == (6, 6)


def test_the_page_stands_alone(whole):
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">")
    assert "://" not in text and "url(" not in text and "@import" not in text
    seen = Page(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "svg"}
    assert not [name for _, name, _ in seen.attributes if name in ("href", "srcset", "style") or name.startswith("on")]
    sources = [value for _, name, value in seen.attributes if name == "src"]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources: Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))).verify()
    assert all(value for tag, name, value in seen.attributes if (tag, name) == ("img", "alt"))
    assert len([name for tag, name, _ in seen.attributes if (tag, name) == ("img", "alt")]) == 4


def test_the_page_shows_what_the_results_hold(whole, results):
    seen = Page((whole / "report.html").read_text(encoding="utf-8"))
    worlds = results["worlds"]
    assert seen.tables == [[worlds[name]["table"]["heading"], *worlds[name]["table"]["rows"]] for name in WORLDS]
    for name in WORLDS:
        for sentence in worlds[name]["sentences"]: assert sentence in seen.words["p"]
    assert worlds[SPARSE]["halves"] in seen.words["p"] and on_weights(results["sums by weight"]) in seen.words["figcaption"]
    assert results["provenance"]["command"] == "pli demo --seed 0 --quick" and "pli demo --seed 0 --quick" in seen.words["code"]
    assert "its numbers mean nothing" in seen.words["p"] and not results["continued"]
    said = (whole.parent / "said.txt").read_text()
    for name in WORLDS: assert all(cell in said for row in worlds[name]["table"]["rows"] for cell in row) and all(sentence in said for sentence in worlds[name]["sentences"])


def test_every_number_follows_from_the_ranks(results):
    for name in WORLDS:
        found = results["worlds"][name]
        assert table_rows(found["reports"]) == (found["table"]["heading"], found["table"]["rows"])
        for (arm, record), row in zip(found["reports"].items(), found["table"]["rows"]):
            assert row[0] == arm and row[1] == record["specs"]["best"][0] and len(decode_ranks(record)) == results["settings"]["queries"]
            for k, cell in zip((1, 5, 10), row[2:]): assert float(cell.split()[0]) == pytest.approx(100 * recall_at(decode_ranks(record).rank, k).mean().item(), abs=0.051)
        for k in (1, 5, 10): assert found["masked tuning against control"][f"recall@{k}"] == compare(found["reports"]["masked tuning"], found["reports"]["control"], f"recall@{k}")
        assert found["sentences"] == [sentence_on(found["masked tuning against control"][f"recall@{k}"], k) for k in (1, 10)]
        assert found["halves"] == halves_line(found["reports"]["masked tuning"]["kinds"]["all"]["halves"])


# --- fair arms

def test_the_arms_differ_in_the_objective_only(whole, results):
    runs = {(name, arm): strict(whole / "runs" / name.replace(" ", "-") / arm.replace(" ", "-") / "run.json") for name in WORLDS for arm in ARMS}
    for name in WORLDS:
        start, control, masked = (runs[name, arm] for arm in ARMS)
        assert {key for key, value in control["settings"].items() if value != masked["settings"][key]} == {"objective", "hide"}
        assert (control["settings"]["objective"], control["settings"]["hide"]) == ("clip", "none") and (masked["settings"]["objective"], masked["settings"]["hide"]) == ("masked", "random:0.75")
        assert control["start"] == masked["start"] != start["start"] and start["pairs"] == control["pairs"] == masked["pairs"] == results["settings"]["pairs"]
        for arm in ("control", "masked-tuning"):
            log = (whole / "runs" / name.replace(" ", "-") / arm / "log.jsonl").read_text().splitlines()
            assert len(log) == results["settings"]["then"]["steps"]
    for arm in ARMS: assert runs[SPARSE, arm]["settings"] == runs[FULL, arm]["settings"]


@pytest.mark.parametrize("settings", [DemoSettings(seed=5), quick(DemoSettings(hide="mix:0.5"))])
def test_settings_of_the_arms(settings):
    arms = arm_settings(settings)
    assert list(arms) == ["control", "masked tuning"] and arms["masked tuning"].hide == settings.hide
    for field in dataclasses.fields(TuneSettings):
        one, other = (getattr(arm, field.name) for arm in arms.values())
        assert (one == other) == (field.name not in ("objective", "hide"))
    assert arms["control"].seed == settings.seed and arms["control"].steps == settings.then.steps and arms["control"].learning_rate == settings.then.learning_rate


def test_all_models_are_offered_the_same_composers(whole, results, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                       # as in the process that made the results
    try:
        stage = draw_world_data(WORLDS[SPARSE], quick(DemoSettings()))
        models = {arm: load_backbone(str(whole / "runs" / SPARSE.replace(" ", "-") / arm.replace(" ", "-") / "last")) for arm in ARMS}
        reports, tables, features = measure_arms(stage, models)
    finally: torch.set_num_threads(threads)
    assert all(list(table) == all_composers() for table in tables.values())
    families = list(dict.fromkeys(spec.split(":")[0] for spec in all_composers())) + ["best"]
    assert all(list(record["specs"]) == families and all(len(specs) == 1 for specs in record["specs"].values()) for record in reports.values())
    assert json.loads(json.dumps(reports)) == results["worlds"][SPARSE]["reports"]      # the saved models give the stored results again
    assert sums_by_weight(tables) == results["sums by weight"]
    for arm, record in reports.items(): assert torch.equal(decode_ranks(record).rank, tables[arm][record["specs"]["best"][0]].rank)


@pytest.mark.parametrize("name", WORLDS)
def test_no_picture_of_a_gallery_is_learned_from(name):
    settings = dataclasses.replace(DemoSettings(seed=3), pairs=4000, queries=100, gallery=800)
    stage = draw_world_data(WORLDS[name], settings)
    as_set = lambda pixels: {picture.numpy().tobytes() for picture in pixels}
    learned = as_set(stage.pairs.pixels)
    assert len(stage.pairs) == 4000 and len(learned) > 3000
    for part in ("dev", "test"):
        assert len(stage.pixels[part]) == len(stage.queries[part].galleries[0]) == 800 and len(stage.queries[part]) == 100
        assert not learned & as_set(stage.pixels[part])
    asked = [{(tuple(stage.attributes[part][reference].tolist()), text) for reference, text in zip(stage.queries[part].references, stage.queries[part].texts)} for part in ("dev", "test")]
    assert len(asked[0] & asked[1]) <= 2                           # weights are chosen on other queries
    again = draw_world_data(WORLDS[name], settings)
    assert torch.equal(again.pairs.pixels, stage.pairs.pixels) and again.pairs.captions == stage.pairs.captions


# --- words that follow numbers

@pytest.mark.parametrize("difference, ratio, says", [
    ([10.0, 8.0, 12.0], [2.0, 1.8, 2.2], "At 10, masked tuning reaches 2.0 times the control's recall (+10.0 points [+8.0, +12.0])."),
    ([10.0, 0.1, 12.0], None, "At 10, masked tuning finds right answers where the control finds none (+10.0 points [+0.1, +12.0])."),
    ([10.0, 0.0, 20.0], [2.0, 1.0, None], "At 10, no difference between masked tuning and the control can be told (+10.0 points [+0.0, +20.0])."),
    ([-1.0, -3.0, 1.0], [0.9, 0.7, 1.1], "At 10, no difference between masked tuning and the control can be told (-1.0 points [-3.0, +1.0])."),
    ([-3.0, -4.0, -1.0], [0.9, 0.8, 0.95], "At 10, masked tuning is below the control (-3.0 points [-4.0, -1.0])."),
])
def test_sentences(difference, ratio, says): assert sentence_on({"difference": difference, "ratio": ratio}, 10) == says


def test_the_caption_on_weights():
    curves = {"start": {"1": 5.0}, "control": {"0.5": 10.0, "1": 12.5}, "masked tuning": {"0.5": 20.0, "1": 30.0}}
    assert on_weights(curves) == "No weight brings the control above 12.5; masked tuning reaches 30.0."
    assert on_weights(curves | {"control": {"1": 30.0}}) == "At its best weight the control reaches 30.0, masked tuning 30.0."


@pytest.mark.parametrize("low, high, marked", [(1.0, 9.0, [0]), (-1.0, 9.0, []), (-9.0, -1.0, [])])
def test_the_row_stands_out_only_where_it_won(results, low, high, marked):
    changed = json.loads(json.dumps(results))
    changed["worlds"][SPARSE]["masked tuning against control"]["recall@10"]["difference"] = [(low + high) / 2, low, high]
    changed["worlds"][SPARSE]["sentences"] = ["<b>A & B</b> \"c\""]
    changed["settings"]["hide"], changed["provenance"]["command"], changed["continued"] = "mix:0.5", "pli demo", True
    figures = {name: Drawing(figsize=(1, 1)) for name in ("neighbours", "masks", "curves", "bars")}
    seen = Page(page(changed, figures))
    assert seen.marked == marked and "<b>A & B</b> \"c\"" in seen.words["p"]               # words are words, not tags
    assert "takes something from the picture (here: mix:0.5)" in seen.words["p"] and "three quarters of the picture" not in seen.words["p"]
    assert "mean nothing" not in seen.words["p"] and "since it was continued" in seen.words["p"]


def test_the_command_is_what_to_type():
    assert command_of(DemoSettings()) == "pli demo --seed 0" and command_of(quick(DemoSettings(seed=4))) == "pli demo --seed 4 --quick"
    assert "other settings" in command_of(DemoSettings(hide="mix:0.5")) and "pli demo" not in command_of(DemoSettings(pairs=7))


# --- killed, continued, not mixed up

def test_a_killed_demo_goes_on_to_the_same_worlds(whole, results):
    folder = whole.parent / "killed"
    with subprocess.Popen([*START, folder], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as running:
        for line in running.stdout:
            if line.startswith("control: step 2/4"): running.send_signal(signal.SIGKILL); break
        running.stdout.read()
    assert running.returncode == -signal.SIGKILL and not (folder / "results.json").exists() and not (folder / "report.html").exists()
    done = subprocess.run([*START, folder], capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "start: continuing at step 6 of 6" in done.stdout
    again = strict(folder / "results.json")
    assert again["continued"] and "since it was continued" in (folder / "report.html").read_text()
    for name in ("worlds", "settings", "sums by weight"): assert again[name] == results[name]


def test_another_demo_does_not_go_on_here(whole, capsys):
    files = lambda: {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}     # a lock that comes and goes changes its folder
    before = files()
    assert main(["demo", "--quick", "--seed", "1", "--device", "cpu", "--out", str(whole)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pli demo: ") and "holds another run (" in error and "seed was 0, now 1" in error and error.count("\n") == 1
    assert files() == before


def test_two_demos_in_one_folder(tmp_path, capsys):
    with folder_lock(tmp_path / "demo"): assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 1
    said = capsys.readouterr().err
    assert said == f"pli demo: {tmp_path / 'demo'}: process {os.getpid()} is at work there; wait until it is done, or choose another folder\n" and not list((tmp_path / "demo").iterdir())
