"""The README's pictures of what was learned, from what the scripts have written.

    python linear_eval.py runs/toy/checkpoint.pt --features toy.pt
    python tests/plot.py neighbors toy.pt neighbors.png
    python tests/plot.py learning runs/simclr runs/byol learning.png --level pixels=41.1
    python tests/plot.py collapse runs/with runs/without collapse.png

The last two want matplotlib.
"""

import argparse
import csv
import sys
from importlib.util import find_spec
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


def column(run, name):
    """The epochs and values of a column of a run's log.csv, where there is a value."""
    rows = csv.DictReader(Path(run, "log.csv").read_text().splitlines())
    rows = [row for row in rows if row[name]]
    return [int(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


def learning(runs, out, levels):
    """kNN over the epochs of some runs, and a line for each of levels, {name: percent}."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for run in runs:
        ax.plot(*column(run, "kNN"), "o-", label=Path(run).name)
    for (name, percent), dashes in zip(levels.items(), ("--", ":", "-.")):
        ax.axhline(percent, linestyle=dashes, color="gray", label=name)
    ax.set(title="kNN accuracy (k = 200) on the test images", xlabel="epoch", ylabel="percent")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return ax


def collapse(runs, out):
    """Loss, spread and kNN over the epochs of some runs, side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for run in runs:
        for ax, name in zip(axes, ("loss", "spread", "kNN")):
            ax.plot(*column(run, name), "o-", label=Path(run).name if name == "loss" else None)
    axes[0].set(title="loss: negative cosine", xlabel="epoch")
    axes[1].set(title="spread of the predictions", xlabel="epoch", ylim=(0, 1.05))
    axes[2].set(title="kNN accuracy, percent", xlabel="epoch", ylim=(0, 50))
    figure.legend(loc="outside lower center", ncols=len(runs))
    figure.savefig(out, dpi=100)
    plt.close(figure)
    return axes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("kind", choices=["neighbors", "learning", "collapse"])
    add("source", nargs="+", help="file of linear_eval.py --features, or folders of runs")
    add("out", type=Path, help="picture to write")
    add("--level", nargs="*", default=[], metavar="NAME=PERCENT", help="lines in learning")
    args = parser.parse_args(argv)
    if find_spec("pillow_heif"):  # then linear_eval.py has read HEIC as well
        from pillow_heif import register_heif_opener

        register_heif_opener()
    if args.out.exists():
        sys.exit(f"{args.out} exists: choose another name")
    if args.kind == "neighbors":
        neighbors(args.source[0], args.out)
    elif args.kind == "learning":
        levels = [level.split("=") for level in args.level]
        learning(args.source, args.out, {name: float(percent) for name, percent in levels})
    else:
        collapse(args.source, args.out)


if __name__ == "__main__":
    main()
