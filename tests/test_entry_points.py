"Packages of somebody else's that are broken, take a name that is taken, or bring something else: each door says which, and others stay open."
from pathlib import Path

import pytest
import torch

from pli.backbones.loading import load_backbone
from pli.backbones.registry import loader_of
from pli.benchmarks.registry import benchmark_names, find_reader
from pli.core import PliError
from pli.data.pairs import read_pairs
from pli.data.registry import pair_readers
from pli.methods.masked import MaskedTuning
from pli.methods.method import options_of
from pli.methods.registry import METHODS, check_method, method_named
from pli.settings import TuneSettings

BODIES = {                                    # what a module of a stranger's does when it is imported
    "missing": "import no_such_module_anywhere\n",
    "syntax": "def (:\n",
    "ends": "raise SystemExit(3)\n",
    "raises": "raise ValueError('a\\x1b[31mb')\n",
    "empty": "",
    "number": "thing = 3\n",
    "asks": "class thing:\n    def __init__(self, more): pass\n",
    "fails": "class thing:\n    def __init__(self): raise RuntimeError('boom')\n",
    "returns": "def thing(*all, **more): return 5\n",
    "throws": "def thing(*all, **more): return 1 / 0\n",
}
GROUPS = ("pli.methods", "pli.backbones", "pli.benchmarks", "pli.pairs")


@pytest.fixture
def bring(tmp_path, monkeypatch):
    "Install a package: `bring(package, module text, {group: name})`."
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(package: str, body: str, brings: dict[str, str]) -> Path:
        (site / f"{package}.py").write_text(body)
        about = site / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {package}:thing\n" for group, name in brings.items()))
        return site
    return put


@pytest.mark.parametrize("how", BODIES)
def test_a_broken_package_is_named_at_every_door_and_closes_no_other(how, bring, tmp_path):
    name = f"stranger{how}"
    bring(name, BODIES[how], dict.fromkeys(GROUPS, name))
    for door in (lambda: check_method(TuneSettings(objective=name)), lambda: load_backbone(f"{name}:x"), lambda: find_reader(name), pair_readers):
        with pytest.raises(PliError, match=name) as raised: door()
        assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value)
    assert check_method(TuneSettings()) is METHODS["masked"] and find_reader("cirr") and loader_of("ViT-B-32") is None
    (tmp_path / "a.csv").write_text("image,caption\na.png,red\n")
    found = read_pairs(tmp_path / "a.csv", check=False)                    # a table is read all the same, and says who was not asked
    assert found.captions == ("red",) and name in " ".join(found.notes) and "not asked" in " ".join(found.notes)
    (tmp_path / "a.other").write_text("")
    with pytest.raises(PliError, match=name): read_pairs(tmp_path / "a.other")


def test_a_name_for_two_is_refused_when_it_is_asked_for(bring, tmp_path):
    own = {"pli.methods": "masked", "pli.benchmarks": "cirr", "pli.pairs": ".csv", "pli.backbones": "hf-hub"}
    bring("taker", "thing = 3\n", own)
    for door in (lambda: check_method(TuneSettings()), lambda: find_reader("cirr"), pair_readers, lambda: load_backbone("hf-hub:a/b")):
        with pytest.raises(PliError, match="pli has one of that name, and an installed package brings another .taker:thing.; which is meant"): door()
    assert check_method(TuneSettings(objective="clip")).name == "clip" and find_reader("circo") and loader_of("ViT-B-32") is None
    for package in ("first", "second"): bring(package, "thing = 3\n", {"pli.methods": "both", "pli.backbones": "both", "pli.benchmarks": "both"})
    for door in (lambda: method_named("both"), lambda: load_backbone("both:a"), lambda: find_reader("both")):
        with pytest.raises(PliError, match="several installed packages bring that name .first:thing and second:thing"): door()


def test_names_of_strangers_are_fit_for_a_terminal(bring, tmp_path):
    bring("loud", "thing = 3\n", {group: "ev\x1b[31mil" for group in GROUPS})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "backbone.json").write_text('{"kind": "none"}')
    for door in (lambda: method_named("nobody"), lambda: find_reader("nobody"), lambda: load_backbone(tmp_path / "model"), pair_readers):
        with pytest.raises(PliError) as raised: door()
        assert "\x1b" not in str(raised.value) and "ev\\x1b[31mil" in str(raised.value)
    assert "\x1b" not in "".join(benchmark_names())


@pytest.mark.parametrize("kind", ("3", '["a"]', '{"a": 1}', "null"))
def test_a_kind_that_is_no_word_is_refused(kind, tmp_path):
    (tmp_path / "backbone.json").write_text(f'{{"kind": {kind}}}')
    with pytest.raises(PliError, match="names the kind"): load_backbone(tmp_path)


def test_another_kind_of_model_takes_no_option_in_silence(bring):
    bring("other", "import toy_backbone\nthing = toy_backbone.load\n", {"pli.backbones": "other"})
    assert load_backbone("other:small").preprocess == "model"
    with pytest.raises(PliError, match="prepare pictures as model, not as target-pad"): load_backbone("other:small", preprocess="target-pad")
    with pytest.raises(PliError, match="quick_gelu"): load_backbone("other:small", quick_gelu=True)


def test_a_reader_of_pairs_that_yields_something_else_is_told(bring, tmp_path):
    body = "from pli.data.tables import PairReader\nthing = PairReader(lambda *all: [('a.png', 'red')], lambda path: path.suffix == '.odd')\n"
    bring("odd", body, {"pli.pairs": "odd"})
    (tmp_path / "a.odd").write_text("")
    with pytest.raises(PliError, match="a.odd: its reader yields a tuple, not a Record"): read_pairs(tmp_path / "a.odd", check=False)
    bring("worse", "from pli.data.tables import PairReader\nthing = PairReader(None, lambda path: 1 / 0)\n", {"pli.pairs": "worse"})
    with pytest.raises(PliError, match="pair source worse: cannot tell whether it reads .*ZeroDivisionError"): read_pairs(tmp_path / "a.odd", check=False)


class Optional(MaskedTuning):
    name, options = "optional", {"layers": 2, "dropout": 0.1, "deep": False, "start": "a"}


@pytest.mark.parametrize("said", ("layers=2, layers=3", "dropout=nan", "dropout=inf", "dropout=1e400", "layers=", "layers", "layers=2.5", "deep=1", "=1", "width=1"))
def test_options_that_say_nothing_or_two_things_are_refused(said):
    with pytest.raises(PliError, match="options"): options_of(Optional(), TuneSettings(options=said))


def test_options_are_read_by_their_kinds():
    assert options_of(Optional(), TuneSettings(options=" layers = 3 ,deep=True,start=b=c, ")) == {"layers": 3, "dropout": 0.1, "deep": True, "start": "b=c"}
    odd = type("Odd", (MaskedTuning,), {"name": "odd", "options": {"sizes": [1]}})()
    with pytest.raises(PliError, match="options sizes: the objective odd gives it a default of type list"): options_of(odd, TuneSettings())


def test_a_run_goes_on_with_the_same_kind_of_model_only():
    "A package's model may compute otherwise with the same weights: its description is part of what a run is; pli's own models say all in weights."
    from pli.data.batches import TensorPairs
    from pli.training.identity import differences, run_record
    from toy_backbone import Toy
    pairs = TensorPairs(torch.zeros(8, 3, 48, 48, dtype=torch.uint8), ["a"] * 8)
    one, two, changed = Toy("toy-a", 0), Toy("toy-a", 0), Toy("toy-a", 0)
    changed.description = lambda: Toy.description(changed) | {"preprocess": "another"}
    record = lambda backbone: run_record(backbone, pairs, TuneSettings())
    assert record(one) == record(two) and differences(record(one), record(changed)) == [("backbone", record(one)["backbone"], record(changed)["backbone"])]
    assert "backbone" not in record(load_backbone("pli-tiny-48"))


METHOD = """from pli.methods.masked import MaskedTuning
class thing(MaskedTuning):
    name, options = "theirs", {"layers": %d}
%s"""


def test_a_run_goes_on_with_the_same_method_only(bring, tmp_path, monkeypatch):
    "The defaults and the code of a package's method are part of what a run is; a run from before that was recorded goes on."
    import importlib
    import json
    import sys
    from pli.core import read_sealed, sealed, write_json
    from pli.methods import registry
    from pli.studies.data import code_digest
    from pli.studies.plan import Arm
    from pli.studies.results import code_of
    from pli.training.identity import claim_folder, method_record
    site, settings = bring("theirs", METHOD % (2, ""), {"pli.methods": "theirs"}), TuneSettings(objective="theirs")
    folder, said = tmp_path / "run", []

    def claim(code, settings=settings):
        (site / "theirs.py").write_text(code)
        sys.modules.pop("theirs", None); importlib.invalidate_caches(); registry._installed_method.cache_clear()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return claim_folder(folder, {"settings": json.loads(json.dumps(vars(settings))), "threads": 1} | method_record(settings), say=said.append)

    claim(METHOD % (2, ""))
    assert read_sealed(folder / "run.json", "")["method options"] == {"layers": 2} and not claim(METHOD % (2, ""))
    for changed, words in ((METHOD % (3, ""), "method options was"), (METHOD % (2, "    more = 1\n"), "method code was")):
        with pytest.raises(PliError, match=words): claim(changed)
    assert {code_of(Arm("mine", TuneSettings())), code_of(None)} == {code_digest()}
    assert code_of(Arm("theirs", settings)) == f"{code_digest()}+{method_record(settings)['method code']}"
    old = {key: value for key, value in read_sealed(folder / "run.json", "").items() if not key.startswith("method ")}
    write_json(folder / "run.json", sealed(old))
    assert not claim(METHOD % (3, "")) and not method_record(TuneSettings())
    sys.modules.pop("theirs", None); registry._installed_method.cache_clear()
