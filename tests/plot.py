"""Pictures of what a network has learned, from files that the scripts here have written.

    python tests/plot.py neighbors FEATURES OUT    # pictures, each with the nearest to it
    python tests/plot.py pairs FEATURES OUT        # near-copies side by side, and a list
    python tests/plot.py map FEATURES OUT          # all pictures, similar ones close together
    python tests/plot.py learning RUN ... OUT      # kNN accuracy by epoch
    python tests/plot.py collapse RUN ... OUT      # the same with loss and spread

FEATURES is a file of linear_eval.py --features, RUN the folder of a training, OUT a new file.
Two pictures are near each other if the cosine of their features is large; copies have 1.
"""

import argparse
import csv
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps

sys.path.append(str(Path(__file__).resolve().parent.parent))
import linear_eval  # noqa: E402

ROWS, COLUMNS = 25, 8  # of pictures on a page, at most
SIDE, MAP_WIDTH = 144, 1400  # of a picture in rows, and of a map, in pixels
SPARE = 1.3  # places on a map for a picture, so that groups have a shape


def load_features(file):
    """What linear_eval.py --features has saved: features (N, D) of length 1; N pictures, the
    test split first, as {"name", "source": picture or path, "split", "class"}; and all."""
    saved, _ = linear_eval.read(file)
    if not {"train", "test", "args", "classes"}.issubset(saved):
        sys.exit(f"{file} has no features: make it by linear_eval.py CHECKPOINT --features FILE")
    pictures = []
    for split in ("test", "train"):
        paths = saved[split]["paths"]
        built_in = any(isinstance(path, int) for path in paths)  # places in a data set
        if built_in:
            listed = linear_eval.list_images(argparse.Namespace(**saved["args"]), split)
        for path, label in zip(paths, saved[split]["labels"].tolist()):
            if built_in:
                picture = {"name": f"{split} {path}", "source": listed[path][0]}
            else:
                picture = {"name": path, "source": Path(path)}
            name = saved["classes"][label] if label >= 0 else ""
            pictures.append(picture | {"split": split, "class": name})
    h = torch.cat([saved["test"]["features"], saved["train"]["features"]])
    return torch.nn.functional.normalize(h), pictures, saved


def draw(picture, side):
    """The middle of a picture; if it has been moved or deleted, a frame with its name."""
    try:
        # With a pixel to cut off large JPEGs are decoded small, which is faster
        return TF.to_pil_image(linear_eval.load_picture(picture["source"], side, side + 1))
    except Exception as error:
        print(f"not drawn: {picture['name']}: {error}")
        frame = ImageOps.expand(Image.new("RGB", (side - 2, side - 2), "white"), 1, "gray")
        name = "\n".join(wrap(Path(picture["name"]).name, 10))
        ImageDraw.Draw(frame).text((side // 20, side // 20), name, "gray", font_size=side / 7)
        return frame


def shorten(name, most=24):
    """On one line: "holiday in Rome 00000123.jpg" -> "holiday in ...000123.jpg"."""
    name = " ".join(name.encode(errors="replace").decode().split())
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}...{name[2 - most // 2 :]}"


def draw_rows(figure, rows, title):
    """Rows of (picture, [line below it, ...]), the first picture of each larger."""
    columns = max(3, *(len(row) for row in rows))
    figure.set_size_inches(1.6 * columns + 0.5, 2.1 * len(rows) + 0.3)
    widths = [1.3] + [1] * (columns - 1)
    axes = figure.subplots(len(rows), columns, squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for row, row_axes in zip(rows, axes):
        for (picture, lines), ax in zip(row, row_axes):
            ax.imshow(draw(picture, SIDE))
            ax.set_xlabel("\n".join(shorten(line) for line in lines), fontsize=7)
    figure.suptitle(title)


def neighbors(figure, args):
    """Some pictures, each with those of the training split that are nearest to it."""
    h, pictures, saved = load_features(args.source[0])
    asked = [*zip(h, pictures)]
    if args.queries:
        other_h, other_pictures, other = load_features(args.queries)
        asked = [*zip(other_h, other_pictures)]
        for name in ("checkpoint", "prefix", "size", "resize", "mean", "std"):
            if saved["args"][name] != other["args"][name]:
                sys.exit(f"{args.queries} was made with another {name} than {args.source[0]}")
    found = []
    for part in args.query:
        matches = [each for each in asked if part in each[1]["name"]]
        if not matches:
            sys.exit(f"--query {part}: in no path; one path is {asked[0][1]['name']}")
        found += matches
    if not args.query:
        found = asked if args.queries else asked[:4]

    rows = []
    for query, picture in found[:ROWS]:
        row = [picture]
        cosines = h @ query
        print(picture["name"])
        for i in cosines.argsort(descending=True, stable=True).tolist():
            itself = pictures[i]["name"] == picture["name"]
            if pictures[i]["split"] == "train" and not itself and len(row) < COLUMNS:
                print(f"  {cosines[i]:.3f}  {pictures[i]['name']}")
                row.append(pictures[i])
        rows.append([(each, [each["class"] or Path(each["name"]).name]) for each in row])
    draw_rows(figure, rows, f"pictures (at most {ROWS}), each with the nearest training pictures")


def pairs(figure, args):
    """Near-copies, each group in a row, copies of copies too, with cosines to the first. A list
    beside it has a line for each group: the largest cosine, and all paths, with tabs between."""
    from sklearn.cluster import DBSCAN

    h, pictures, _ = load_features(args.source[0])
    if (h[:100] @ h.T > args.above).sum() > 100 * 1000:  # their list would fill the memory
        sys.exit(f"a picture has over 1000 copies above {args.above}: choose a larger --above")
    clusters = DBSCAN(eps=max(1e-6, 1 - args.above), min_samples=2, metric="cosine")
    numbers = torch.tensor(clusters.fit_predict(h.numpy()))  # (N,), in blocks; -1: in no group
    groups = []
    for number in range(int(numbers.max()) + 1):
        group = (numbers == number).nonzero().flatten().tolist()
        group.sort(key=lambda i: (len(pictures[i]["name"]), pictures[i]["name"]))
        cosines = (h[group] @ h[group[0]]).tolist()
        groups.append((max(cosines[1:]), group, cosines))
    if not groups:
        sys.exit(f"no two pictures are above {args.above}: choose a smaller --above")

    rows = []
    list_file = args.out.with_suffix(".txt")
    with list_file.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for largest, group, cosines in sorted(groups, reverse=True):
            writer.writerow([f"{largest:.4f}", *(pictures[i]["name"] for i in group)])
            row = []
            for i, cosine in zip(group[:COLUMNS], cosines):
                path = Path(pictures[i]["name"])
                row.append((pictures[i], [path.name, path.parent.name, f"cosine {cosine:.3f}"]))
            rows.append(row)
    print(f"{len(groups)} groups of near-copies, all of them in {list_file}")
    draw_rows(figure, rows[:ROWS], f"near-copies: the closest of {len(rows)} groups")


def place(args):
    """At most --count pictures, drawn at random from the test split if there is one; places
    (n, 2) in 0-1 by t-SNE (van der Maaten and Hinton 2008); and the names of the classes."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    h, pictures, saved = load_features(args.source[0])
    shown = len(saved["test"]["labels"]) or len(pictures)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(shown, generator=generator)[: args.count]
    n = len(order)
    places = torch.zeros(n, 2)
    if n > 1:
        h = h[order] + 1e-6 * torch.randn(n, h.shape[1], generator=generator)  # if all are equal
        h = PCA(min(50, *h.shape), random_state=args.seed).fit_transform(h)
        verbose = 2 if sys.stdout.isatty() else 0  # 2: a line every 50 iterations
        tsne = TSNE(perplexity=min(30, (n - 1) / 3), random_state=args.seed, verbose=verbose)
        places = torch.tensor(tsne.fit_transform(h))
    places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-9)
    return [pictures[i] for i in order.tolist()], places, saved["classes"]


def choose_colors(names):
    """{name: color}, all different."""
    import matplotlib.colors

    colormap = matplotlib.colormaps["tab10" if len(names) <= 10 else "gist_rainbow"]
    colors = colormap.resampled(len(names))
    return {name: matplotlib.colors.to_hex(colors(i)) for i, name in enumerate(names)}


def picture_map(figure, args):
    """Pictures on a grid, each near its place by t-SNE, framed in the color of its class."""
    from matplotlib.patches import Patch
    from scipy.optimize import linear_sum_assignment

    chosen, places, classes = place(args)
    columns = int((1.5 * SPARE * len(chosen)) ** 0.5) + 1  # the page is 3 wide, 2 high
    rows = int(SPARE * len(chosen) / columns) + 1
    cells = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
    centers = (cells + 0.5) / torch.tensor([columns, rows])
    _, assigned = linear_sum_assignment(torch.cdist(places, centers).square())

    side = MAP_WIDTH // columns
    frame = max(2, side // 12)
    colors = choose_colors(classes)
    height = rows * side + 30 * ((len(classes) + 9) // 10)  # a line for ten names
    figure.set_size_inches(columns * side / figure.dpi, height / figure.dpi)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="upper center", ncols=10, frameon=False)
    for part in linear_eval.track(range(len(chosen)), "map"):
        for i in part:
            picture = draw(chosen[i], side - 2 * frame)
            picture = ImageOps.expand(picture, frame, colors.get(chosen[i]["class"], "white"))
            figure.figimage(picture, *(side * cells[assigned[i]]).tolist())


def color_map(figure, args):
    """The same pictures as points, by class, and beside it by --groups of classes."""
    chosen, places, classes = place(args)
    if not classes:
        sys.exit(f"{args.source[0]} has no classes; without --color a map shows the pictures")
    panels = [{name: [name] for name in classes}]
    if args.groups:
        groups = [group.partition("=") for group in args.groups]
        panels.append({name: members.split(",") for name, _, members in groups})
        unknown = set(sum(panels[1].values(), [])).difference(classes)
        if unknown:
            sys.exit(f"--groups: there is no class {unknown}, only {', '.join(classes)}")
    figure.set_size_inches(8 * len(panels), 6)
    for panel, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        ax.scatter(*places.T, s=1, color="lightgray")  # those in no group
        for name, color in choose_colors(panel).items():
            inside = torch.tensor([picture["class"] in panel[name] for picture in chosen])
            ax.scatter(*places[inside].T, s=8, color=color, label=name)
        ax.set(xticks=[], yticks=[], title=f"t-SNE of the features of {len(chosen)} pictures")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(panel) // 25)


def curves(figure, args):
    """kNN of runs by epoch, and --level NAME=PERCENT as lines; or loss and spread, too."""
    panels = {"kNN": "kNN accuracy (k = 200), percent"}
    if args.kind == "collapse":
        panels = {"loss": "loss", "spread": "spread of the predictions", **panels}
    figure.set_size_inches(9, 3.4)
    for name, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for run in args.source:
            rows = csv.DictReader(Path(run, "log.csv").read_text().splitlines())
            rows = [row for row in rows if row[name]]
            epochs = [int(row["epoch"]) for row in rows]
            ax.plot(epochs, [float(row[name]) for row in rows], "o-", label=Path(run).name)
        for i, level in enumerate(args.level):
            label, percent = level.split("=")
            ax.axhline(
                float(percent), linestyle=("--", ":", "-.")[i % 3], color="gray", label=label
            )
        ax.set(title=panels[name], xlabel="epoch")
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("kind", choices=("neighbors", "pairs", "map", "learning", "collapse"))
    add("source", nargs="+", help="one file of features; for learning and collapse: runs")
    add("out", type=Path, help="new file, .png, .jpg, .pdf or .svg")
    add("--query", nargs="+", default=[], help="neighbors: of pictures with this in their path")
    add("--queries", metavar="FEATURES", help="neighbors: of the pictures in this other file")
    add("--above", type=float, default=0.95, help="pairs: least cosine; default: 0.95")
    add("--color", action="store_true", help="map: points, in the colors of their classes")
    add("--groups", nargs="+", metavar="GROUP=CLASS,CLASS", help="map: color these, too")
    add("--count", type=int, default=2000, help="map: most pictures; default: 2000")
    add("--seed", type=int, default=0, help="map: of their choice and of t-SNE; default: 0")
    add("--level", nargs="+", default=[], metavar="NAME=PERCENT", help="learning: lines")
    args = parser.parse_args(argv)
    if not (find_spec("matplotlib") and find_spec("sklearn")):
        sys.exit("pictures need two more packages: pip install matplotlib scikit-learn")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        sys.exit(f"{args.out}: the name of a picture ends in .png, .jpg, .pdf or .svg")
    if args.out.exists():
        sys.exit(f"{args.out} exists: choose another name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("pillow_heif"):  # then linear_eval.py has read HEIC as well
        from pillow_heif import register_heif_opener

        register_heif_opener()
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a "$" in a name is a "$"
    draw_map = color_map if args.color or args.groups else picture_map
    functions = {"neighbors": neighbors, "pairs": pairs, "map": draw_map}
    figure = Figure(layout="constrained")
    functions.get(args.kind, curves)(figure, args)
    figure.savefig(args.out)
    print(f"drawn: {args.out}".ljust(60))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # odd file names
    main()
