"""A data set for a laptop: 2,000 + 500 gray images of ten patterns, which SimCLR tells apart.

    python tests/toy.py data/toy
    python simclr.py --data data/toy --size 16 --epochs 10 --batch-size 64 --out runs/toy

Classes are stripes of five directions, checkers, dots and the like: any crop shows which, at any
brightness. What differs within a class (period, place, brightness, contrast, noise) is what the
augmentation changes as well, so a network that learns to ignore the augmentation sees the class.
There is no color: images that keep their own under the jitter could be told apart by it alone.
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

    def between(low, high):
        return low + (high - low) * torch.rand((), generator=generator)

    period, offset = between(7, 11), torch.rand(2, generator=generator)
    v, u = torch.meshgrid(2 * [torch.arange(SIDE) / period], indexing="ij")
    pattern = PATTERNS[name](u + offset[0] * 4, v + offset[1] * 4)
    level, contrast = between(0.3, 0.7), between(0.2, 0.6)
    image = level + contrast * (pattern - 0.5)
    image = image + 0.05 * torch.randn(SIDE, SIDE, generator=generator)
    return image.clamp(0, 1).expand(3, -1, -1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where train/ and test/ are to be, not there yet")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.exit(2, f"{folder} exists: choose another folder, or remove it\n")
    for split, count in (("train", 200), ("test", 50)):
        generator = torch.Generator().manual_seed(count)
        torch.manual_seed(count)
        for name in PATTERNS:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                save_image(draw(name, generator), folder / split / name / f"{i:03}.png")
    print(f"{folder}: 2000 images to train with, 500 to test, of {len(PATTERNS)} classes")


if __name__ == "__main__":
    main()
