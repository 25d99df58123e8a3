"Frozen targets: whole pictures read once by the model as it was."
import json
import os
import signal

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
    with pytest.raises(RunStopped, match="SIGTERM was received while whole pictures were encoded; the same command goes on"):
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


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(PliError, match="target must be one of tuned, frozen"): check_settings(TuneSettings(target="other"))
    with pytest.raises(PliError, match="target frozen reads its gallery with the model as it was"): tune(load_backbone("pli-tiny-48"), rank_worker.drawn_pairs(), FROZEN, prolong=tmp_path)
