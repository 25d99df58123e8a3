"Frozen targets: whole pictures read once by the model as it was."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch

from pli import world
from pli.backbones.loading import load_backbone
from pli.backbones.protocol import weights_of
from pli.core import SEAL, PliError, rng_for, sealed, write_json
from pli.data.batches import TensorPairs
from pli.settings import TuneSettings
from pli.training.loop import check_settings, tune
from pli.training.plan import make_plan
from pli.training.stopping import RunStopped
from pli.training.targets import ABOUT, BATCH, BEGUN, MATRIX, REACHED, WholeFeatures

FROZEN = TuneSettings(steps=6, batch_size=16, learning_rate=1e-3, warmup=1, target="frozen", checkpoint_every=3)
quiet = lambda line: None


def test_looked_up_features_train_the_model_that_encoding_them_at_every_step_would(tmp_path, monkeypatch):
    "The same run, once with stored features and once with a frozen copy that encodes whatever it is shown."
    data = rank_worker.drawn_pairs()
    stored = load_backbone("pli-tiny-48")
    result = tune(stored, data, FROZEN, tmp_path / "run", say=quiet)
    assert (tmp_path / "run" / MATRIX).exists()
    monkeypatch.setattr("pli.training.loop.WholeFeatures", lambda *arguments: None)
    encoded = load_backbone("pli-tiny-48")
    again = tune(encoded, data, FROZEN, say=quiet)
    assert [record["loss"] for record in result.history] == pytest.approx([record["loss"] for record in again.history], rel=1e-4)
    start = weights_of(load_backbone("pli-tiny-48"))
    moved = max(float((one - start[name]).abs().max()) for name, one in weights_of(stored).items())
    apart = max(float((one - weights_of(encoded)[name]).abs().max()) for name, one in weights_of(stored).items())
    assert apart < 0.05 * moved


def test_the_text_tower_alone_leaves_pictures_as_they_were(tmp_path):
    tuned, start, data = load_backbone("pli-tiny-48"), load_backbone("pli-tiny-48"), rank_worker.drawn_pairs()
    tune(tuned, data, TuneSettings(**{**vars(FROZEN), "tune": "text"}), tmp_path / "run", say=quiet)
    assert tuned.fingerprint("image") == start.fingerprint("image") and tuned.fingerprint() != start.fingerprint()
    with torch.no_grad(): assert torch.equal(tuned.encode_image(data.pixels[:4]), start.encode_image(data.pixels[:4]))


@pytest.mark.parametrize("harm", ["bit", "shorter", "gone", "about"])
def test_a_damaged_matrix_is_made_again(harm, tmp_path):
    data, backbone = rank_worker.drawn_pairs(), load_backbone("pli-tiny-48")
    right = WholeFeatures(backbone, data, tmp_path, say=quiet).of(range(8))
    path = tmp_path / MATRIX
    if harm == "bit":
        contents = bytearray(path.read_bytes())
        contents[-7] ^= 4
        path.write_bytes(contents)
    if harm == "shorter": path.write_bytes(path.read_bytes()[:-100])
    if harm == "gone": path.unlink()
    if harm == "about": (tmp_path / ABOUT).write_text(json.dumps({"model": "another"}))
    assert torch.equal(WholeFeatures(backbone, data, tmp_path, say=quiet).of(range(8)), right)


def test_a_run_goes_on_with_the_features_that_it_began_with(tmp_path):
    data, whole, halves = rank_worker.drawn_pairs(), load_backbone("pli-tiny-48"), load_backbone("pli-tiny-48")
    tune(whole, data, FROZEN, tmp_path / "whole", say=quiet)
    with pytest.raises(KeyboardInterrupt): rank_worker.stopped_run(halves, FROZEN, tmp_path / "halves", after=5 * 16)
    halves, lines = load_backbone("pli-tiny-48"), []
    tune(halves, data, FROZEN, tmp_path / "halves", say=lines.append)
    assert any("continuing at step 3" in line for line in lines) and not any("encoding" in line for line in lines)
    for one, other in zip(whole.state_dict().values(), halves.state_dict().values()): assert torch.equal(one, other)


class Slow(TensorPairs):
    "Pairs of which one sends this process a signal when it is read."
    at, read = None, 0

    def __getitem__(self, index):
        self.read += 1
        if self.read == self.at: os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def many_pairs() -> TensorPairs:
    attributes = world.sample(5 * BATCH + 10, rng_for(0, "pictures"))
    return Slow(world.render(attributes, size=48), world.caption(attributes, world.SPARSE, rng_for(0, "captions")))


def test_a_signal_ends_the_encoding_and_the_same_command_goes_on_there(tmp_path):
    whole, data, lines = load_backbone("pli-tiny-48"), many_pairs(), []
    tune(whole, data, FROZEN, tmp_path / "whole", say=quiet)
    data.at, data.read = 2 * BATCH + 5, 0
    with pytest.raises(RunStopped, match="SIGTERM was received while whole pictures were encoded: 192 of 329 are kept in .*, and the same command goes on"):
        tune(load_backbone("pli-tiny-48"), data, FROZEN, tmp_path / "halves", say=quiet)
    assert (tmp_path / "halves" / BEGUN).exists() and not (tmp_path / "halves" / MATRIX).exists()
    halves, data.at, data.read = load_backbone("pli-tiny-48"), None, 0
    tune(halves, data, FROZEN, tmp_path / "halves", say=lines.append)
    assert any("going on from 192" in line for line in lines) and data.read == len(set(data.pictures())) - 3 * BATCH + FROZEN.steps * FROZEN.batch_size
    assert (tmp_path / "whole" / MATRIX).read_bytes() == (tmp_path / "halves" / MATRIX).read_bytes()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == sorted(path.name for path in (tmp_path / "halves").iterdir())
    for one, other in zip(whole.state_dict().values(), halves.state_dict().values()): assert torch.equal(one, other)


@pytest.mark.parametrize("harm", ["bit", "shorter", "longer", "gone", "note", "other model", "too many"])
def test_a_damaged_beginning_is_made_again(harm, tmp_path, monkeypatch):
    data, backbone = many_pairs(), load_backbone("pli-tiny-48")
    right = WholeFeatures(backbone, data, say=quiet).of(range(len(data)))
    wishes = iter([None, None, "SIGTERM"])
    with pytest.raises(RunStopped): WholeFeatures(backbone, data, tmp_path, say=quiet, wish=lambda: next(wishes))
    begun, reached, lines = tmp_path / BEGUN, tmp_path / REACHED, []
    contents, note = bytearray(begun.read_bytes()), json.loads(reached.read_text())
    assert note["rows"] == 3 * BATCH
    if harm == "bit":
        contents[-7] ^= 4
        begun.write_bytes(contents)
    if harm == "shorter": begun.write_bytes(contents[:-100])
    if harm == "longer": begun.write_bytes(contents + b"x" * 1000)         # written after the note, by a process that was killed
    if harm == "gone": begun.unlink()
    if harm == "note": reached.write_text(json.dumps(note | {"rows": BATCH}))
    if harm == "too many": write_json(reached, sealed({key: value for key, value in note.items() if key != SEAL} | {"rows": 10**9}))
    if harm == "other model":
        backbone = load_backbone("pli-tiny-48", seed=1)
        right = WholeFeatures(backbone, data, say=quiet).of(range(len(data)))
    made = WholeFeatures(backbone, data, tmp_path, say=lines.append)
    assert torch.equal(made.of(range(len(data))), right)
    assert ("going on from 192" in lines[0]) == (harm == "longer")
    assert not begun.exists() and not reached.exists()


def stopped_features(data, folder, rounds: int = 3):
    wishes = iter([*[None] * (rounds - 1), "SIGTERM"])
    with pytest.raises(RunStopped): WholeFeatures(load_backbone("pli-tiny-48"), data, folder, say=quiet, wish=lambda: next(wishes))


@pytest.mark.parametrize("name", [BEGUN, REACHED, MATRIX, ABOUT])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_told_before_anything_is_encoded(name, kind, tmp_path):
    "A pipe would be waited for, a folder would be met after hours."
    data = many_pairs()
    stopped_features(data, tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    data.read = 0
    with pytest.raises(PliError, match=f"{name}: is a (pipe|folder) and would be replaced"): WholeFeatures(load_backbone("pli-tiny-48"), data, tmp_path, say=quiet)
    assert not data.read


@pytest.mark.parametrize("link", ["soft", "hard", "dangling"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(link, tmp_path):
    data, run, elsewhere = many_pairs(), tmp_path / "run", tmp_path / "thesis"
    run.mkdir()
    stopped_features(data, run)
    right = WholeFeatures(load_backbone("pli-tiny-48"), data, say=quiet).of(range(len(data)))
    if link == "hard": os.link(run / BEGUN, elsewhere)
    else:
        if link == "soft": (run / BEGUN).rename(elsewhere)
        (run / BEGUN).unlink(missing_ok=True)
        (run / BEGUN).symlink_to(elsewhere)
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    assert torch.equal(WholeFeatures(load_backbone("pli-tiny-48"), data, run, say=quiet).of(range(len(data))), right)
    assert (elsewhere.read_bytes() if elsewhere.exists() else None) == before and not (run / MATRIX).is_symlink()
    assert (run / MATRIX).stat().st_nlink == 1


def test_a_full_disk_says_how_much_is_kept(tmp_path):
    "In a process of its own, which may write files of 50,000 bytes."
    stopped_features(many_pairs(), tmp_path, 1)
    text = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from test_targets import *\n"
        "try: WholeFeatures(load_backbone('pli-tiny-48'), many_pairs(), Path(sys.argv[1]), say=quiet)\n"
        "except PliError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", text, tmp_path, Path(__file__).parent], capture_output=True, text=True)
    assert "make room, and the same command goes on from 64 of 329 pictures" in done.stdout, done.stderr


def test_a_note_that_a_kill_has_left_beside_the_matrix_goes(tmp_path):
    data = many_pairs()
    stopped_features(data, tmp_path, 1)
    note = (tmp_path / REACHED).read_bytes()
    WholeFeatures(load_backbone("pli-tiny-48"), data, tmp_path, say=quiet)
    (tmp_path / REACHED).write_bytes(note)
    WholeFeatures(load_backbone("pli-tiny-48"), data, tmp_path, say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MATRIX, ABOUT])


def test_a_plan_counts_the_pictures_that_are_left(tmp_path):
    data, said = many_pairs(), lambda plan: [name for name in plan.before if name.startswith("features of whole pictures")]
    planned = lambda: make_plan(load_backbone("pli-tiny-48"), data, FROZEN, tmp_path, say=quiet)
    assert said(planned()) == ["features of whole pictures by the frozen model"]
    data.at, data.read = 2 * BATCH + 5, 0
    with pytest.raises(RunStopped): tune(load_backbone("pli-tiny-48"), data, FROZEN, tmp_path, say=quiet)
    data.at = None
    assert said(planned()) == ["features of whole pictures by the frozen model, 192 of 329 are there"]
    tune(load_backbone("pli-tiny-48"), data, FROZEN, tmp_path, say=quiet)
    (tmp_path / "checkpoint.safetensors").unlink()
    assert not said(planned())


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(PliError, match="target must be one of tuned, frozen"): check_settings(TuneSettings(target="other"))
    with pytest.raises(PliError, match="target frozen reads its gallery with the model as it was"): tune(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), FROZEN, prolong=tmp_path)
