"""Linear evaluation: how good are the features of a frozen backbone? One linear layer tells.

    python linear_eval.py runs/simsiam/checkpoint.pt           # what a script here has saved
    python linear_eval.py resnet50.pth --data FOLDER --size 224
    python linear_eval.py                                      # an untrained ResNet-18: the floor

Features of the unaugmented images, computed once. The papers train the layer on augmented ones,
which makes less than a point of difference in dkobak/simclr-cifar10.
"""

import argparse
import re
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision import datasets, utils
from torchvision.models import resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images

# ------------------------------------------------------------------ 1. Checkpoint
def find_backbones(tree, path=""):
    """Every ResNet in nested dictionaries: its place, "module.encoder_q.", and state_dict."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield from find_backbones(value, f"{path}{name}.")
        stem = re.fullmatch(r"(.*?)(conv1|0)\.weight", str(name))  # 0: by nn.Sequential
        if stem and getattr(value, "shape", ())[1:2] == (3,):
            at = {n: t for n, t in tree.items() if getattr(t, "nbytes", 0) > 8}  # no counters
            at = {n.removeprefix(stem[1]): t for n, t in at.items() if n.startswith(stem[1])}
            parts = [(n.replace("shortcut", "downsample").partition("."), at[n]) for n in at]
            stages = sorted({h for (h, _, rest), _ in parts if rest.startswith("0.conv1.")})
            names = {"conv1": "conv1", "bn1": "bn1", "0": "conv1", "1": "bn1"}
            names |= {stage: f"layer{i}" for i, stage in enumerate(stages, 1)}
            state = {f"{names[h]}.{rest}": t for (h, _, rest), t in parts if h in names}
            if len(stages) == 4:
                yield path + stem[1], state

def build_backbone(block, depths, small_stem, **widths):
    """torchvision's ResNet without its classifier: (B, 3, S, S) -> (B, D)."""
    backbone = resnet.ResNet(block, depths, zero_init_residual=True, **widths)
    backbone.fc = nn.Identity()
    if small_stem:  # that keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone

def load_backbone(path):
    """Any saved ResNet (18 to 152, wide, ResNeXt), and the arguments of a script here or {}.
    A 3x3 conv1 means stride 1 without max-pool. Raises OSError, ValueError."""
    with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        except Exception as error:
            raise ValueError(f"{path} is damaged or not only tensors: save those") from error
    networks = list(find_backbones(saved))
    if not networks:
        raise ValueError(f"{path} is no checkpoint of a ResNet: no conv1, layer1 to layer4")
    copy = re.compile(r"(?i)mom|target|teacher|key|avg|(^|[._])(ema|k|m)([._]|$)")  # are last
    _, state = min(networks, key=lambda n: (bool(copy.search(n[0])), n[0].count(".")))
    depths = [len({n.split(".")[1] for n in state if n[:6] == f"layer{i}"}) for i in "1234"]
    block, widths = resnet.BasicBlock, {}
    if "layer1.0.conv3.weight" in state:  # conv2 is (groups * width, width, 3, 3)
        block, (out, width, _, _) = resnet.Bottleneck, state["layer1.0.conv2.weight"].shape
        widths = {"groups": out // width, "width_per_group": width}
    backbone = build_backbone(block, depths, state["conv1.weight"].shape[2] == 3, **widths)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:  # names the tensor
        raise ValueError(f"{path}: {' '.join(str(error).split())[:500]}") from error
    args = saved["args"] if isinstance(saved.get("args"), dict) else {}
    return backbone, args if args.get("method") in ("SimSiam", "BYOL", "SimCLR") else {}

# ------------------------------------------------------------------ 2. Data
def load_split(args, split):
    """Decode a split: (N, 3, S, S) uint8, labels (N,), class names. Raises OSError, ValueError."""
    if args.data in BUILT_IN:
        part = split if args.data == "stl10" else split == "train"
        try:
            data = getattr(datasets, args.data.upper())(args.data_dir, part, download=True)
        except (OSError, RuntimeError) as error:
            ways = "see --data-dir and --data FOLDER"
            raise OSError(f"--data {args.data}: {error}; {ways}") from error
        names = data.classes
    else:  # a folder, of which glob passes over what is hidden; a class is train/NAME/
        kinds = Image.registered_extensions()
        files = [Path(f) for f in sorted(glob("**/*.*", root_dir=args.data, recursive=True))]
        files = [f for f in files if "image/" in Image.MIME.get(kinds.get(f.suffix.lower()), "")]
        in_class = {s: [f for f in files if f.parts[0] == s and f.parts[2:]]
                    for s in ("train", "test", "val")}
        classes = {s: {f.parts[1] for f in in_class[s]} for s in in_class}
        tests = [s for s in ("test", "val") if set() < classes[s] <= classes["train"]]
        if not tests:
            more = sorted((classes["test"] or classes["val"]) - classes["train"])
            why = f"train/ has no class {more}" if more else "no train/<class>/ and test/<class>/"
            raise ValueError(f"--data {args.data}: {why}; see --data-dir, --data FOLDER")
        names = sorted(classes["train"])
        files = in_class[tests[0] if split == "test" else "train"]
        data = [(Path(args.data, f), names.index(f.parts[1])) for f in files]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.subset]
    if len(order) < 2:
        raise ValueError(f"--data {args.data}: at least two images of each split, also of --subset")
    side = args.size if args.size <= 64 or args.data in BUILT_IN else round(args.size * 8 / 7)

    def decode(i):
        picture, label = data[i]  # or its path
        try:
            x = picture if args.data in BUILT_IN else Image.open(picture)
            if x.mode[0] in "IF" and x.mode != "I;16":
                raise ValueError(f"{x.mode} has more than 8 bits")
            x = (x.point(lambda value: value / 256) if x.mode == "I;16" else x).convert("RGB")
            return TF.pil_to_tensor(TF.center_crop(TF.resize(x, side), args.size)), label
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {picture}: {error}") from error

    with ThreadPool(torch.get_num_threads()) as pool:
        images, labels = zip(*pool.imap(decode, order.tolist(), 100))  # by the hundred
    return torch.stack(images), torch.tensor(labels), names

# ------------------------------------------------------------------ 3. Features and neighbors
@torch.no_grad()
def extract_features(backbone, x, device):
    """The frozen backbone on the images as they are: (N, 3, S, S) uint8 -> (N, D) float32."""
    backbone.eval().to(device, memory_format=torch.channels_last)
    return torch.cat([backbone(TF.normalize(b.to(device) / 255, MEAN, STD)) for b in x.split(500)])

def knn_accuracy(h, y, test_h, test_y, k, temperature):
    """Top-1 in % of the k nearest training images' vote, weighted by exp(cosine / temperature):
    Wu et al. 2018, Sec. 3.4. Features (N, D), labels (N,), on one device."""
    bank, hits = F.normalize(h), 0
    for q, true in zip(F.normalize(test_h).split(500), test_y.split(500)):
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))  # (500, k)
        votes = h.new_zeros(len(q), int(y.max()) + 1)  # (500, classes)
        votes.scatter_add_(1, y[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == true).sum().item()
    return 100 * hits / len(test_y)

# ------------------------------------------------------------------ 4. The linear layer
def linear_probe(h, y):
    """Logistic regression by L-BFGS: features h (N, D), labels y (N,) -> nn.Linear for these,
    and the weight decay (on standardized features) that did best on a tenth held out."""
    mean, std = h.mean(0), h.std(0).clamp(min=0.01 * h.std().item() + 1e-12)  # not 0
    variance, axes = torch.linalg.eigh(((h - mean) / std).T.cov())  # (D,), (D, D)
    h = ((h - mean) / std) @ axes  # standardized, then turned to the principal axes
    held, rest = torch.randperm(len(h)).to(h.device).tensor_split([len(h) // 10])
    layer = nn.Linear(h.shape[1], int(y.max()) + 1, device=h.device)

    def fit(h, y, decay):
        scale = (variance.clamp(min=0) / 2 + decay).rsqrt()  # of units in which the loss
        layer.weight.data /= scale  # curves alike on all axes: a quarter of L-BFGS's steps
        flags = {"max_iter": 100, "tolerance_change": 1e-5, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(layer.parameters(), **flags)

        def closure():
            optimizer.zero_grad()
            w = layer.weight * scale
            loss = F.cross_entropy(h @ w.T + layer.bias, y) + decay / 2 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        layer.weight.data *= scale

    hits = {}
    for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):  # each starts where the last one ended
        fit(h[rest], y[rest], decay)
        hits[decay] = (layer(h[held]).argmax(1) == y[held]).sum().item()
    fit(h, y, decay := max(hits, key=hits.get))
    layer.weight.data = (layer.weight.data @ axes.T) / std  # for h as they are
    layer.bias.data -= layer.weight.data @ mean
    return layer, decay

# ------------------------------------------------------------------ 5. Pictures
def tsne(h, perplexity=30, steps=750):
    """A map that keeps neighbors: h (N, D) -> (N, 2). van der Maaten & Hinton 2008, exact."""
    squared = torch.cdist(h, h).square().fill_diagonal_(torch.inf)  # no point neighbors itself
    beta, width = torch.zeros_like(h[:, :1]), 10  # (N, 1), log(1 / 2 sigma^2) of each point, by
    for _ in range(40):  # bisection until exp(entropy), its number of neighbors, is perplexity
        p = torch.softmax(-squared * beta.exp(), 1)  # (N, N), Eq. (1)
        wide = torch.special.entr(p).sum(1, keepdim=True).exp() > min(perplexity, len(h) / 3)
        beta, width = beta + torch.where(wide, width, -width), width / 2
    p = (p + p.T) / (2 * len(p))  # Sec. 3.1
    u, _, _ = torch.linalg.svd(h - h.mean(0), full_matrices=False)
    y, velocity = 1e-4 * len(h) ** 0.5 * u[:, :2], 0
    for step in range(steps):  # a third exaggerated, after Sec. 3.4, by today's usual numbers
        exaggeration, momentum = (12, 0.5) if step < steps / 3 else (1, 0.8)
        q = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(torch.inf)  # (N, N), Eq. (4)
        pull = (exaggeration * p - q / q.sum()) * q
        force = pull.sum(1, keepdim=True) * y - pull @ y  # a fourth of the gradient, Eq. (5)
        velocity = momentum * velocity - len(h) / exaggeration * force
        y = y + velocity
    return y

def framed(images, colors, side, width):
    """Resized, with a frame: (N, 3, S, S) uint8, (N, 3) -> (N, 3, side, side)."""
    tiles = colors[:, :, None, None].repeat(1, 1, side, side)
    tiles[:, :, width:-width, width:-width] = F.interpolate(images, side - 2 * width)
    return tiles

def draw_neighbors(folder, images, y, h, test_images, test_y, test_h):
    """A row a class (ten at most): a test image, its nine nearest training images by cosine, framed
    green for its class, red for another. Returns in % how many of all are green."""
    nearest = (F.normalize(test_h) @ F.normalize(h).T).topk(min(9, len(h))).indices.cpu()  # (N, 9)
    right = y[nearest] == test_y[:, None]  # 0 will be red, 1 green
    rows = [int((test_y == c).nonzero()[0, 0]) for c in test_y.unique()[:10]]
    tiles = torch.cat([test_images[rows][:, None], images[nearest[rows]]], 1)  # (10, 10, 3, S, S)
    colors = F.pad(200 * F.one_hot(right[rows].long(), 3), (0, 0, 1, 0), value=255)  # RGB
    tiles = framed(tiles.flatten(0, 1), colors.flatten(0, 1).byte(), side=104, width=4)
    utils.save_image(tiles / 255, folder / "neighbors.png", nrow=len(colors[0]), pad_value=1)
    return 100 * right.float().mean().item()

def draw_map(folder, images, labels, h, names):
    """map.png: the t-SNE of features h (N, D) as framed thumbnails, one where several would lie;
    map_classes.png: the same as points, with the names of the classes."""
    y = tsne(F.normalize(h)).cpu()
    y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp(min=1e-12)  # (N, 2), both in 0-1
    hues = torch.arange(len(names))[:, None] / len(names) * 6 + torch.tensor([0, 4, 2])
    colors = ((((hues % 6) - 3).abs() - 1).clamp(0, 1) * 255).byte()  # once around the circle
    canvas = torch.full((3, 1620, 1620), 255, dtype=torch.uint8)
    corners = (y * 44).round().long() * 36  # a grid of 45 x 45 thumbnails
    for (left, top), tile in zip(corners.tolist(), framed(images, colors[labels], 36, width=3)):
        canvas[:, top : top + 36, left : left + 36] = tile
    utils.save_image(canvas / 255, folder / "map.png")
    side = min(max(810, 14 * len(names) + 12), 2800)  # names of 200 classes at most
    legend = [[side + 2, 14 * c + 8, side + 7, 14 * c + 19] for c in range(len(names))]
    points = (y * (side - 10)).repeat(1, 2) + torch.tensor([2, 2, 7, 7])
    boxes = torch.cat([points, torch.tensor(legend)])  # (N + classes, 4) in pixels
    colors = [tuple(c) for c in torch.cat([colors[labels], colors]).tolist()]
    words = [""] * len(y) + [f"  {name}" for name in names]
    canvas = torch.full((3, side, side + 120), 255, dtype=torch.uint8)
    canvas = utils.draw_bounding_boxes(canvas, boxes, words, colors, width=3, label_colors="black")
    utils.save_image(F.interpolate(canvas[None] / 255, scale_factor=2), folder / "map_classes.png")

# ------------------------------------------------------------------ 6. Main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="any saved ResNet; without it an untrained one, the floor")
    add("--data", help="cifar10, cifar100, stl10, or a folder with train/<class>/, test/<class>/")
    add("--data-dir", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="side of the images; this, --data, --data-dir: as in training")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--seed", type=int, default=0, help="of the held-out tenth and the untrained network")
    add("--pictures", type=Path, help="folder for neighbors.png, map.png and map_classes.png")
    add("--out", type=Path, help="save the layer there: nn.Linear's state_dict, for raw features")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is available, take --device cpu")
    backbone, trained = load_backbone(args.checkpoint) if args.checkpoint else (None, {})
    args.data = args.data or trained.get("data") or "cifar10"
    args.data_dir = args.data_dir or trained.get("data_dir") or "data"
    usual = 32 if backbone is None or backbone.conv1.stride == (1, 1) else 224
    args.size = args.size or trained.get("size") or BUILT_IN.get(args.data, usual)
    torch.manual_seed(args.seed)
    backbone = backbone or build_backbone(resnet.BasicBlock, [2, 2, 2, 2], args.size <= 64)
    drawn = ("neighbors.png", "map.png", "map_classes.png") if args.pictures else ()
    for path in (*(args.pictures / name for name in drawn), *filter(None, [args.out])):
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the work
    train_x, train_y, names = load_split(args, "train")
    test_x, test_y, _ = load_split(args, "test")
    h, test_h = (extract_features(backbone, x, args.device) for x in (train_x, test_x))
    if not (h.isfinite().all() and test_h.isfinite().all()):
        raise ValueError(f"{args.checkpoint}: its features are not finite, nor is the network")
    print(f"{len(h)} train and {len(test_h)} test images of {args.size} px, {h.shape[1]} features")
    y, t = train_y.to(args.device), test_y.to(args.device)
    for k, temperature, votes in ((200, 0.1, "T=0.1"), (10, torch.inf, "unweighted")):
        knn = knn_accuracy(h, y, test_h, t, k, temperature)
        print(f"kNN top-1: {knn:.2f}% (k={min(k, len(h))}, {votes})")
    layer, decay = linear_probe(h, y)
    right = layer(test_h).topk(min(5, layer.out_features)).indices == t[:, None]  # (N, 5)
    print(f"linear top-5: {100 * right.any(1).float().mean():.2f}% (weight decay {decay})")
    if args.out:
        torch.save(layer.cpu().state_dict(), args.out)
    if args.pictures:
        for c in test_y.unique().tolist():
            print(f"    {names[c]}: {100 * right[t == c, 0].float().mean():.1f}%")
        some = test_x[:2000], test_y[:2000], test_h[:2000]  # they are in random order
        agree = draw_neighbors(args.pictures, train_x, train_y, h, *some)
        print(f"{agree:.1f}% of the neighbors of {len(some[0])} test images are of their class")
        draw_map(args.pictures, *some, names)
    print(f"linear top-1: {100 * right[:, 0].float().mean():.2f}%")

if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # one line, no traceback
        hint = "; try --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        argparse.ArgumentParser().exit(2, f"linear_eval.py: {error}{hint}\n")
