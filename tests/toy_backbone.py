"A second kind of backbone: two small towers that owe nothing to open_clip. What a package of somebody else's would hold, under the entry point `pli.backbones`."
import json
import math
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from pli.backbones.protocol import weights_digest

CONTEXT, WORDS = 12, 509


class Toy(nn.Module):
    size, grid, patches, width, preprocess = (48, 48), (6, 6), 36, 24, "model"
    pixels = Compose([Resize(48), CenterCrop(48), PILToTensor()])

    def __init__(self, name: str, seed: int):
        super().__init__()
        self.name = self.title = name
        self.choices, self.cut_texts = {}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.eye, self.look = nn.Linear(3 * 64, 48), nn.Linear(48, self.width)
            self.table, self.say = nn.Embedding(WORDS, 32), nn.Linear(32, self.width)
            self.warmth = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    device = property(lambda self: self.warmth.device)
    scale = property(lambda self: self.warmth.exp())

    def encode_image(self, pixels, hidden=None):
        pixels = pixels.to(self.device)
        if pixels.dtype == torch.uint8: pixels = pixels.float() / 255
        squares = nn.functional.unfold(pixels - 0.5, 8, stride=8).transpose(1, 2)
        seen = torch.relu(self.eye(squares))
        if hidden is None: return self.look(seen.mean(1))
        kept = (~hidden).to(self.device).float()[..., None]
        return self.look((seen * kept).sum(1) / kept.sum(1))

    def embed_tokens(self, texts):
        rows = [[1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in text.lower().split()] for text in texts]
        self.cut_texts |= {text: None for text, row in zip(texts, rows) if len(row) > CONTEXT}
        tokens = torch.tensor([(row + [0] * CONTEXT)[:CONTEXT] for row in rows], device=self.device)
        return self.table(tokens), tokens

    def encode_embedded(self, embedded, tokens):
        there = (tokens > 0).float()[..., None]
        return self.say((embedded * there).sum(1) / there.sum(1).clamp_min(1))

    def encode_text(self, texts): return self.encode_embedded(*self.embed_tokens(list(texts)))

    def check_words(self, texts=()):
        before = len(self.cut_texts)
        for text in texts: self.embed_tokens([text])
        return len(self.cut_texts) - before

    def towers(self): return {"image": [*self.eye.parameters(), *self.look.parameters()], "text": [*self.table.parameters(), *self.say.parameters()], "scale": [self.warmth]}

    @torch.no_grad()
    def clamp_scale(self): self.warmth.clamp_(0, math.log(100))

    def description(self): return {"model": {"toy": self.width}, "image": {"toy": self.width}, "preprocess": {"size": 48}, "mean": [0.5], "std": [1.0]}

    def fingerprint(self, tower="all"):
        return weights_digest({name: weight for name, weight in self.state_dict().items() if tower == "all" or name.startswith(("eye", "look"))}, {"toy": self.width})

    def shortcuts(self): return nullcontext()

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "toy.safetensors")
        (Path(folder) / "backbone.json").write_text(json.dumps({"kind": "toy"}))


def load(name: str, pretrained=None, device="cpu", seed=0, preprocess="model") -> Toy:
    folder = Path(name.removeprefix("local-dir:"))
    toy = Toy(f"local-dir:{folder}" if folder.is_dir() else name, seed)
    if folder.is_dir(): toy.load_state_dict(load_file(folder / "toy.safetensors"))
    return toy.requires_grad_(False)
