"""What the tests share: the scripts as modules, a small image folder, a run of each script."""

import importlib
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind PYTHONPATH, where other copies may stand
METHODS = {"simsiam": "SimSiam", "byol": "BYOL", "simclr": "SimCLR"}  # file: class
CLASSES = {"red": 0, "green": 1, "blue": 2}


class Small(torch.nn.Sequential):
    """Stands in for a ResNet where only the loop is of interest: (B, 3, S, S) -> (B, 4)."""

    inplanes = 4

    def __init__(self, *_):
        pool, linear = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(3, 4)
        super().__init__(pool, torch.nn.Flatten(), linear, torch.nn.BatchNorm1d(4))


NARROW = {  # heads of a few weights
    "SimSiam": {"dim": 8, "bottleneck": 4},
    "BYOL": {"hidden": 8, "dim": 4},
    "SimCLR": {"hidden": 8, "dim": 4},
}


def shrink(monkeypatch, script):
    """Where only the loop of a script is of interest: a tiny backbone, tiny heads."""
    name = METHODS[script.__name__]
    monkeypatch.setattr(script, "build_backbone", Small)
    monkeypatch.setattr(script, name, partial(getattr(script, name), **NARROW[name]))


@pytest.fixture(params=METHODS)
def script(request):
    """Each of the three method scripts."""
    return importlib.import_module(request.param)


def write_images(folder, count, seed):
    """count noisy images of 20 x 24 pixels, brightest in the channel that names their class."""
    generator = torch.Generator().manual_seed(seed)
    for name, channel in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = torch.rand(3, 20, 24, generator=generator) / 2
            image[channel] += 0.5
            save_image(image, folder / name / f"{i}.png")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An image folder with train/<class>/ (16 images each) and test/<class>/ (8 each)."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 16, seed=0)
    write_images(root / "test", 8, seed=1)
    return root


@pytest.fixture(scope="session")
def mislabeled(folder, tmp_path_factory):
    """The same with every other test image in the next class: no network reaches 100 %."""
    root = tmp_path_factory.mktemp("mislabeled")
    shutil.copytree(folder, root, dirs_exist_ok=True)
    names = [*CLASSES]
    for i, name in enumerate(names):
        for path in sorted((folder / "test" / name).glob("*[02468].png")):
            old, new = root / "test" / name, root / "test" / names[(i + 1) % 3]
            (old / path.name).rename(new / f"from {name} {path.name}")
    return root


def vote(bank, labels, h, k, temperature):
    """The class that wins among the k features (N, D) nearest to h (D,), from the definition."""
    cosines = (bank * h).sum(1) / bank.norm(dim=1) / h.norm()
    votes = {}
    for i in cosines.argsort(descending=True)[:k].tolist():
        weight = math.exp(cosines[i] / temperature)
        votes[int(labels[i])] = votes.get(int(labels[i]), 0) + weight
    return min(votes, key=lambda y: (-round(votes[y], 5), y))


@pytest.fixture(scope="session")
def arguments(folder):
    """The flags of a run of a few seconds."""
    flags = f"--data {folder} --size 8 --epochs 2 --batch-size 16 --lr 0.1 --device cpu"
    return flags.split()


@pytest.fixture(scope="session")
def runs(arguments, tmp_path_factory):
    """The folders of one finished run of each script."""
    out = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        importlib.import_module(method).main([*arguments, "--out", str(out / method)])
    return out
