"""What a GPU must do as a processor does: `pytest -m gpu`. Without one these tests skip; PLI_GPU_TESTS=cpu rehearses them on a processor,
where they hold nothing against anything.
"""
import os

import pytest
import rank_worker
import torch

from pli.backbones.loading import load_backbone
from pli.core import rng_for
from pli.settings import TuneSettings
from pli.training.loop import tune
from pli.training.plan import make_plan

DEVICE = os.environ.get("PLI_GPU_TESTS", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="needs a GPU")]
STEPS = TuneSettings(steps=8, batch_size=16, learning_rate=1e-3, warmup=2, checkpoint_every=3, precision="fp32")
quiet = lambda line: None


@pytest.fixture(autouse=True)
def whole_numbers():
    "Products in fp32 as a processor makes them, without TF32."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def losses(device: str, folder=None, **more) -> list[float]:
    "The losses of a run on a device."
    result = tune(load_backbone("pli-tiny-48", device=device), rank_worker.drawn_pairs(), TuneSettings(**{**vars(STEPS), **more}), folder, say=quiet)
    return [record["loss"] for record in result.history]


def test_features_are_those_of_a_processor():
    here, there = load_backbone("pli-tiny-48"), load_backbone("pli-tiny-48", device=DEVICE)
    data = rank_worker.drawn_pairs()
    hidden = torch.rand(16, here.patches, generator=rng_for("hidden")).argsort(1) < here.patches // 2
    with torch.no_grad():
        for ask in (lambda model: model.encode_image(data.pixels[:16]), lambda model: model.encode_image(data.pixels[:16], hidden), lambda model: model.encode_text(data.captions[:16])):
            torch.testing.assert_close(ask(there).cpu(), ask(here), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("more", [{}, {"target": "frozen"}, {"objective": "paper"}, {"hide": "recolour+random:0.5"}], ids=str)
def test_tuning_gives_the_losses_of_a_processor(more):
    assert losses(DEVICE, **more) == pytest.approx(losses("cpu", **more), rel=5e-3)


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    data, whole = rank_worker.drawn_pairs(), load_backbone("pli-tiny-48", device=DEVICE)
    straight = tune(whole, data, STEPS, say=quiet)
    with pytest.raises(KeyboardInterrupt): rank_worker.stopped_run(load_backbone("pli-tiny-48", device=DEVICE), STEPS, tmp_path / "run", after=5 * 16)
    again, said = load_backbone("pli-tiny-48", device=DEVICE), []
    result = tune(again, data, STEPS, tmp_path / "run", say=said.append)
    assert any("continuing at step 3" in line for line in said)
    assert [record["loss"] for record in result.history] == pytest.approx([record["loss"] for record in straight.history], rel=1e-3)
    for name, weight in whole.state_dict().items(): torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-3, rtol=1e-2)


def test_a_run_may_go_on_on_another_device(tmp_path):
    with pytest.raises(KeyboardInterrupt): rank_worker.stopped_run(load_backbone("pli-tiny-48"), STEPS, tmp_path / "run", after=5 * 16)
    assert losses(DEVICE, tmp_path / "run") == pytest.approx(losses("cpu"), rel=5e-3)


def test_bf16_trains_and_stays_near_fp32():
    steps = 30 if DEVICE.startswith("cuda") else 3
    full, half = losses(DEVICE, steps=steps), losses(DEVICE, steps=steps, precision="bf16")
    assert half == pytest.approx(full, rel=0.1) and half != full
    if steps == 30: assert half[-1] < 0.9 * half[0]


def test_gradient_caching_gives_the_same_losses():
    assert losses(DEVICE, piece=5) == pytest.approx(losses(DEVICE), rel=2e-3)


def test_recomputed_activations_give_the_same_losses():
    assert losses(DEVICE, gradient_checkpointing=True) == pytest.approx(losses(DEVICE), rel=2e-3)


def test_compiled_blocks_give_the_same_losses(monkeypatch):
    if not DEVICE.startswith("cuda"): monkeypatch.setattr("pli.backbones.openclip.COMPILER", "aot_eager")
    assert losses(DEVICE, compile=True) == pytest.approx(losses(DEVICE), rel=2e-3)


def test_a_plan_measures_the_memory_of_the_device():
    plan = make_plan(load_backbone("pli-tiny-48", device=DEVICE), rank_worker.drawn_pairs(), STEPS, say=quiet)
    assert plan.peak >= plan.memory["weights"] + plan.memory["gradients"] + plan.memory["moments"]
    assert ("on the GPU" == plan.peak_of) == DEVICE.startswith("cuda")
