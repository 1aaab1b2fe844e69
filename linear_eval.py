"""Linear evaluation: how good are the features of a frozen backbone? One linear layer tells.

    python linear_eval.py runs/simsiam/checkpoint.pt           # what a script here has saved
    python linear_eval.py resnet50.pth --data FOLDER --size 224
    python linear_eval.py                                      # an untrained network: the floor

Reads any saved ResNet (18 to 152, wide, ResNeXt) whatever its keys: torchvision's names, or
the numbers of nn.Sequential(*resnet.children()), under any prefix, in nested dictionaries.

Protocol: the backbone in eval mode, without gradient; features of the unaugmented images, computed
once and standardized; multinomial logistic regression by L-BFGS, its weight decay chosen on a tenth
of the training set, then refit on all of it. The papers train that layer on augmented images; on
cached features the result is about the same (dkobak/simclr-cifar10: 85.6 cached, 85.0 augmented).
"""

import argparse
import io
import math
import os
import pickle
import re
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision import datasets, utils
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.models import resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # the candidates, on standardized features


# ------------------------------------------------------------------ 1. Checkpoint
def flatten(tree, prefix=""):
    """The tensors in nested dictionaries: {"a": {"b": tensor}} -> {"a.b": tensor}."""
    tensors = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            tensors |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value
    return tensors


def find_backbone(tensors):
    """{torchvision's name: name in tensors} of the ResNet in them, {} if there is none; of several
    the least nested that is no averaged copy (EMA, target, teacher)."""
    found, copies = [], re.compile(r"(?i)mom|target|teacher|key|avg|(^|[._])(ema|k|m)([._]|$)")
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)(conv1|0)\.weight", name)  # 0: child of an nn.Sequential
        if match and tensor.shape[1:2] == (3,):
            prefix = match[1]
            names = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
            stages = {int(n.split(".")[0]) for n in names if re.match(r"\d+\.0\.conv1", n)}
            children = {"0": "conv1", "1": "bn1"}
            children |= {str(n): f"layer{i}" for i, n in enumerate(sorted(stages), 1)}
            parts = [(name.partition("."), key) for name, key in names.items()]
            names = {children.get(head, head) + dot + rest: key for (head, dot, rest), key in parts}
            if "layer4.0.conv1.weight" in names:
                found.append((bool(copies.search(prefix)), prefix.count("."), names))
    return min(found, key=lambda candidate: candidate[:2])[2] if found else {}


def build_backbone(block, depths, small_stem, **widths):
    """torchvision's ResNet without its classifier: (B, 3, S, S) -> (B, D)."""
    backbone = resnet.ResNet(block, depths, zero_init_residual=True, **widths)
    backbone.fc = nn.Identity()
    if small_stem:  # that keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


def load_backbone(path):
    """A saved ResNet, (B, 3, S, S) -> (B, D), and the arguments saved with it ({} if none).

    Block, depths, widths and stem are read off the shapes: a 3x3 conv1 means the stem for small
    images. Raises FileNotFoundError, and ValueError where a tensor is missing or does not fit.
    """
    damage = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from it
    except (*damage, AssertionError, AttributeError) as error:
        reason = f"cannot be read ({type(error).__name__}): damaged, or not only tensors in it"
        raise ValueError(f"{path} {reason}") from error
    tensors = flatten(saved if isinstance(saved, dict) else {})
    names = find_backbone(tensors)
    if not names:
        raise ValueError(f"{path} is no checkpoint of a ResNet: no conv1 beside layer1 to layer4")
    shapes = {name: tensors[key].shape for name, key in names.items()}
    depths = [0, 0, 0, 0]
    for block in (re.match(r"layer([1-4])\.(\d+)\.", name) for name in shapes):
        if block:
            depths[int(block[1]) - 1] = max(depths[int(block[1]) - 1], int(block[2]) + 1)
    block, widths = resnet.BasicBlock, {}
    if "layer1.0.conv3.weight" in shapes:  # conv2 is (groups * width, width, 3, 3)
        block, (out, width, _, _) = resnet.Bottleneck, shapes["layer1.0.conv2.weight"]
        widths = {"groups": out // width, "width_per_group": width}
    backbone = build_backbone(block, depths, shapes["conv1.weight"][2] == 3, **widths)
    state = backbone.state_dict()
    for name in state:
        if name not in names and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{path}: the backbone's {name} is missing")
        if name in names and shapes[name] != state[name].shape:
            shape, other = tuple(state[name].shape), tuple(shapes[name])
            raise ValueError(f"{path}: {names[name]} is {other}, a ResNet's is {shape}")
        state[name] = tensors[names[name]] if name in names else state[name]
    for name in names:
        if name not in state and re.match(r"(conv1|bn1|layer\d)\.", name):
            raise ValueError(f"{path}: {names[name]} is not of torchvision's ResNet")
    backbone.load_state_dict(state)
    trained = saved.get("args")
    return backbone, trained if isinstance(trained, dict) else {}


# ------------------------------------------------------------------ 2. Data
def load_split(args, split):
    """Decode a split: (N, 3, S, S) uint8, labels (N,), -1: none. Raises OSError or ValueError."""
    if args.data in BUILT_IN:
        dataset = getattr(datasets, args.data.upper())
        try:
            part = split if args.data == "stl10" else split == "train"
            data = dataset(args.data_dir, part, download="RANK" not in os.environ)  # not torchrun
        except (OSError, RuntimeError) as error:
            raise OSError(f"{dataset.url}: {error}; see --data-dir and --data FOLDER") from error
    elif Path(args.data, split).is_dir():
        if len({str(find_classes(Path(args.data, s))) for s in ("train", split)}) > 1:
            raise ValueError(f"--data {args.data}: {split}/ has other classes than train/")
        data = datasets.ImageFolder(Path(args.data, split)).samples  # data[i]: a path, its label
    else:
        data = make_dataset(args.data, {"": -1}, IMG_EXTENSIONS, allow_empty=True)  # any depth
    if not data:
        raise FileNotFoundError(f"--data {args.data}: neither a folder of images nor {[*BUILT_IN]}")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(data))[: args.subset].tolist()

    def decode(i):
        im, label = data[i]  # the image, or its path
        try:
            im = im if args.data in BUILT_IN else Image.open(im)  # then 16 bits to 8, to RGB
            im = (im.point(lambda v: v / 256) if im.mode[:4] == "I;16" else im).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read {data[i][0]}: {error}") from error
        return TF.pil_to_tensor(TF.center_crop(TF.resize(im, args.size), args.size)), label

    with ThreadPool(torch.get_num_threads()) as pool:
        images, labels = zip(*pool.imap(decode, order, 100))  # by the hundred
    return torch.stack(images), torch.tensor(labels)


# ------------------------------------------------------------------ 3. Features and neighbors
@torch.no_grad()
def extract_features(backbone, images, device):
    """The frozen backbone on the images as they are: (N, 3, S, S) uint8 -> (N, D) float32."""
    backbone.eval()
    parts = images.split(500)
    return torch.cat([backbone(TF.normalize(x.to(device) / 255, MEAN, STD)) for x in parts])


def knn_accuracy(train_h, train_y, test_h, test_y, k, temperature):
    """Top-1 in % of the k nearest training images' vote, weighted by exp(cosine / temperature):
    Wu et al. 2018, Sec. 3.4. Features (N, D), labels (N,), on one device."""
    bank, hits = F.normalize(train_h, dim=1), 0
    for h, y in zip(F.normalize(test_h, dim=1).split(1000), test_y.split(1000)):
        cosine, nearest = (h @ bank.T).topk(min(k, len(bank)))  # (1000, k)
        votes = h.new_zeros(len(h), int(train_y.max()) + 1)  # (1000, classes)
        votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == y).sum().item()
    return 100 * hits / len(test_y)


# ------------------------------------------------------------------ 4. The linear layer
def fit_linear(h, y, weight_decay, layer):
    """Fit layer, in place, to features h (N, D) and labels y (N,): the minimum of the mean
    cross-entropy plus weight_decay / 2 * |weight|^2, by L-BFGS on all of them at once."""
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(h), y) + weight_decay / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def linear_probe(h, y, generator):
    """Fit to features h (N, D), not standardized, and labels y (N,) -> the linear layer for such
    features, and the weight decay chosen for it."""
    mean, std = h.mean(0), h.std(0).clamp(min=0.01 * h.std().item() + 1e-12)  # also of dead ones
    h = (h - mean) / std
    order = torch.randperm(len(h), generator=generator).to(h.device)
    held, rest = order[: len(h) // 10], order[len(h) // 10 :]
    layer = nn.Linear(h.shape[1], int(y.max()) + 1, device=h.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    hits = []
    for weight_decay in WEIGHT_DECAYS:  # from strong to weak, each starts where the last one ended
        fit_linear(h[rest], y[rest], weight_decay, layer)
        hits.append((layer(h[held]).argmax(1) == y[held]).sum().item())
    weight_decay = WEIGHT_DECAYS[hits.index(max(hits))]
    fit_linear(h, y, weight_decay, layer)
    with torch.no_grad():  # fold the standardization in: w (h - mean) / std + b
        layer.weight /= std
        layer.bias -= layer.weight @ mean
    return layer, weight_decay


# ------------------------------------------------------------------ 5. Pictures
def tsne(h, perplexity=30, steps=750):
    """A map on which neighbors stay neighbors: h (N, D) -> (N, 2). van der Maaten & Hinton 2008,
    with exact affinities, started from the two principal components, exaggeration for a third."""
    h = h - h.mean(0)
    squared = torch.cdist(h, h).square()
    squared = (squared / squared.mean().clamp(min=1e-12)).fill_diagonal_(
        torch.inf
    )  # no point is its own neighbor
    low, high = torch.full((2, len(h), 1), -20.0, device=h.device)
    high = -low
    for _ in range(40):  # bisection: the precision at which a point has `perplexity` neighbors
        middle = (low + high) / 2
        p = torch.softmax(-squared * middle.exp(), 1)  # (N, N), Eq. (1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)  # Sec. 2
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = (p + p.T) / (2 * len(p))
    y = 1e-4 * torch.linalg.svd(h, full_matrices=False)[0][:, :2] * len(h) ** 0.5
    velocity = torch.zeros_like(y)
    for step in range(steps):
        early = step < steps / 3
        q = 1 / (1 + torch.cdist(y, y).square()).fill_diagonal_(torch.inf)  # (N, N), Eq. (4)
        pull = (p * (12 if early else 1) - q / q.sum()) * q
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)  # Eq. (5)
        velocity = (0.5 if early else 0.8) * velocity - len(h) / 12 * gradient
        y = y + velocity
    return y


def palette(count):
    """Colors that can be told apart: (count, 3) uint8, once around the circle, dark every other."""
    turns = 6 * torch.arange(count)[:, None] / count
    rgb = (((turns + torch.tensor([0.0, 4, 2])) % 6 - 3).abs() - 1).clamp(0, 1)
    return (rgb * (255 - 90 * (torch.arange(count) % 2))[:, None]).byte()


def framed(images, colors, side, width):
    """Enlarge to side x side, with a frame: (N, 3, S, S) uint8, (N, 3) -> (N, 3, side, side)."""
    canvas = colors[:, :, None, None].repeat(1, 1, side, side)
    inner = F.interpolate(images, side - 2 * width)  # keeps the pixels
    canvas[:, :, width:-width, width:-width] = inner
    return canvas


def draw_neighbors(folder, train, test, guesses=9):
    """neighbors.png: a test image of each class (ten at most), then its nearest training images by
    cosine, framed green where the class is right, red where not. train, test: images, labels,
    features. Returns in % how many of the nearest of all test images are of the right class."""
    (images, y, h), (test_images, test_y, test_h) = train, test
    bank, guesses = F.normalize(h), min(guesses, len(h))
    chunks = F.normalize(test_h).split(1000)
    nearest = torch.cat([(q @ bank.T).topk(guesses).indices for q in chunks]).cpu()  # (N, 9)
    right = y[nearest] == test_y[:, None]
    shown = torch.stack([(test_y == c).nonzero()[0, 0] for c in test_y.unique()[:10]])
    red_green_white = torch.tensor([[220, 40, 40], [40, 180, 60], [255, 255, 255]]).byte()
    kinds = torch.cat([torch.full((len(shown), 1), 2), right[shown].long()], 1)  # (10, 10)
    rows = torch.cat([test_images[shown][:, None], images[nearest[shown]]], 1)  # (10, 10, 3, S, S)
    tiles = framed(rows.flatten(0, 1), red_green_white[kinds.flatten()], side=104, width=4)
    sheet = utils.make_grid(tiles, nrow=guesses + 1, padding=4, pad_value=255)
    utils.save_image(sheet / 255, folder / "neighbors.png")
    return 100 * right.float().mean().item()


def draw_map(folder, images, labels, h, names, side=1600, tile=36):
    """map.png and map_classes.png: the t-SNE of features h (N, D), as framed thumbnails, of several
    at one place only the first, and as points with the names of the classes."""
    y = tsne(F.normalize(h)).cpu()
    y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp(min=1e-12)  # (N, 2), both in 0-1
    colors = palette(len(names))
    canvas = torch.full((3, side, side), 255, dtype=torch.uint8)
    cells = (y * (side // tile - 1)).round().long()  # a thumbnail goes to its cell of a grid
    tiles = framed(images, colors[labels], tile, width=3)
    for i in range(len(y) - 1, -1, -1):
        left, top = (cells[i] * tile).tolist()
        canvas[:, top : top + tile, left : left + tile] = tiles[i]
    utils.save_image(canvas / 255, folder / "map.png")
    canvas.fill_(255)
    for c, color in enumerate(colors.tolist()):
        points = (y[labels == c] * (side - 40) + 20)[None]  # (1, n, 2)
        canvas = utils.draw_keypoints(canvas, points, colors=tuple(color), radius=5)
    height = max(side // 2, 14 * len(names) + 8)  # a hundred names are written smaller
    legend = torch.full((3, height, 120), 255, dtype=torch.uint8)
    bars = torch.tensor([[4, 14 * c + 4, 9, 14 * c + 14] for c in range(len(names))])
    rgb = [tuple(color) for color in colors.tolist()]
    words = [f"  {name}" for name in names]
    legend = utils.draw_bounding_boxes(legend, bars, words, rgb, width=3, label_colors="black")
    canvas = torch.cat([canvas, F.interpolate(legend[None], size=(side, 240))[0]], 2)
    utils.save_image(canvas / 255, folder / "map_classes.png")


def class_names(args):
    """The names of the classes of --data, in the order of the labels."""
    if args.data in BUILT_IN:
        return getattr(datasets, args.data.upper())(args.data_dir).classes
    return find_classes(Path(args.data, "train"))[0]


def print_classes(names, guesses, labels):
    """A line a class: its top-1, and the class that it is most often taken for."""
    confusion = torch.zeros(len(names), len(names))
    confusion.index_put_((labels, guesses), torch.ones(len(labels)), accumulate=True)
    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)  # (true, guessed) in %
    wrong = share.clone().fill_diagonal_(-1)
    for c, name in enumerate(names):
        other = int(wrong[c].argmax())
        taken = f", taken for {names[other]} {wrong[c, other]:.1f}%" if wrong[c, other] > 0 else ""
        print(f"    {name}: {share[c, c]:.1f}%{taken}")


# ------------------------------------------------------------------ 6. Main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="any saved ResNet; without it an untrained one, the floor")
    add("--data", help="cifar10, cifar100, stl10, or a folder with train/<class>/, test/<class>/")
    add("--data-dir", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="side of the images in pixels; all three: default as in training")
    add("--subset", type=int, help="use that many images of each split, drawn with the seed")
    add("--label-fraction", type=float, default=1.0, help="fit on that share of each class")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--seed", type=int, default=0, help="of held-out tenth, subset and untrained network")
    add("--pictures", help="new folder for neighbors.png, map.png and map_classes.png")
    add("--out", help="save the layer there: nn.Linear's state_dict, for raw features")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for flag, path in (("--out", args.out), ("--pictures", args.pictures)):
        if path and Path(path).exists():
            raise FileExistsError(f"{flag} {path} exists: choose another name")
    if not 0 < args.label_fraction <= 1:
        raise ValueError(f"--label-fraction {args.label_fraction} is not in 0 (excluded) to 1")
    for name, least in (("size", 8), ("subset", 1)):
        if vars(args)[name] is not None and vars(args)[name] < least:
            raise ValueError(f"--{name} {vars(args)[name]} is less than {least}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU is available, take --device cpu")
    backbone, trained = load_backbone(args.checkpoint) if args.checkpoint else (None, {})
    args.data = args.data or trained.get("data", "cifar10")
    args.data_dir = args.data_dir or trained.get("data_dir", "data")
    if not args.size:  # as in training; other built-in sets: their own
        small = backbone is None or backbone.conv1.stride == (1, 1)
        args.size = BUILT_IN.get(args.data, 32 if small else 224)
        if args.data == trained.get("data") or args.data not in BUILT_IN:
            args.size = trained.get("size", args.size)
    torch.manual_seed(args.seed)
    if backbone is None:
        backbone = build_backbone(resnet.BasicBlock, [2, 2, 2, 2], args.size <= 64)
    for path in (args.out and Path(args.out).parent, args.pictures):  # now, not after the work
        if path:
            Path(path).mkdir(parents=True, exist_ok=True)
    (train_x, train_y), (test_x, test_y) = load_split(args, "train"), load_split(args, "test")
    if len(train_x) < (args.subset or 0):
        raise ValueError(f"--subset {args.subset} is more than the {len(train_x)} images")
    if min(train_y.min(), test_y.min()) < 0:
        raise ValueError(f"--data {args.data}: no labels; needs train/<class>/ and test/<class>/")
    generator = torch.Generator().manual_seed(args.seed)
    if args.label_fraction < 1:  # of each class the same share, at least one image
        classes = [(train_y == c).nonzero()[:, 0] for c in train_y.unique()]
        shuffled = [c[torch.randperm(len(c), generator=generator)] for c in classes]
        keep = torch.cat([c[: max(1, round(args.label_fraction * len(c)))] for c in shuffled])
        train_x, train_y = train_x[keep], train_y[keep]
    backbone.to(device, memory_format=torch.channels_last)
    train_h, test_h = (extract_features(backbone, x, device) for x in (train_x, test_x))
    if not (train_h.isfinite().all() and test_h.isfinite().all()):
        raise ValueError(f"{args.checkpoint}: its features are not finite, nor is the network")
    train_y, test_y = train_y.to(device), test_y.to(device)
    counts = f"{len(train_h)} train and {len(test_h)} test images of {args.size} px"
    print(f"{counts}, {train_h.shape[1]} features")
    knn = knn_accuracy(train_h, train_y, test_h, test_y, k=200, temperature=0.1)
    print(f"kNN top-1: {knn:.2f}% (k=200, T=0.1)")
    knn = knn_accuracy(train_h, train_y, test_h, test_y, k=10, temperature=math.inf)
    print(f"kNN top-1: {knn:.2f}% (k=10, unweighted)")
    layer, weight_decay = linear_probe(train_h, train_y, generator)
    best = layer(test_h).topk(min(5, layer.out_features)).indices == test_y[:, None]  # (N, 5)
    print(f"linear top-5: {100 * best.any(1).float().mean():.2f}% (weight decay {weight_decay})")
    if args.out:
        torch.save(layer.state_dict(), buffer := io.BytesIO())
        Path(args.out).write_bytes(buffer.getvalue())  # on a full disk an OSError
    if args.pictures:
        names, folder = class_names(args), Path(args.pictures)
        print_classes(names, layer(test_h).argmax(1).cpu(), test_y.cpu())
        train, test = (train_x, train_y.cpu(), train_h), (test_x, test_y.cpu(), test_h)
        agree = draw_neighbors(folder, train, test)
        print(f"of its 9 nearest training images {agree:.1f}% are of a test image's class")
        few = torch.randperm(len(test_x), generator=generator)[:2000]
        draw_map(folder, test_x[few], test_y.cpu()[few], test_h[few.to(device)], names)
        print(f"see {folder}/neighbors.png, map.png, map_classes.png")
    print(f"linear top-1: {100 * best[:, 0].float().mean():.2f}%")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # one line, no traceback
        hint = "; try --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        argparse.ArgumentParser().exit(2, f"{sys.argv[0]}: {error}{hint}\n")
