"""Pictures of what a network has learned, from files that the scripts here have written.

    python tests/plot.py neighbors FEATURES OUT    # pictures, each with the nearest to it
    python tests/plot.py pairs FEATURES OUT        # near-copies side by side, and a list
    python tests/plot.py map FEATURES OUT          # pictures, similar ones close together
    python tests/plot.py learning RUN ... OUT      # kNN accuracy by epoch
    python tests/plot.py collapse RUN ... OUT      # the same with loss and spread

FEATURES is a file of linear_eval.py --features (run this where that ran), RUN the folder of a
training, OUT a new file. Pictures are near if the cosine of their features is near 1.
"""

import argparse
import csv
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps

sys.path.append(str(Path(__file__).resolve().parent.parent))
import linear_eval  # noqa: E402

ROWS, COLUMNS = 25, 8  # of pictures on a page, at most
SIDE, MAP_WIDTH = 144, 1400  # of a picture in rows, and of a map, in pixels
SPARE = 1.3  # places on a map per picture; the empty ones give groups a shape


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
            kind = saved["classes"][label] if label >= 0 else ""
            pictures.append(picture | {"split": split, "class": kind})
    if not built_in and not any(picture["source"].exists() for picture in pictures):
        sys.exit(f"no picture of {file} is there ({path}): run this where linear_eval.py ran")
    h = torch.cat([saved["test"]["features"], saved["train"]["features"]])
    return torch.nn.functional.normalize(h), pictures, saved


def draw(picture, side):
    """The middle of a picture; if it has been moved or deleted, a frame with its name."""
    try:
        # With one pixel more to cut off, load_picture decodes large JPEGs small: faster
        return TF.to_pil_image(linear_eval.load_picture(picture["source"], side, side + 1))
    except Exception as error:
        print(f"not drawn: {picture['name']}: {error}")
        frame = ImageOps.expand(Image.new("RGB", (side - 2, side - 2), "white"), 1, "gray")
        name = shorten(Path(picture["name"]).name)
        ImageDraw.Draw(frame).text((3, side // 3), name, "gray", font_size=max(1, side / 14))
        return frame


def shorten(name):
    """At most 24 letters: "holiday in Rome 00000123.jpg" -> "holiday in ...000123.jpg"."""
    name = " ".join(name.encode(errors="replace").decode().split())  # one line that can be drawn
    return name if len(name) <= 24 else f"{name[:11]}...{name[-10:]}"


def draw_rows(figure, rows, title):
    """Rows of (picture, [line below it, ...]), the first picture of each larger."""
    columns = max(3, *(len(row) for row in rows))
    figure.set_size_inches(1.6 * columns + 0.5, 2.1 * len(rows) + 0.3)
    widths = [1.3] + [1] * (columns - 1)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(len(rows), columns, squeeze=False, width_ratios=widths, subplot_kw=bare)
    for row, row_axes in zip(rows, axes):
        for (picture, lines), ax in zip(row, row_axes):
            ax.imshow(draw(picture, SIDE))
            ax.set_xlabel("\n".join(shorten(line) for line in lines), fontsize=7)
    figure.suptitle(title)


def neighbors(figure, args, h, pictures, saved):
    """Some pictures, each with those of the training split that are nearest to it."""
    asked = [*zip(h, pictures)]
    if args.queries:
        other_h, other_pictures, other = load_features(args.queries)
        asked = [*zip(other_h, other_pictures)]
        for name in ("checkpoint", "prefix", "max_pool", "seed", "size", "resize", "mean", "std"):
            if saved["args"][name] != other["args"][name]:
                sys.exit(f"{args.queries} was made with another {name} than {args.source[0]}")
    found, rows = [], []
    for part in args.query:
        matches = [(query, picture) for query, picture in asked if part in picture["name"]]
        if not matches:
            sys.exit(f"--query {part}: in no path; one path is {asked[0][1]['name']}")
        found += matches
    if not args.query:
        found = asked if args.queries else asked[:4]

    for query, picture in found[:ROWS]:
        print(picture["name"])
        row = [(picture, [picture["class"] or Path(picture["name"]).name])]
        cosines = h @ query
        for i in cosines.argsort(descending=True, stable=True).tolist():
            near = pictures[i]
            if near["split"] == "train" and near is not picture and len(row) < COLUMNS:
                print(f"  {cosines[i]:.3f}  {near['name']}")
                text = near["class"] or Path(near["name"]).name
                row.append((near, [text, f"cosine {cosines[i]:.3f}"]))
        rows.append(row)
    draw_rows(figure, rows, f"each picture with its nearest (at most {ROWS} pictures)")


def pairs(figure, args, h, pictures, saved):
    """Near-copies, each group in a row, copies of copies too, with cosines to the nearest in it.
    The list beside it has a line for each group: its largest cosine, its paths, tab-separated."""
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    if (h[:100] @ h.T > args.above - 1e-6).sum() > 100 * 1000:  # on average
        sys.exit(f"pictures have over 1000 copies above {args.above}: choose a larger --above")
    print(f"comparing {len(h)} pictures; 10,000 take half a minute")
    clusters = DBSCAN(eps=1 - args.above + 1e-6, min_samples=2, metric="cosine")  # in blocks
    numbers = torch.tensor(clusters.fit_predict(h.numpy()))  # (N,); -1: in no group
    if numbers.max() < 0:
        sys.exit(f"no two pictures are above {args.above}: choose a smaller --above")
    distances, _ = NearestNeighbors(n_neighbors=1, metric="cosine").fit(h.numpy()).kneighbors()
    cosines = 1 - torch.tensor(distances[:, 0])  # (N,) of each picture and its nearest
    groups, rows = [], []
    for number in range(int(numbers.max()) + 1):
        group = (numbers == number).nonzero().flatten().tolist()
        group.sort(key=lambda i: (-round(cosines[i].item(), 4), len(pictures[i]["name"])))
        groups.append((cosines[group[0]].item(), group))

    list_file = args.out.with_suffix(".txt")
    with list_file.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for largest, group in sorted(groups, reverse=True):
            writer.writerow([f"{largest:.4f}", *(pictures[i]["name"] for i in group)])
            row = []
            for i in group[:COLUMNS]:
                path = Path(pictures[i]["name"])
                note = f"cosine {cosines[i]:.3f}, {len(row) + 1} of {len(group)}"
                row.append((pictures[i], [path.name, path.parent.name, note]))
            rows.append(row)
    print(f"{len(groups)} groups of near-copies, all of them in {list_file}")
    draw_rows(figure, rows[:ROWS], f"near-copies: the closest of {len(rows)} groups")


def place(args, h, pictures, saved):
    """At most --count pictures, drawn at random from the test split if there is one; places
    (n, 2) in 0-1 by t-SNE (van der Maaten and Hinton 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    shown = len(saved["test"]["labels"]) or len(pictures)
    torch.manual_seed(args.seed)
    order = torch.randperm(shown)[: args.count]
    n = len(order)
    places = torch.zeros(n, 2)
    if n > 1:
        h = h[order] + 1e-6 * torch.randn(n, h.shape[1])  # in case all are equal
        h = PCA(min(50, *h.shape), random_state=args.seed).fit_transform(h)
        verbose = 2 if sys.stdout.isatty() else 0  # 2: a line every 50 iterations
        tsne = TSNE(perplexity=min(30, (n - 1) / 3), random_state=args.seed, verbose=verbose)
        places = torch.tensor(tsne.fit_transform(h))
    places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-9)
    return [pictures[i] for i in order.tolist()], places


def choose_colors(names):
    """{name: color}, all different."""
    import matplotlib.colors

    colormap = matplotlib.colormaps["tab10" if len(names) <= 10 else "gist_rainbow"]
    colors = colormap.resampled(len(names))
    return {name: matplotlib.colors.to_hex(colors(i)) for i, name in enumerate(names)}


def picture_map(figure, args, h, pictures, saved):
    """Pictures on a grid, each near its place by t-SNE, framed in the color of its class."""
    from matplotlib.patches import Patch
    from scipy.optimize import linear_sum_assignment

    chosen, places = place(args, h, pictures, saved)
    columns = int((1.5 * SPARE * len(chosen)) ** 0.5) + 1  # the page is 3 wide, 2 high
    rows = int(SPARE * len(chosen) / columns) + 1
    cells = torch.cartesian_prod(torch.arange(columns), torch.arange(rows))
    centers = (cells + 0.5) / torch.tensor([columns, rows])
    _, assigned = linear_sum_assignment(torch.cdist(places, centers).square())

    side = MAP_WIDTH // columns
    frame = max(2, side // 12)
    colors = choose_colors(saved["classes"])
    in_line = MAP_WIDTH // (60 + 8 * max(len(name) for name in [*colors, ""]))  # names of classes
    height = rows * side + 30 * ((len(colors) + in_line - 1) // in_line)
    figure.set_size_inches(columns * side / figure.dpi, height / figure.dpi)
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="upper center", ncols=in_line, frameon=False, fontsize=9)
    for part in linear_eval.track(range(len(chosen)), "map"):
        for i in part:
            picture = draw(chosen[i], side - 2 * frame)
            picture = ImageOps.expand(picture, frame, colors.get(chosen[i]["class"], "white"))
            figure.figimage(picture, *(side * cells[assigned[i]]).tolist())


def color_map(figure, args, h, pictures, saved):
    """The same pictures as points, by class, and beside it by --groups of classes."""
    panels = [{name: [name] for name in saved["classes"]}]
    if not panels[0]:
        sys.exit(f"{args.source[0]} has no classes; without --color a map shows the pictures")
    if args.groups:
        groups = [group.partition("=") for group in args.groups]
        panels.append({name: members.split(",") for name, _, members in groups})
    for name, members in panels[-1].items():
        if not set(members).issubset(panels[0]):
            sys.exit(f"--groups {name}={','.join(members)}: the classes are {', '.join(panels[0])}")
    chosen, places = place(args, h, pictures, saved)
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
    panels = {"kNN": "kNN accuracy, percent"}
    if args.kind == "collapse":
        panels = {"loss": "loss", "spread": "spread of the predictions", **panels}
    for name, ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        for run in args.source:
            rows = csv.DictReader(Path(run, "log.csv").read_text().splitlines())
            rows = [row for row in rows if row[name]]
            epochs = [int(row["epoch"]) for row in rows]
            ax.plot(epochs, [float(row[name]) for row in rows], "o-", label=run)
        ax.set(title=panels[name], xlabel="epoch")
    for i, level in enumerate(args.level):  # in the last panel, of kNN
        label, percent = level.split("=")
        ax.axhline(float(percent), linestyle=("--", ":", "-.")[i % 3], color="gray", label=label)
    ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("kind", choices=("neighbors", "pairs", "map", "learning", "collapse"))
    add("source", nargs="+", help="one file of features; for learning and collapse: runs")
    add("out", type=Path, help="new file, .png, .jpg, .pdf or .svg")
    add("--query", nargs="+", default=[], help="neighbors: of pictures with this in their path")
    add("--queries", metavar="FEATURES", help="neighbors: of the pictures in this other file")
    add("--above", type=float, default=0.95, help="pairs: least cosine, 0-1; default: 0.95")
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
    for file in (args.out, args.out.with_suffix(".txt")):  # the list of pairs
        if file.exists():
            sys.exit(f"{file} exists: choose another name")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if find_spec("pillow_heif"):  # then linear_eval.py has read HEIC as well
        from pillow_heif import register_heif_opener

        register_heif_opener()
    import matplotlib.figure

    matplotlib.rcParams["text.parse_math"] = False  # a "$" in a name is a "$"
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    functions = {"neighbors": neighbors, "pairs": pairs, "map": picture_map}
    if args.color or args.groups:
        functions["map"] = color_map
    if args.kind in functions:
        functions[args.kind](figure, args, *load_features(*args.source))
    else:
        curves(figure, args)
    figure.savefig(args.out)
    print(f"drawn: {args.out}".ljust(60))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # odd file names
    main()
