"""Pictures of what was learned.

python linear_eval.py runs/toy/checkpoint.pt --features toy.pt
python tests/plot.py neighbors toy.pt neighbors.png
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE = 110  # of an image, in pixels
GAP = 10  # between images; three of them set the query apart


def neighbors(file, out, queries=4, count=7):
    """Some images of the test split, or of unlabeled ones, each with those of the training split
    whose features are nearest by the cosine; above an image its class, if it has one."""
    saved = torch.load(file)
    bank = saved["train"]
    asked = saved["test"] if len(saved["test"]["labels"]) > 0 else bank
    if not isinstance(bank["paths"][0], str):
        sys.exit(f"{file} knows no paths of images: make it with --data FOLDER")
    cosine = F.normalize(asked["features"][:queries]) @ F.normalize(bank["features"]).T
    if asked is bank:
        cosine.fill_diagonal_(-1)  # an image is no neighbor of its own
    count = min(count, len(bank["paths"]) - 1)

    step, height = SIDE + GAP, SIDE + 3 * GAP
    width = 3 * GAP + (count + 1) * step
    page = Image.new("RGB", (width, GAP + len(cosine) * height), "white")
    for row, nearest in enumerate(cosine.topk(count).indices.tolist()):
        paste(page, asked, row, GAP, GAP + row * height)
        for column, i in enumerate(nearest, start=1):
            paste(page, bank, i, 3 * GAP + column * step, GAP + row * height)
    page.save(out)


def paste(page, split, i, left, top):
    """Image i of a split, and above it the name of its class."""
    path = Path(split["paths"][i])
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    page.paste(ImageOps.fit(picture, (SIDE, SIDE)), (left, top + 2 * GAP))
    if split["labels"][i] >= 0:
        font = ImageFont.load_default(14)
        ImageDraw.Draw(page).text((left, top), path.parent.name, "black", font)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["neighbors"])
    parser.add_argument("source", help="file of linear_eval.py --features")
    parser.add_argument("out", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    if args.out.exists():
        sys.exit(f"{args.out} exists: choose another name")
    neighbors(args.source, args.out)


if __name__ == "__main__":
    main()
