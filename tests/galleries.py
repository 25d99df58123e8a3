"A small folder of pictures, unlike each other, and a model that is made in a moment: what tests of galleries begin with."
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pli.backbones.loading import load_backbone


def picture(path: Path, number: int, size=(40, 30), kind: str = "PNG") -> Path:
    "A picture unlike any other of its number."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(path, kind)
    return path


@pytest.fixture(scope="module")
def backbone(): return load_backbone("pli-tiny-48")


@pytest.fixture()
def folder(tmp_path) -> Path:
    for number in range(10): picture(tmp_path / "photos" / f"{'ab'[number % 2]}" / f"{number}.png", number)
    return tmp_path / "photos"
