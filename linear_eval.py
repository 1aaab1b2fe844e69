"""Linear evaluation: how good are the features of a frozen backbone? One linear layer tells.

    python linear_eval.py runs/simsiam/checkpoint.pt           # what a script here has saved
    python linear_eval.py resnet50.pth --data FOLDER --size 224
    python linear_eval.py                                      # an untrained ResNet-18: the floor

On unaugmented images; the papers' augmented ones: -0.6 to +0.5 points in dkobak/simclr-cifar10.
"""

import argparse
import os
import re
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision import datasets, models, utils

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images

# ------------------------------------------------------------------ 1. Checkpoint
class StandIn:
    """In place of a class or function that torch refuses: none of it is imported or run."""
    def __init__(self, *args): ...
    __setstate__ = __init__

def read(path):
    """What torch.save wrote, StandIns for what torch refuses. Raises OSError, ValueError."""
    names = []
    while True:
        try:
            with torch.serialization.safe_globals([(StandIn, name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # names the next one, unless that could do harm
            why = str(error).rpartition("error: ")[2].strip().split("\n")[0]
            name = re.search(r"GLOBAL (\S+) was not an allowed global", why)
            if not name or name[1] in names:
                raise ValueError(f"{path}: {why}; torch.save its state_dict alone") from error
            names += [name[1], f"builtins.{name[1]}"]  # which torch leaves out of a name

def flatten(tree, place=""):
    """Nested dictionaries -> [("module.conv1.weight", tensor)] in order, without counters."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            yield f"{place}{name}", value
        yield from flatten(value, f"{place}{name}.")

def signature(tensors):
    """Shapes, and ends of names (a bias is as large as its weight); a 3x3 stem as a 7x7."""
    ends = [(tuple(t.shape), name.split(".")[-1]) for name, t in tensors]
    return [((64, 3, 7, 7), "weight") if end[0] == (64, 3, 3, 3) else end for end in ends]

def find_backbones(tensors):
    """torchvision's ResNets in [(name, tensor)], by shapes and ends of names, in order:
    {"module.encoder_q": (arch, state_dict)}; and of the closest the first misfit."""
    with torch.device("meta"):  # shapes alone, of all in half a second
        known = {a: build_backbone(a, False) for a in models.list_models(models, "*resne*")}
    known = {arch: list(flatten(network.state_dict())) for arch, network in known.items()}
    found, closest = {}, (-1, ("no convolution", torch.empty(0)))
    for i in [i for i, (_, t) in enumerate(tensors) if t.ndim == 4]:
        place = tensors[i][0].removesuffix("conv1.weight")
        own = re.compile(re.escape(place) + "(conv1|bn1|layer)")
        inside = {n for n, _ in tensors if own.match(n)}
        for arch, usual in known.items():
            part = tensors[i : i + len(usual)]
            if inside == {place + n for n, _ in usual}:  # its own names, in any order
                part = [(place + n, dict(tensors)[place + n]) for n, _ in usual]
            same = len(os.path.commonprefix([signature(part), signature(usual)]))
            rest = part[same:]
            if same == len(usual):
                where, _, _ = os.path.commonprefix([n for n, _ in part]).rpartition(".")
                near = [x for x in tensors if x[0].startswith(where and where + ".")]
                rest = [x for x in near if x[1].ndim == 4 and x[0] not in dict(part)]
                if not rest:  # else it goes on: another convolution is at this place
                    found[where or "top"] = arch, {n: x[1] for (n, _), x in zip(usual, part)}
            closest = max(closest, (same, (rest or tensors[-1:])[0]), key=lambda c: c[0])
    return found, closest[1]

def build_backbone(arch, small_stem, max_pool=None):
    """torchvision's ResNet without its classifier: (B, 3, S, S) -> (B, 512 or 2048)."""
    backbone = models.get_model(arch, zero_init_residual=True)
    backbone.fc = nn.Identity()
    if small_stem:  # that keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    if small_stem if max_pool is None else not max_pool:
        backbone.maxpool = nn.Identity()
    return backbone

def load_backbone(path, prefix=None, max_pool=None):
    """Any saved ResNet of torchvision's, and the arguments of a script here or {}; prints
    what it takes. A 3x3 stem means stride 1. Raises OSError, ValueError."""
    saved = read(path)
    networks, (name, t) = find_backbones(list(flatten(saved)))
    if not networks:
        raise ValueError(f"{path} is no torchvision ResNet: see {name} {[*t.shape]}")
    if prefix not in (None, *networks):
        raise ValueError(f"--prefix {prefix}: {path} has {', '.join(networks)}")
    copy = re.compile(r"(?i)mom|target|teacher|key|avg|swa|(^|[._])(ema|k|m|init)([._]|$)")
    place = prefix or min(networks, key=lambda n: (bool(copy.search(n)), n.count(".")))
    arch, state = networks[place]
    kernel = state["conv1.weight"].shape[2]
    backbone = build_backbone(arch, kernel == 3, max_pool)
    backbone.load_state_dict(state)
    pool = "without" if isinstance(backbone.maxpool, nn.Identity) else "with"
    print(f"{arch} from {place}, {kernel}x{kernel} stem {pool} max-pool")
    args = saved["args"] if isinstance(saved.get("args"), dict) else {}
    return backbone, args if args.get("method") in ("SimSiam", "BYOL", "SimCLR") else {}

# ------------------------------------------------------------------ 2. Data
def load_splits(args):
    """{"train": items, "test": items}, or without labels {"all": items}, in random order. An item
    is (picture or its path, label or -1). Raises OSError, ValueError."""
    if args.data in BUILT_IN:
        dataset, stl10 = getattr(datasets, args.data.upper()), args.data == "stl10"
        parts = {"train": "train" if stl10 else True, "test": "test" if stl10 else False}
        splits = {s: dataset(args.data_dir, part, download=True) for s, part in parts.items()}
    else:  # a folder, of which glob passes over what is hidden; a class is train/NAME/
        kinds = Image.registered_extensions()
        files = [Path(f) for f in sorted(glob("**/*.*", root_dir=args.data, recursive=True))]
        files = [f for f in files if "image/" in Image.MIME.get(kinds.get(f.suffix.lower()), "")]
        deep = [f for f in files if f.parts[2:]]
        sets = {s: [f for f in deep if f.parts[0] == s] for s in ("train", "test", "val")}
        names = {s: {f.parts[1:2] for f in sets[s]} for s in sets}
        tests = [s for s in ("test", "val") if set() < names[s] <= names["train"]]
        if names["train"] and not tests:
            more = sorted(name[0] for name in (names["test"] | names["val"]) - names["train"])
            raise ValueError(f"--data {args.data}: no test/ or val/; or not in train/: {more}")
        alone = [f for f in files if f.parts[0] == "train"] or files
        splits = {"train": sets["train"], "test": sets[tests[0]]} if tests else {"all": alone}
        number = {name: i for i, name in enumerate(sorted(names["train"]))}
        for s, files in splits.items():
            splits[s] = [(Path(args.data, f), number.get(f.parts[1:2], -1)) for f in files]
    for s, items in splits.items():
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
        splits[s] = torch.utils.data.Subset(items, order[: args.subset].tolist())
        if len(splits[s]) < 2:
            raise ValueError(f"--data {args.data}: {len(splits[s])} images, too few")
    return splits

def decode(items, args):
    """Items of a split, a few -> (N, 3, S, S) uint8. Raises ValueError."""
    side = args.size if args.size <= 64 or args.data in BUILT_IN else round(args.size * 8 / 7)

    def pixels(picture):  # or its path
        try:
            x = Image.open(picture) if isinstance(picture, Path) else picture
            assert x.mode == "I;16" or x.mode[0] not in "IF", f"{x.mode} has more than 8 bits"
            x = (x.point(lambda value: value / 256) if x.mode == "I;16" else x).convert("RGB")
            return TF.pil_to_tensor(TF.center_crop(TF.resize(x, side), args.size))
        except Exception as error:
            raise ValueError(f"cannot read {picture}: {error}") from error

    with ThreadPool(torch.get_num_threads()) as pool:
        return torch.stack(pool.map(pixels, [picture for picture, _ in items]))

# ------------------------------------------------------------------ 3. Features and neighbors
@torch.no_grad()
def extract_features(backbone, items, args):
    """The frozen backbone on the images as they are, 100 of them at a time: (N, D) float32."""
    backbone.eval().to(args.device, memory_format=torch.channels_last)
    h = torch.empty(len(items), backbone.inplanes)
    for rows in torch.arange(len(items)).split(100):
        x = decode([items[i] for i in rows.tolist()], args).to(args.device)
        h[rows] = backbone(TF.normalize(x / 255, MEAN, STD)).cpu()
    return h

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

def draw_neighbors(splits, saved, args):
    """Ten images, of the test split or all, each with its nearest of the others by cosine."""
    bank, last = list(splits)[0], list(splits)[-1]  # train and test, or all twice
    q, h = F.normalize(saved[last]["features"][:10]), F.normalize(saved[bank]["features"])
    nearest, items = (q @ h.T).topk(min(10, len(h))).indices, []  # (10, 10)
    for row, near in enumerate(nearest[:, bank == last :].tolist()):  # without itself, the first
        items += [splits[last][row]] + [splits[bank][i] for i in near]
    tiles = TF.resize(decode(items, args), [96, 96])
    utils.save_image(tiles / 255, args.neighbors, nrow=len(items) // len(q), pad_value=1)

# ------------------------------------------------------------------ 4. The linear layer
def fit(layer, h, y, decay, variance, axes):
    """L-BFGS from where the layer is; h (N, D) has covariance axes diag(variance) axes^T.
    The loss curves by at most covariance / 2 + decay (Boehning 1992); in units of its inverse
    root by at most 1 in each direction, and L-BFGS takes a fifth of the steps."""
    units = axes * (variance.clamp(min=0) / 2 + decay).rsqrt() @ axes.T  # (D, D)
    change = torch.zeros_like(layer.weight, requires_grad=True)  # (classes, D)
    settings = {"max_iter": 100, "tolerance_change": 1e-5, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([change, layer.bias], **settings)

    def closure():
        optimizer.zero_grad()
        total = 0
        for some, labels in zip(h.split(2**16), y.split(2**16)):  # all logits may not fit
            w = layer.weight.detach() + change @ units
            loss = F.cross_entropy(F.linear(some, w, layer.bias), labels)
            loss = (loss + decay / 2 * w.square().sum()) * len(some) / len(h)
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)
    layer.weight.data += change.detach() @ units

def linear_probe(h, y):
    """Logistic regression: features h (N, D), labels y (N,) -> nn.Linear for these, and the
    weight decay (for standardized ones) that did best on a tenth held out."""
    layer = nn.Linear(h.shape[1], int(y.max()) + 1, device=h.device)
    mean, std = h.mean(0), h.std(0).clamp(min=0.01 * h.std().item() + 1e-12)  # not 0
    order = torch.randperm(len(h)).to(h.device)
    h, y = h[order].sub_(mean).div_(std), y[order]  # one copy, features are large
    covariance = (h.T @ h / len(h)).double()  # of rank one in float32, eigh may return NaN
    variance, axes = (x.float() for x in torch.linalg.eigh(covariance))  # (D,), (D, D)
    held, hits = len(h) // 10, {}
    for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):  # each starts where the last one ended
        fit(layer, h[held:], y[held:], decay, variance, axes)
        hits[decay] = (layer(h[:held]).argmax(1) == y[:held]).sum().item()
    fit(layer, h, y, best := max(hits, key=hits.get), variance, axes)
    layer.weight.data /= std  # for h as they are
    layer.bias.data -= layer.weight.data @ mean
    return layer, best

# ------------------------------------------------------------------ 5. Main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cuda", "cpu", "mps"][not gpus :] + gpus
    add("checkpoint", nargs="?", help="any saved ResNet; without it an untrained one, the floor")
    add("--prefix", help="of several networks the one at this place, as it is printed")
    add("--max-pool", action=switch, help="after the stem; default: only after a 7x7 one")
    add("--data", help="cifar10, cifar100, stl10, a folder: train/NAME/, test/NAME/, or unlabeled")
    add("--data-dir", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="side of the images; this, --data, --data-dir: as in training")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--device", default=devices[0], choices=devices)
    add("--seed", type=int, default=0, help="of the held-out tenth and the untrained network")
    add("--features", type=Path, help="file for the splits' features, labels, paths or indices")
    add("--neighbors", type=Path, help="picture to draw: ten images and the nearest to each")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse_args(argv)
    for path in filter(None, (args.features, args.neighbors)):
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the work

    # Network
    path = args.checkpoint
    backbone, trained = load_backbone(path, args.prefix, args.max_pool) if path else (None, {})
    args.data = args.data or trained.get("data") or "cifar10"
    args.data_dir = args.data_dir or trained.get("data_dir") or "data"
    usual = 32 if backbone is None or backbone.conv1.stride == (1, 1) else 224
    args.size = args.size or trained.get("size") or BUILT_IN.get(args.data, usual)
    torch.manual_seed(args.seed)
    backbone = backbone or build_backbone("resnet18", args.size <= 64, args.max_pool)

    # Features
    splits, saved = load_splits(args), {}
    for split, items in splits.items():
        h, labels = extract_features(backbone, items, args), torch.tensor([y for _, y in items])
        paths = items.indices if args.data in BUILT_IN else [str(path) for path, _ in items]
        saved[split] = {"features": h, "labels": labels, "paths": paths}
        print(f"{split}: {len(h)} images of {args.size} px, {h.shape[1]} features")
    if args.features:
        torch.save(saved, args.features)
    if args.neighbors:
        draw_neighbors(splits, saved, args)

    # Accuracy
    if "test" in splits:
        device = args.device.replace("mps", "cpu")  # mps lacks eigh
        h, y, test_h, test_y = (s[x].to(device) for s in saved.values() for x in list(s)[:2])
        for k, temperature, votes in ((200, 0.1, "T=0.1"), (10, torch.inf, "unweighted")):
            knn = knn_accuracy(h, y, test_h, test_y, k, temperature)
            print(f"kNN top-1: {knn:.2f}% (k={min(k, len(h))}, {votes})")
        layer, decay = linear_probe(h, y)
        top1 = 100 * (layer(test_h).argmax(1) == test_y).float().mean()
        print(f"linear top-1: {top1:.2f}% (weight decay {decay})")

if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # one line, no traceback
        raise SystemExit(f"{error} (see --data FOLDER, --data-dir, --device cpu)") from None
