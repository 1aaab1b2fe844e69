"""A data set for a laptop: 1,000 + 500 gray images of ten patterns, which all three methods learn.

    python tests/toy.py data/toy
    python simsiam.py --data data/toy --size 12 --epochs 24 --batch-size 16 --lr 0.5 --out runs/toy

Classes are stripes of five directions, checkers, dots and the like: any crop shows which, at any
brightness. What differs within a class (place, a little of the period, noise) differs from crop
to crop as well, or is hard to see: two views of an image share little but the class. All images
are gray, of one brightness and one contrast. With a brightness and a contrast of their own, which
jitter does not hide, SimSiam learned these instead: its kNN first rose, then fell.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

SIDE = 32  # pixels


def stripes(u, v, degrees=0):
    """Rows, turned: 1 in the middle of a period, 0 at its ends."""
    angle = torch.tensor(degrees).deg2rad()
    return (1 - torch.cos(2 * torch.pi * (u * angle.sin() + v * angle.cos()))) / 2


def checkers(u, v):
    return (u.floor() + v.floor()) % 2


PATTERNS = {  # of the coordinates u (to the right) and v (down), in periods
    "rows": stripes,
    "gentle": lambda u, v: stripes(u, v, 22.5),
    "diagonal": lambda u, v: stripes(u, v, 45.0),
    "steep": lambda u, v: stripes(u, v, 67.5),
    "columns": lambda u, v: stripes(u, v, 90.0),
    "checkers": checkers,
    "diamonds": lambda u, v: checkers((u + v) * 0.7, (u - v) * 0.7),
    "dots": lambda u, v: ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09).float(),
    "zigzag": lambda u, v: stripes(u, v + 2 * (u / 2 % 1 - 0.5).abs()),
    "blobs": lambda u, v: F.interpolate(torch.rand(1, 1, 8, 8), (SIDE, SIDE), mode="bicubic")[0, 0],
}


def draw(name, generator):
    """One image of a class: (3, SIDE, SIDE) in 0-1."""
    period = 8 + 2 * torch.rand((), generator=generator)  # pixels
    offset = 4 * torch.rand(2, generator=generator)  # periods
    v, u = torch.meshgrid(2 * [torch.arange(SIDE) / period], indexing="ij")
    pattern = PATTERNS[name](u + offset[0], v + offset[1])
    noise = 0.3 * torch.randn(SIDE, SIDE, generator=generator)
    return (0.25 + pattern / 2 + noise).clamp(0, 1).expand(3, -1, -1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where train/ and test/ are to be, not there yet")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.exit(2, f"{folder} exists: choose another folder, or remove it\n")
    for split, count in (("train", 100), ("test", 50)):
        generator = torch.Generator().manual_seed(count)
        torch.manual_seed(count)
        for name in PATTERNS:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                save_image(draw(name, generator), folder / split / name / f"{i:03}.png")
    print(f"{folder}: 1000 images to train with, 500 to test, of {len(PATTERNS)} classes")


if __name__ == "__main__":
    main()
