"Ranking files and feature files: every rule, every fault, and the way out and in again."
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from layouts import add_pairs, make_circo, make_cirr, make_fashioniq, make_genecis
from safetensors.torch import save_file

from pli.benchmarks.circo import with_gallery
from pli.benchmarks.registry import read_benchmark
from pli.benchmarks.shape import Benchmark, Missing, Scoring, own_queries
from pli.core import PliError, rng_for, unit
from pli.evaluation.ranks import Features, rank_queries, measure_queries
from pli.metrics import ABSENT
from pli.studies.predictions import SERVERS, Form, Rankings, check_submission, form_for_reading, load_ranking_file, named_features, names_in_lists, pad_rows, rank_members, rankings_of, ranks_from_features, ranks_in_lists, read_features, read_rankings, write_features, write_rankings, write_submission

QUERIES, PICTURES = 12, 70


def drawn_features(benchmark, width=24, seed=0):
    "Random unit features for every picture and query."
    luck = rng_for(seed, "features of", benchmark.name)
    return Features(unit(torch.randn(len(benchmark.pictures), width, generator=luck)), unit(torch.randn(len(benchmark), width, generator=luck)))


@pytest.fixture
def cirr():
    "Twelve queries over seventy pictures, six look-alikes each, the reference left out."
    drawn = torch.rand(QUERIES, PICTURES, generator=rng_for("cirr")).argsort(1)[:, :6]
    rules = Scoring(("recall@1", "recall@5", "recall@10", "recall@50", "subset recall@1", "subset recall@2", "subset recall@3", "mean(recall@5, subset recall@1)"), "recall@1", "recall@5")
    return Benchmark("cirr", "val", {"reference": "left-out"}, rules, tuple(str(100 + i) for i in range(QUERIES)), (("in red",),) * QUERIES, drawn[:, 0],
                     tuple((a,) for a in drawn[:, 1].tolist()), ("all",) * QUERIES, tuple(f"dev-{i}-0-img0" for i in range(PICTURES)), (torch.arange(PICTURES),),
                     torch.zeros(QUERIES, dtype=torch.int64), subsets=tuple(map(tuple, drawn[:, 1:].tolist())))


@pytest.fixture
def circo():
    "Twelve queries over seventy numbered pictures, up to four right answers each, the reference kept."
    drawn = torch.rand(QUERIES, PICTURES, generator=rng_for("circo")).argsort(1)[:, :6].tolist()
    rules = Scoring(("mAP@5", "mAP@10", "mAP@25", "mAP@50", "recall@5", "recall@50"), "mAP@5", "recall@10", main_only=True, aspects_measure="mAP@10")
    return Benchmark("circo", "val", {"reference": "kept"}, rules, tuple(map(str, range(QUERIES))), (("in red",),) * QUERIES, torch.tensor([row[0] for row in drawn]),
                     tuple(tuple(row[1:2 + i % 4]) for i, row in enumerate(drawn)), ("all",) * QUERIES, tuple(str(7 + 13 * i) for i in range(PICTURES)), (torch.arange(PICTURES),),
                     torch.zeros(QUERIES, dtype=torch.int64), without_reference=False)


@pytest.fixture
def galleries():
    "Five queries, each with a small gallery of its own, as in GeneCIS."
    numbers = torch.arange(5)
    return Benchmark("genecis", "", {}, Scoring(("recall@1", "recall@2", "recall@3"), "recall@1", "recall@1", mean_of_categories=True), tuple(f"focus_object-{i}" for i in range(5)), (("red",),) * 5,
                     numbers * 8, tuple((i * 8 + 1,) for i in range(5)), ("focus_object",) * 5, tuple(map(str, range(1000, 1040))),
                     tuple(torch.arange(i * 8 + 1, i * 8 + 4 + i % 3) for i in range(5)), numbers)


def told(problem, path, benchmark):
    "The one line with which reading is refused."
    with pytest.raises(PliError) as refusal: read_rankings(path, benchmark)
    line = str(refusal.value)
    assert "\n" not in line and str(path) in line
    assert re.search(problem, line), line
    return line


def put(path, what):
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


def plain(benchmark, **entries):
    "A plain record that lists everything that each query ranks."
    lists = names_in_lists(rankings_of(drawn_features(benchmark), benchmark, "text", k=len(benchmark.pictures)).lists, benchmark)
    return {"format": "pli-rankings-1", "benchmark": benchmark.name, "split": benchmark.split, "rankings": dict(zip(benchmark.ids, lists))} | entries


# --- rankings ---------------------------------------------------------------------------------------------------------

def test_ranking_is_the_order_of_the_scores(cirr):
    features = drawn_features(cirr)
    found = rankings_of(features, cirr, "text", k=50)
    for row in range(QUERIES):
        scores = features.pictures @ features.texts[row]
        order = [i for i in scores.argsort(descending=True).tolist() if i != cirr.references[row]]
        assert found.lists[row].tolist() == order[:50]
        assert found.subset[row].tolist() == [i for i in order if i in cirr.subsets[row]]


def test_ranking_lists_the_reference_where_the_protocol_keeps_it(circo):
    found = rankings_of(drawn_features(circo), circo, "image", k=5)
    assert torch.equal(found.lists[:, 0], circo.references) and found.subset is None


def test_longer_than_the_gallery(galleries):
    found = rankings_of(drawn_features(galleries), galleries, "text")
    for row, gallery in enumerate(galleries.galleries):
        listed = found.lists[row][found.lists[row] >= 0]
        assert sorted(listed.tolist()) == gallery.tolist()
        assert (found.lists[row][len(listed):] == -1).all()


def test_equal_scores_keep_the_order_of_the_gallery(cirr):
    flat = Features(torch.ones(PICTURES, 4), torch.ones(QUERIES, 4))
    found = rankings_of(flat, cirr, "text", k=20)
    for row in range(QUERIES): assert found.lists[row].tolist() == [i for i in range(PICTURES) if i != cirr.references[row]][:20]
    assert found.subset.tolist() == [list(row) for row in cirr.subsets]


def test_among_leaves_gaps_at_the_end():
    scores, gallery = torch.tensor([[0.1, 0.9, -5.0], [0.3, 0.2, 0.1]]), torch.tensor([4, 7, 9])
    assert rank_members(torch.tensor([[4, 9, 7], [9, -1, 4]]), gallery, scores).tolist() == [[7, 4, 9], [4, 9, -1]]


def test_no_gallery_no_ranking(circo):
    with pytest.raises(PliError, match="circo val: the list of the pictures that are searched is not there.*unlabeled list"):
        rankings_of(drawn_features(circo), replace(circo, complete=False, source="download the unlabeled list"), "text")


def test_padded_odd_shapes():
    assert pad_rows([]).shape == (0, 0) and pad_rows([(), ()]).shape == (2, 0)
    assert pad_rows([(), (3,)]).tolist() == [[-1], [3]]


# --- files for the servers ----------------------------------------------------------------------------------------------

def test_submission_files(cirr, circo, tmp_path):
    ours = rankings_of(drawn_features(cirr), cirr, "sum:1")
    main, few = write_submission(replace(cirr, split="test1"), ours, tmp_path / "new" / "folder")
    assert (main.name, few.name) == ("cirr_test1_recall.json", "cirr_test1_recall_subset.json")
    record, small = (json.loads(path.read_text()) for path in (main, few))
    assert (record.pop("version"), record.pop("metric")) == ("rc2", "recall") and (small.pop("version"), small.pop("metric")) == ("rc2", "recall_subset")
    assert list(record) == list(small) == list(cirr.ids)
    for row, query in enumerate(cirr.ids):
        reference = cirr.pictures[cirr.references[row]]
        assert len(set(record[query])) == 50 and reference not in record[query]
        assert len(set(small[query])) == 3 and {cirr.pictures.index(name) for name in small[query]} <= set(cirr.subsets[row])
    (path,) = write_submission(circo, rankings_of(drawn_features(circo), circo, "text"), tmp_path)
    assert path.name == "circo_val.json"
    assert all(len(set(numbers)) == 50 and all(type(i) is int for i in numbers) for numbers in json.loads(path.read_text()).values())
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


SPOILT = {  # what is done to a good CIRR file -> what is said about it
    "no longer JSON": (lambda r: json.dumps(r)[:-40], "not valid JSON"),
    "a list": (lambda r: [r], "it holds a list"),
    "wrong version": (lambda r: r | {"version": "rc1"}, r"the entries have to be .*rc2.*here they are version: 'rc1', metric: 'recall'"),
    "no metric": (lambda r: {k: v for k, v in r.items() if k != "metric"}, "metric: None"),
    "a query lacks": (lambda r: {k: v for k, v in r.items() if k != "103"}, "1 of the 12 queries are missing: 103"),
    "a query too many": (lambda r: r | {"9": r["100"]}, "1 of its 13 queries are not in cirr val: 9"),
    "a query twice": (lambda r: json.dumps(r)[:-1] + ', "100": []}', "the entry '100' is there twice"),
    "too short": (lambda r: r | {"104": r["104"][:49]}, "query '104': the list has length 49, and 50 pictures are wanted"),
    "too long": (lambda r: r | {"104": r["104"] + [further(r["104"])]}, "query '104': the list has length 51, and 50 pictures are wanted"),
    "doubles": (lambda r: r | {"105": r["105"][:49] + r["105"][:1]}, r"query '105': 'dev-\d+-0-img0' is listed twice, first at place 1"),
    "unknown": (lambda r: r | {"106": r["106"][:49] + ["dev-1\n2"]}, r"query '106': 'dev-1\\+n2' is no picture of this benchmark; its names look like 'dev-0-0-img0'"),
    "no list": (lambda r: r | {"107": {"0": "x"}}, "query '107': not a list of pictures but a dict"),
    "numbers": (lambda r: r | {"108": [7, *r["108"][1:]]}, "query '108': place 1 is not a picture's name but 7"),
    "nothing": (lambda r: r | {"109": r["109"][:49] + [None]}, "query '109': place 50 is not a picture's name but None"),
    "large": (lambda r: json.dumps(r) + " " * 5_000_000, r"the file has 5,0\d\d,\d\d\d bytes, and the server takes 5,000,000"),
}


def further(names):
    "A picture that is not listed yet."
    return next(name for name in (f"dev-{i}-0-img0" for i in range(PICTURES)) if name not in names)


@pytest.mark.parametrize("what", SPOILT)
def test_every_rule_of_cirr(cirr, tmp_path, what):
    spoil, problem = SPOILT[what]
    path, _ = write_submission(cirr, rankings_of(drawn_features(cirr), cirr, "sum:1"), tmp_path)
    assert check_submission(path, cirr) == []
    wrong = check_submission(put(path, spoil(json.loads(path.read_text()))), cirr)
    assert len(wrong) == 1 and "\n" not in wrong[0] and re.search(problem, wrong[0]), wrong


def test_the_reference_is_never_listed(cirr, tmp_path):
    kept = replace(cirr, without_reference=False, protocol={"reference": "kept"})      # a protocol may keep it, the server does not
    with pytest.raises(PliError, match=r"cirr_val_recall.json is not written: query '100': the reference 'dev-\d+-0-img0' is listed, and it takes no part \(and 11 more\)"):
        write_submission(kept, rankings_of(drawn_features(cirr), kept, "image"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_subset_holds_look_alikes_only(cirr, tmp_path):
    _, path = write_submission(cirr, rankings_of(drawn_features(cirr), cirr, "sum:1"), tmp_path)
    record = json.loads(path.read_text())
    stranger = next(i for i in range(PICTURES) if i not in cirr.subsets[0] and i != cirr.references[0])
    assert check_submission(put(path, record | {"100": record["100"][:2] + [cirr.pictures[stranger]]}), cirr) == [f"query '100': '{cirr.pictures[stranger]}' is not one of the 5 pictures that are ranked here"]
    assert "the reference" in check_submission(put(path, record | {"100": record["100"][:2] + [cirr.pictures[cirr.references[0]]]}), cirr)[0]
    assert "the list has length 4, and 3 pictures are wanted" in check_submission(put(path, record | {"100": [cirr.pictures[i] for i in cirr.subsets[0][:4]]}), cirr)[0]


def test_every_broken_rule_is_listed(cirr, tmp_path):
    path, _ = write_submission(cirr, rankings_of(drawn_features(cirr), cirr, "sum:1"), tmp_path)
    record = json.loads(path.read_text())
    record |= {"100": record["100"][:10] + record["100"][:1], "101": "dev-1-0-img0", "77": []}
    del record["110"]
    assert len(check_submission(put(path, record), cirr)) == 5                   # 77 unknown, 110 missing, 100 doubles and is short, 101 is no list


def test_every_rule_of_circo(circo, tmp_path):
    (path,) = write_submission(circo, rankings_of(drawn_features(circo), circo, "image"), tmp_path)
    record = json.loads(path.read_text())
    assert all(int(circo.pictures[circo.references[row]]) in record[query] for row, query in enumerate(circo.ids))    # the reference may be listed
    said = lambda numbers: check_submission(put(path, record | {"3": numbers}), circo)
    assert said(record["3"]) == []
    assert said([str(i) for i in record["3"]]) == [f"query '3': place 1 is not a picture's number but '{record['3'][0]}'"]
    assert said([True, *record["3"][1:]]) == ["query '3': place 1 is not a picture's number but True"]
    assert said([float(i) for i in record["3"]]) == [f"query '3': place 1 is not a picture's number but {float(record['3'][0])}"]
    assert said(record["3"][:49] + [1]) == ["query '3': '1' is no picture of this benchmark; its names look like '7'"]
    assert said(record["3"][:49] + record["3"][:1]) == [f"query '3': '{record['3'][0]}' is listed twice, first at place 1"]
    assert said(record["3"] + [1000]) and said(record["3"][:3]) == ["query '3': the list has length 3, and 50 pictures are wanted"]


def test_both_files_or_none(cirr, tmp_path):
    ours = rankings_of(drawn_features(cirr), cirr, "sum:1")
    with pytest.raises(PliError, match="look-alikes of each query ranked too"): write_submission(cirr, replace(ours, subset=None), tmp_path)
    with pytest.raises(PliError, match="recall_subset.json is not written: query '100': the list has length 2"): write_submission(cirr, replace(ours, subset=ours.subset[:, :2]), tmp_path)
    assert not list(tmp_path.iterdir())
    write_submission(cirr, ours, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PliError): write_submission(cirr, replace(ours, subset=ours.subset[:, :2]), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before     # an older file is not harmed


def test_servers_want_the_whole_split(cirr, galleries, tmp_path):
    with pytest.raises(PliError, match="genecis: there is no test server; known are cirr, circo. write_rankings"): write_submission(galleries, Rankings(torch.zeros(5, 1)), tmp_path)
    ours = rankings_of(drawn_features(cirr), cirr, "sum:1")
    missing = replace(cirr, missing=Missing(("dev-99-0-img0",), {"all": 3}, {"all": 15}, (1,)))
    with pytest.raises(PliError, match="3 queries are left out"): write_submission(missing, ours, tmp_path)
    assert write_submission(replace(cirr, missing=Missing(("dev-99-0-img0",), {"all": 0}, {"all": 12}, (1,))), ours, tmp_path)


# --- everybody's files --------------------------------------------------------------------------------------------------

def test_round_trip_in_every_format(cirr, circo, galleries, tmp_path):
    for benchmark in (cirr, circo, galleries):
        features = drawn_features(benchmark)
        direct, ours = rank_queries(features, benchmark, "sum:1"), rankings_of(features, benchmark, "sum:1")
        write_rankings(tmp_path / "plain.json", benchmark, ours)
        ways = [tmp_path / "plain.json"] + ([write_submission(benchmark, ours, tmp_path)] if benchmark.name in SERVERS else [])
        for way in ways:
            found = ranks_in_lists(read_rankings(way, benchmark), benchmark)
            for measure in benchmark.scoring.measures: assert torch.equal(measure_queries(found, measure), measure_queries(direct, measure)), measure


def test_whole_lists_give_whole_outcomes(cirr, circo, tmp_path):
    for benchmark in (cirr, circo):
        features = drawn_features(benchmark)
        direct = rank_queries(features, benchmark, "text")
        put(tmp_path / "whole.json", plain(benchmark))
        found = ranks_in_lists(read_rankings(tmp_path / "whole.json", benchmark), benchmark)
        assert torch.equal(found.places, direct.places) and torch.equal(found.rank, direct.rank)
        assert found.subset is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_places_by_hand(data):
    "Outcomes equal what a slow reading of the list says."
    queries, pictures = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    lists = [data.draw(st.permutations(range(pictures)))[:data.draw(st.integers(0, pictures))] for _ in range(queries)]
    answers = tuple(tuple(data.draw(st.lists(st.integers(0, pictures - 1), min_size=1, max_size=4, unique=True))) for _ in range(queries))
    main_only = data.draw(st.booleans())
    benchmark = own_queries(["x"] * queries, [pictures] * queries, answers, ["all"] * queries, pictures)
    benchmark = replace(benchmark, scoring=replace(benchmark.scoring, main_only=main_only))
    found = ranks_in_lists(Rankings(pad_rows(lists)), benchmark)
    place = lambda row, picture: lists[row].index(picture) + 1 if picture in lists[row] else ABSENT
    for row, right in enumerate(answers):
        by_hand = sorted(place(row, picture) for picture in right)
        assert found.places[row].tolist() == by_hand + [0] * (max(map(len, answers)) - len(right))
        assert found.rank[row] == (place(row, right[0]) if main_only else by_hand[0])


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=12).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)), min_size=2, max_size=8, unique=True), seed=st.integers(0, 99))
def test_any_name_comes_back(tmp_path_factory, names, seed):
    "Names of all alphabets survive a plain file."
    benchmark = own_queries(["x"] * 2, [0, 1], [(1,), (0,)], ["all"] * 2, len(names), names, ids=["é", "query 2"])
    ours = rankings_of(drawn_features(benchmark, seed=seed), benchmark, "text", k=10)
    path = tmp_path_factory.mktemp("names") / "x.json"
    write_rankings(path, benchmark, ours)
    assert torch.equal(read_rankings(path, benchmark).lists, ours.lists[:, :len(names) - 1])


BROKEN = {  # entries put over a plain record -> what is said
    "format": ({"format": "pli-rankings-9"}, "the entry 'format' has to be 'pli-rankings-1'; here it is 'pli-rankings-9'"),
    "benchmark": ({"benchmark": "circo"}, "the entry 'benchmark' has to be 'genecis'; here it is 'circo'"),
    "split": ({"split": ["val"]}, "the entry 'split' has to be ''; here it is a list"),
    "entries": ({"ranking": {}}, "unknown entries: ranking"),
    "subset": ({"subset": {}}, "genecis has no subsets"),
    "rankings": ({"rankings": []}, "rankings are an object with a list for every query, not a list"),
    "empty": ({"rankings": {}}, "5 of the 5 queries are missing: focus_object-0, focus_object-1, focus_object-2, ..."),
}


@pytest.mark.parametrize("what", BROKEN)
def test_plain_records_that_are_not(galleries, tmp_path, what):
    entries, problem = BROKEN[what]
    told(problem, put(tmp_path / "x.json", plain(galleries) | entries), galleries)


def test_lists_that_are_not(galleries, tmp_path):
    good = plain(galleries)
    names = good["rankings"]["focus_object-1"]           # the second query searches the pictures 1009 to 1012
    assert sorted(names) == ["1009", "1010", "1011", "1012"]
    say = lambda problem, value: told("query 'focus_object-1': " + problem, put(tmp_path / "x.json", good | {"rankings": good["rankings"] | {"focus_object-1": value}}), galleries)
    say("not a list of pictures but a dict", {})
    say("not a list of pictures but None", None)
    say("place 2 is not a picture's name but a list", [names[0], names, names[1]])
    say("place 1 is not a picture's name but 1.5", [1.5])
    say("place 1 is not a picture's name but True", [True, *names])
    say("the list has length 2, and measuring at 3 takes 3", names[:2])
    say("'1009' is listed twice, first at place 1", ["1009", "1010", 1009])
    say("'1017' is not one of the 4 pictures that are ranked here", ["1017", *names])
    say("'9999' is no picture of this benchmark; its names look like '1000'", ["9999", *names])
    say("'-1' is no picture", [-1, *names])
    say("the reference '1008' is listed, and it takes no part", ["1008", *names])
    say("the list has length 0", [])


def test_numbers_and_texts_are_the_same_names(circo, galleries, tmp_path):
    for benchmark in (circo, galleries):
        texts = plain(benchmark)
        numbers = texts | {"rankings": {query: [int(name) for name in names] for query, names in texts["rankings"].items()}}
        one, other = (read_rankings(put(tmp_path / "x.json", record), benchmark) for record in (texts, numbers))
        assert torch.equal(one.lists, other.lists)
        if benchmark is circo: assert torch.equal(read_rankings(put(tmp_path / "x.json", numbers["rankings"]), circo).lists, one.lists)     # CIRCO's own format


def test_short_lists_are_enough_where_the_gallery_is_short(galleries, tmp_path):
    two = replace(galleries, galleries=tuple(gallery[:2] for gallery in galleries.galleries))
    assert read_rankings(put(tmp_path / "x.json", plain(two)), two).lists.shape == (5, 2)
    told("the list has length 1, and measuring at 3 takes all 2 pictures that there are", put(tmp_path / "x.json", plain(two, rankings={query: names[:1] for query, names in plain(two)["rankings"].items()})), two)


def test_how_far_lists_must_go(cirr, circo, galleries):
    lengths = lambda benchmark: [form_for_reading(benchmark, part).length for part in ("lists", "subset")]
    assert [lengths(benchmark) for benchmark in (cirr, circo, galleries)] == [[50, 3], [50, 1], [3, 1]]
    assert form_for_reading(replace(circo, scoring=replace(circo.scoring, measures=("recall@5",))), "lists").length == 10         # its aspects are measured at 10


def test_longer_and_about(cirr, tmp_path):
    record = plain(cirr, about={"by": "us"}, subset={query: [cirr.pictures[i] for i in few] for query, few in zip(cirr.ids, cirr.subsets)})
    found = read_rankings(put(tmp_path / "x.json", record), cirr)
    assert found.lists.shape == (QUERIES, PICTURES - 1) and found.subset.tolist() == [list(row) for row in cirr.subsets]
    assert (ranks_in_lists(found, cirr).subset == 1).all()
    record["subset"]["104"] = record["subset"]["104"][:2]
    told("query '104': the list has length 2, and measuring at 3 takes 3", put(tmp_path / "x.json", record), cirr)


def test_half_a_pair_of_files(cirr, tmp_path):
    main, few = write_submission(cirr, rankings_of(drawn_features(cirr), cirr, "sum:1"), tmp_path)
    alone = ranks_in_lists(read_rankings(main, cirr), cirr)
    assert alone.subset is None and measure_queries(alone, "recall@5").shape == (QUERIES,)
    with pytest.raises(PliError, match="no ranking over the whole gallery beside that of the subsets; give both files"): read_rankings(few, cirr)
    with pytest.raises(PliError, match="recall.json: a second file with the rankings"): read_rankings([main, few, main], cirr)
    assert torch.equal(read_rankings([few, main], cirr).lists, read_rankings((main, few), cirr).lists)
    with pytest.raises(PliError, match="no ranking over the whole gallery"): read_rankings([], cirr)


def test_target_outside_the_subset_list(cirr, tmp_path):
    "Three of five look-alikes are listed: an answer that is not among them is absent."
    subset = torch.tensor([row[1:4] for row in cirr.subsets])       # everything but the answer
    found = ranks_in_lists(replace(rankings_of(drawn_features(cirr), cirr, "text"), subset=subset), cirr)
    assert (found.subset == ABSENT).all() and measure_queries(found, "subset recall@3").sum() == 0


def test_server_formats_that_are_not(cirr, circo, tmp_path):
    ours = rankings_of(drawn_features(cirr), cirr, "sum:1")
    main, _ = write_submission(cirr, ours, tmp_path)
    record = json.loads(main.read_text())
    told("the entries have to be", put(tmp_path / "x.json", record | {"version": "rc1"}), cirr)
    told("12 of its 12 queries are not in cirr test1: 100, 101, 102, ...; is the file for another split or protocol", main, replace(cirr, split="test1", ids=tuple(map(str, range(QUERIES)))))
    told("14 queries are not in circo val: version, metric, 100", main, circo)
    told("the entry 'format' has to be 'pli-rankings-1'; here it is None", main, replace(cirr, name="fashioniq"))
    told("not valid JSON", put(tmp_path / "x.json", main.read_text()[:3000]), cirr)
    told("the entry '100' is there twice", put(tmp_path / "x.json", json.dumps(record)[:-1] + ', "100": []}'), cirr)
    told("it holds a list", put(tmp_path / "x.json", "[]"), cirr)
    told("not valid JSON", put(tmp_path / "x.json", ""), cirr)
    told("not valid JSON", put(tmp_path / "x.json", "[" * 200_000), cirr)
    told("not valid JSON", put(tmp_path / "x.json", '{"100": ' + "9" * 5000 + "}"), cirr)
    told("a folder, not a file", tmp_path, cirr)
    told("no such file", tmp_path / "nowhere.json", cirr)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    told("not valid JSON", tmp_path / "x.json", cirr)
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + main.read_bytes())             # a byte order mark does no harm
    assert torch.equal(read_rankings(tmp_path / "x.json", cirr).lists, ours.lists)
    with pytest.raises(PliError, match="larger than 0.001 MB"): load_ranking_file(main, 1000)
    assert load_ranking_file(main, main.stat().st_size) == record


def test_a_gallery_that_nobody_knows(circo, tmp_path):
    "Without CIRCO's list any number may be a picture; what is listed keeps its place."
    known = sorted({*circo.references.tolist(), *(i for row in circo.answers for i in row)})
    number = {old: new for new, old in enumerate(known)}
    little = replace(circo, pictures=tuple(circo.pictures[i] for i in known), references=torch.tensor([number[i] for i in circo.references.tolist()]),
                     answers=tuple(tuple(number[i] for i in row) for row in circo.answers), galleries=(torch.arange(len(known)),), complete=False)
    (path,) = write_submission(circo, rankings_of(drawn_features(circo), circo, "text"), tmp_path)
    assert check_submission(path, little) == []
    whole, some = read_rankings(path, circo), read_rankings(path, little)
    assert names_in_lists(some.lists, little, some.unknown_pictures) == names_in_lists(whole.lists, circo)
    assert torch.equal(ranks_in_lists(some, little).places, ranks_in_lists(whole, circo).places)
    assert [record.read_bytes() for record in write_submission(little, some, tmp_path / "again")] == [path.read_bytes()]
    record = json.loads(path.read_text())
    for name in ("cat", "007", "-7", "1.5", " 7", "٣", "1" * 30): told("is no picture of this benchmark", put(tmp_path / "x.json", record | {"0": [name, *record["0"][1:]]}), little)
    told("the list has length 49, and measuring at 50 takes 50", put(tmp_path / "x.json", record | {"0": record["0"][1:]}), little)


def test_secret_answers(cirr):
    secret = replace(cirr, answers=((),) * QUERIES)
    with pytest.raises(PliError, match="cirr val: its answers are kept by the test server"): ranks_in_lists(rankings_of(drawn_features(cirr), secret, "text"), secret)


# --- feature files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_features_come_back(tmp_path, suffix, dtype):
    features = torch.randn(5, 3, generator=rng_for("rows")).to(dtype)
    write_features(tmp_path / f"x{suffix}", ["a", "ü b", "c/d", 4, "五"], features)
    names, back = read_features(tmp_path / f"x{suffix}")
    assert names == ["a", "ü b", "c/d", "4", "五"] and back.dtype == torch.float32
    assert torch.equal(back, features.float())
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def fails(problem, path):
    with pytest.raises(PliError) as refusal: read_features(path)
    line = str(refusal.value)
    assert str(path) in line and "\n" not in line and re.search(problem, line), line


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def tensors(path, names=None, **arrays):
    save_file(arrays, path, None if names is None else {"names": names})
    return path


def test_feature_files_that_are_not(tmp_path):
    row = np.eye(3, dtype=np.float32)
    x, y = tmp_path / "x.npz", tmp_path / "y.safetensors"
    fails("it has no array 'features'; it has feats", npz(x, feats=row))
    fails("it has no array 'names'; it has features", npz(x, features=row))
    fails("cannot be read", npz(x, features=row, names=np.array(["a", "b", None], dtype=object)))          # would be unpickled
    fails("cannot be read", npz(x, features=np.array([[1, None]], dtype=object), names=["a"]))
    fails("2 names for 3 rows", npz(x, features=row, names=["a", "b"]))
    fails("rows 0 and 2 are both called 'a'", npz(x, features=row, names=["a", "b", "a"]))
    fails("'names' is not a list", npz(x, features=row, names=np.array([0.5, 1, 2])))
    fails("'names' is not a list", npz(x, features=row, names=np.array("a")))
    fails(r"floating-point \(n, width\), and is int64 \(3, 3\)", npz(x, features=row.astype(int), names=["a", "b", "c"]))
    fails(r"floating-point \(n, width\), and is float32 \(3,\)", npz(x, features=row[0], names=["a", "b", "c"]))
    fails("1 of 3 rows cannot be compared; the first, 'b', holds a number that is not finite", npz(x, features=np.where(row[:, [1]] > 0, np.nan, row), names=["a", "b", "c"]))
    fails("the first, 'c', holds zeros only", npz(x, features=row * [[1], [1], [0]], names=["a", "b", "c"]))
    fails("not finite", npz(x, features=row.astype(np.float64) * 1e300, names=["a", "b", "c"]))           # too large for single precision
    fails("it has no tensor 'features'; it has feats", tensors(y, "[]", feats=torch.eye(3)))
    fails("its metadata has no entry 'names'", tensors(y, features=torch.eye(3)))
    fails("cannot be read", tensors(y, "a, b, c", features=torch.eye(3)))
    fails("'names' is not a list", tensors(y, '{"a": 0}', features=torch.eye(3)))
    fails("'names' is not a list", tensors(y, '["a", "b", null]', features=torch.eye(3)))
    fails("no such file", tmp_path / "nowhere.npz")
    fails("no such file", tmp_path / "nowhere.safetensors")
    fails("features are kept in .safetensors or .npz files", put(tmp_path / "x.csv", "a,1"))
    for path in (x, y):
        for content in (b"", b"nothing of the kind", b"\x80\x04K\x01.", b"\xff" * 1000): path.write_bytes(content); fails("cannot be read", path)


def test_half_a_feature_file(tmp_path):
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        write_features(path, map(str, range(300)), torch.randn(300, 20, generator=rng_for("half")))
        path.write_bytes(path.read_bytes()[:9000])
        fails("is the file complete", path)


def test_no_pickle_is_opened(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "sprung"), "w"))
    np.savez(tmp_path / "x.npz", features=np.eye(1, dtype=np.float32), names=np.array([Trap()], dtype=object), allow_pickle=True)
    fails("cannot be read", tmp_path / "x.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_header_that_promises_too_much(tmp_path):
    "A few bytes that say they are a table of terabytes."
    write_features(tmp_path / "good.npz", ["a"], torch.ones(1, 2))
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "x.npz", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content.replace(b"(1, 2), }" + b" " * 20, b"(999999999999, 9999), }" + b" " * 6) if name == "features.npy" else content)
    assert b"999999999999" in (tmp_path / "x.npz").read_bytes()
    fails("cannot be read", tmp_path / "x.npz")


def test_big_endian_and_byte_names(tmp_path):
    np.savez(tmp_path / "x.npz", features=np.eye(2, dtype=">f4"), names=np.array([7, 8], dtype=">i8"))
    names, features = read_features(tmp_path / "x.npz")
    assert names == ["7", "8"] and torch.equal(features, torch.eye(2))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_give_the_same_outcomes(cirr, circo, galleries, tmp_path, suffix):
    for benchmark in (cirr, circo, galleries):
        features, noted = drawn_features(benchmark), []
        luck = rng_for("order", benchmark.name)
        rows, order = torch.randperm(len(benchmark), generator=luck), torch.randperm(len(benchmark.pictures), generator=luck)
        write_features(tmp_path / f"q{suffix}", [benchmark.ids[i] for i in rows], features.texts[rows] * 1e-30)
        write_features(tmp_path / f"g{suffix}", [benchmark.pictures[i] for i in order], features.pictures[order] * 2.0 ** torch.randint(-100, 100, (len(order), 1), generator=luck))    # every row as long as it likes
        found, direct = ranks_from_features(benchmark, tmp_path / f"q{suffix}", tmp_path / f"g{suffix}", noted.append), rank_queries(features, benchmark, "text")
        for part, own in direct.parts().items(): assert torch.equal(found.parts()[part], own), part
        assert len(noted) == (benchmark is galleries)            # GeneCIS's references are searched by nobody


def test_ties_count_against_features(cirr, tmp_path):
    write_features(tmp_path / "q.npz", cirr.ids, torch.ones(QUERIES, 3))
    write_features(tmp_path / "g.npz", cirr.pictures, torch.ones(PICTURES, 3))
    found = ranks_from_features(cirr, tmp_path / "q.npz", tmp_path / "g.npz")
    assert (found.rank == PICTURES - 1).all() and (found.subset == 5).all()


def test_features_and_their_names(cirr, tmp_path):
    features, q, g = drawn_features(cirr), tmp_path / "q.npz", tmp_path / "g.safetensors"
    write_features(q, (*cirr.ids, "one more"), torch.cat([features.texts, features.texts[:1]]))
    write_features(g, (*cirr.pictures, "x", "y"), torch.cat([features.pictures, features.pictures[:2]]))
    noted = []
    assert torch.equal(ranks_from_features(cirr, q, g, noted.append).rank, rank_queries(features, cirr, "text").rank)
    assert [re.sub(".*/", "", line) for line in noted] == ["g.safetensors: 2 of 72 rows are none of the 70 pictures that cirr val searches and are left aside",
                                                          "q.npz: 1 of 13 rows are none of the 12 queries of cirr val and are left aside"]
    write_features(g, cirr.pictures[3:], features.pictures[3:])
    with pytest.raises(PliError, match="g.safetensors: 3 of the 70 pictures that cirr val searches have no row: dev-0-0-img0, dev-1-0-img0, dev-2-0-img0; it has 67 rows such as dev-3-0-img0"):
        ranks_from_features(cirr, q, g)
    write_features(g, cirr.pictures, features.pictures[:, :5])
    with pytest.raises(PliError, match="q.npz has features of width 24, .*g.safetensors of width 5"): ranks_from_features(cirr, q, g)


def test_feature_files_make_submissions(cirr, tmp_path):
    features = drawn_features(cirr)
    write_features(tmp_path / "q.npz", cirr.ids, features.texts)
    write_features(tmp_path / "g.npz", cirr.pictures, features.pictures)
    theirs = rankings_of(*named_features(cirr, tmp_path / "q.npz", tmp_path / "g.npz"), "text")
    assert torch.equal(theirs.lists, rankings_of(features, cirr, "text").lists)


# --- the official layouts -----------------------------------------------------------------------------------------------

MAKERS = {"fashioniq": make_fashioniq, "cirr": make_cirr, "circo": make_circo, "genecis": make_genecis}


@pytest.mark.parametrize("protocol", ["default", "masked-tuning"])
@pytest.mark.parametrize("name", MAKERS)
def test_round_trip_in_every_layout(tmp_path, name, protocol):
    root = MAKERS[name](tmp_path / "data", pictures=False)
    benchmark = read_benchmark(name, add_pairs(root) if name == "fashioniq" else root, protocol=protocol)
    features = drawn_features(benchmark)
    direct, ours = rank_queries(features, benchmark, "sum:0.5"), rankings_of(features, benchmark, "sum:0.5")
    write_rankings(tmp_path / "plain.json", benchmark, ours)
    ways = [tmp_path / "plain.json"] + ([write_submission(benchmark, ours, tmp_path)] if name in SERVERS else [])
    for way in ways:
        found = ranks_in_lists(read_rankings(way, benchmark), benchmark)
        for measure in benchmark.scoring.measures: assert torch.equal(measure_queries(found, measure), measure_queries(direct, measure)), measure
    write_features(tmp_path / "q.npz", benchmark.ids, features.texts)
    write_features(tmp_path / "g.npz", benchmark.pictures, features.pictures)
    assert torch.equal(ranks_from_features(benchmark, tmp_path / "q.npz", tmp_path / "g.npz", list().append).places, rank_queries(features, benchmark, "text").places)


def test_circo_without_its_list(tmp_path):
    whole = read_benchmark("circo", make_circo(tmp_path / "whole", pictures=False))
    little = read_benchmark("circo", make_circo(tmp_path / "little", info=False, pictures=False))
    assert whole.complete and not little.complete
    features, noted = drawn_features(whole), []
    write_features(tmp_path / "q.npz", whole.ids, features.texts)
    write_features(tmp_path / "g.npz", whole.pictures, features.pictures)
    found = ranks_from_features(little, tmp_path / "q.npz", tmp_path / "g.npz", noted.append)
    assert torch.equal(found.places, rank_queries(features, whole, "text").places)
    assert "the gallery is taken from" in noted[0] and "60 pictures" in noted[0]
    path = write_submission(whole, rankings_of(features, whole, "text"), tmp_path)
    assert torch.equal(ranks_in_lists(read_rankings(path, little), little).rank, ranks_in_lists(read_rankings(path, whole), whole).rank)


# --- the official files -------------------------------------------------------------------------------------------------

def test_official_cirr_test1(shared, tmp_path):
    benchmark = read_benchmark("cirr", shared / "annotations" / "cirr", "test1")
    paths = write_submission(benchmark, rankings_of(drawn_features(benchmark, 16), benchmark, "sum:0.25"), tmp_path)
    official = json.loads((shared / "annotations" / "cirr" / "captions" / "cap.rc2.test1.json").read_text())
    for path, length in zip(paths, (50, 3)):
        assert check_submission(path, benchmark) == [] and path.stat().st_size <= 5_000_000
        record = json.loads(path.read_text())
        assert record.keys() == {"version", "metric", *(str(query["pairid"]) for query in official)}
        for query in official:
            names = record[str(query["pairid"])]
            assert len(names) == len(set(names)) == length and query["reference"] not in names
            assert length == 50 or set(names) <= set(query["img_set"]["members"])


def test_official_circo_test(shared, tmp_path):
    benchmark = read_benchmark("circo", shared / "annotations" / "circo", "test")
    if not benchmark.complete:
        stand_ins = (str(i) for i in range(1, 30_000))
        benchmark = with_gallery(benchmark, list(dict.fromkeys([*benchmark.pictures, *stand_ins])))
    (path,) = write_submission(benchmark, rankings_of(drawn_features(benchmark, 16), benchmark, "sum:0.25"), tmp_path)
    assert path.name == "circo_test.json" and check_submission(path, benchmark) == [] and path.stat().st_size <= 5_000_000
    record = json.loads(path.read_text())
    assert list(record) == [str(i) for i in range(800)] and all(len(set(row)) == 50 for row in record.values())


@pytest.mark.parametrize("name, split", [("cirr", "val"), ("circo", "val"), ("fashioniq", "val"), ("genecis", None)])
def test_official_round_trip(shared, tmp_path, name, split):
    "Rankings through a file give the numbers of the scores, query by query: random features have no ties where it matters."
    benchmark = read_benchmark(name, shared / "annotations" / name, split)
    if not benchmark.complete: benchmark = with_gallery(benchmark, list(dict.fromkeys([*benchmark.pictures, *(str(i) for i in range(1, 20_000))])))
    features = drawn_features(benchmark, 32)
    direct, ours = rank_queries(features, benchmark, "text"), rankings_of(features, benchmark, "text")
    write_rankings(tmp_path / "plain.json", benchmark, ours)
    found = ranks_in_lists(read_rankings(tmp_path / "plain.json", benchmark), benchmark)
    for measure in benchmark.scoring.measures:
        assert torch.equal(measure_queries(found, measure), measure_queries(direct, measure)), measure


def test_a_ranking_may_say_its_protocol(tmp_path):
    benchmark = read_benchmark("fashioniq", make_fashioniq(tmp_path / "f", pictures=False), protocol="val")
    write_rankings(tmp_path / "r.json", benchmark, rankings_of(drawn_features(benchmark), benchmark, "text"))
    assert read_rankings(tmp_path / "r.json", benchmark).declared
    with pytest.raises(PliError, match="made by another protocol, gallery=val,.* here it is gallery=split,"): read_rankings(tmp_path / "r.json", read_benchmark("fashioniq", tmp_path / "f"))
    record = json.loads((tmp_path / "r.json").read_text())
    for protocol in ("usual", 7, {"gallery": "split"}, {}, None, "gallery=none", "loose"):
        (tmp_path / "r.json").write_text(json.dumps(record | {"protocol": protocol}))
        with pytest.raises(PliError, match="r.json: (its rankings were made by another protocol|the entry 'protocol' has to be|protocol )"): read_rankings(tmp_path / "r.json", benchmark)
    for protocol in ("val", "gallery=val", "usual,gallery=val", "default,gallery=val", {"gallery": "val"}, benchmark.protocol | {"tasks": "all"}):                  # as it is typed, or as it is stored
        (tmp_path / "r.json").write_text(json.dumps(record | {"protocol": protocol}))
        assert read_rankings(tmp_path / "r.json", benchmark).declared
    del record["protocol"]
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert not read_rankings(tmp_path / "r.json", benchmark).declared


def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pli.studies.predictions.MOST_UNPACKED", 1_000_000)
    np.savez_compressed(tmp_path / "bomb.npz", features=np.zeros((10_000, 100), dtype=np.float32), names=np.array(["a"]))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    with pytest.raises(PliError, match="bomb.npz: it unpacks to"): read_features(tmp_path / "bomb.npz")
