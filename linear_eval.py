"""Linear evaluation: how good are the features of a frozen backbone? One linear layer tells.

    python linear_eval.py runs/simsiam/checkpoint.pt     # what a script here has saved
    python linear_eval.py resnet50.pth --data FOLDER --size 224
    python linear_eval.py                                # an untrained ResNet-18: the floor

The folder has images as train/CLASS/1.jpg and test/CLASS/2.jpg. kNN is reported, too.

The untrained network is initialized as is usual in torchvision. As the training scripts do it
(zero_init_residual: blocks add nothing at first) the floor would be too low.

A ResNet is found in a file by torchvision's names of its tensors, after any prefix. Other
names will do if the tensors are in torchvision's order and the last parts of their names
("weight") agree. The rest is assumed: mean and std of the pixels (see --mean and --std); a
max-pool after a 7x7 stem only (see --max-pool); stride and padding of 1 in a 3x3 stem;
BatchNorm's eps and the place of strides as in torchvision; no blur-pooling.
"""

import argparse
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models


# ------------------------------------------------------------------ 1. Checkpoint
class StandIn:
    """In the place of an object of an unknown type, no code of which is imported or run."""

    def __init__(self, *args): ...

    def __setstate__(self, state): ...


def read(path):
    """Returns what torch.save or safetensors wrote, and the names of types that torch does
    not trust, whose objects are StandIns. Exits if the file does not open safely."""
    path = Path(path)
    if path.is_dir():
        sys.exit(f"{path} is a folder: name a file in it")
    if not path.exists():
        sys.exit(f"there is no file {path}")
    if path.suffix == ".safetensors" and not find_spec("safetensors"):
        sys.exit(f"{path}: to open it, pip install safetensors")
    list_unsafe = torch.serialization.get_unsafe_globals_in_checkpoint
    unsafe = []
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), []
        if zipfile.is_zipfile(path):  # which older files than torch 1.6's are not
            unsafe = sorted(list_unsafe(path))
        with torch.serialization.safe_globals([(StandIn, name) for name in unsafe]):
            return torch.load(path, map_location="cpu", weights_only=True), unsafe
    except Exception as error:  # its reason, without torch's advice to open the file unsafely
        lines = str(error).split("\n\nCheck the documentation")[0].strip().split("\n")
        why = lines[-1].strip().split(". ")[0]  # the last line's first sentence
    with path.open("rb") as file:
        start = file.read(500)
    old_sign = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # before torch 1.6
    if path.suffix != ".safetensors" and b"/data" not in start and old_sign not in start:
        sys.exit(f"{path}: nothing that torch.save wrote; it begins with {start[:30]}")
    why += f"; unsafe: {unsafe}. Is it complete?"
    sys.exit(f"{path} does not open: {why} Save a state_dict() alone")


def find_tensors(tree, place=""):
    """{"state_dict.module.conv1.weight": tensor, ...} of nested dictionaries and lists, in
    order, without those that count batches or were left by a profiler."""
    if isinstance(tree, torch.Tensor):
        counters = ("num_batches_tracked", "total_ops", "total_params")
        return {} if place.endswith(counters) else {place: tree}
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    tensors = {}
    if isinstance(tree, dict):
        for name, branch in tree.items():
            tensors |= find_tensors(branch, f"{place}.{name}".removeprefix("."))
    return tensors


def is_network(names, tensors, wanted):
    """Whether these names in {name: tensor} match the wanted ones by shape and last part, and
    no more tensors are in their conv1, bn1, layer1 to layer4, as in a deeper network."""
    modules = set()
    for name, mine in zip(names, wanted):
        if name not in tensors or tensors[name].shape != wanted[mine].shape:
            return False
        if name.split(".")[-1] != mine.split(".")[-1]:
            return False
        if "downsample" not in mine:  # "module.layer4.1.bn2.weight": "module.layer4."
            modules.add(name.rsplit(".", mine.count("."))[0] + ".")
    return {name for name in tensors if name.startswith(tuple(modules))}.issubset(names)


def find_backbones(tensors):
    """torchvision's ResNets, also wide ones and ResNeXts, in {name: tensor}:
    {"module.conv1.weight": (arch, names of the tensors, state_dict)}."""
    found = {}
    names = list(tensors)
    prefixes = [n.removesuffix("conv1.weight") for n in names if n.endswith("conv1.weight")]
    for arch, small_stem in product(models.list_models(models, "*resne*"), (False, True)):
        with torch.device("meta"):  # shapes alone
            network = build_backbone(arch, small_stem, max_pool=True)
        wanted = find_tensors(network.state_dict())
        candidates = []
        for prefix in prefixes:  # by name
            candidates.append([prefix + name for name in wanted])
        for i in range(len(names) - len(wanted) + 1):  # by order
            candidates.append(names[i : i + len(wanted)])
        for candidate in candidates:
            if is_network(candidate, tensors, wanted):
                state = {mine: tensors[name] for mine, name in zip(wanted, candidate)}
                found.setdefault(candidate[0], (arch, candidate, state))
    return found


def rank(place):
    """Sort key: originals before copies, then the less nested before the more nested."""
    words = place.lower().replace("_", ".").split(".")
    copies = ["momentum", "target", "teacher", "key", "k", "m", "ema", "swa", "avg"]
    copies += ["average", "averaged", "shadow", "slow", "copy", "old", "loss", "init"]
    return any(word in copies for word in words), place.count(".")  # False comes first


def count_between(names):
    """How many modules lie between bn1 and layer1 by an nn.Sequential's numbers: bn1 "1",
    layer1 "4" -> 2 (ReLU and max-pool); 1 is ReLU alone. None if there are no numbers."""
    bn1 = names[1].split(".")  # e.g. ["features", "1", "weight"]; names[1:5] are bn1's
    layer1 = names[5].split(".")  # e.g. ["features", "4", "0", "conv1", "weight"]
    at = len(bn1) - 2  # where the number of bn1 is
    if bn1[:at] == layer1[:at] and bn1[at].isdigit() and layer1[at].isdigit():
        return int(layer1[at]) - int(bn1[at]) - 1
    return None


def build_backbone(arch, small_stem, max_pool):
    """torchvision's ResNet without its classifier: (B, 3, S, S) -> (B, 512 or 2048)."""
    backbone = models.get_model(arch)
    backbone.fc = nn.Identity()
    if small_stem:  # it keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    if not max_pool:
        backbone.maxpool = nn.Identity()
    return backbone


def load_backbone(path, prefix="", max_pool=None):
    """Returns the network in a file (of several --prefix picks one), the name of its first
    tensor, and the arguments of its training if a script here has saved it, else {}."""
    saved, unsafe = read(path)
    tensors = find_tensors(saved)
    found = find_backbones(tensors)
    if not found:
        first = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()][:3]
        message = f"no torchvision ResNet in {len(tensors)} tensors [{', '.join(first)}]"
        if unsafe:
            message += f"; if it is in what torch does not read, {unsafe[:5]}, "
            message += "save a state_dict()"
        sys.exit(f"{path}: {message}")
    places = [place for place in found if place.startswith(prefix)]
    if not places:
        sys.exit(f"--prefix {prefix}: {path} has {', '.join(found)}")
    place = min(places, key=rank)
    arch, names, state = found[place]
    if not all(tensor.isfinite().all() for tensor in state.values()):
        sys.exit(f"{path}: not all the numbers from {place} on are finite")

    kernel = state["conv1.weight"].shape[2]
    between = count_between(names)  # None: not known
    if max_pool is None:
        max_pool = kernel == 7 and between not in (0, 1)
    backbone = build_backbone(arch, kernel == 3, max_pool)
    backbone.load_state_dict(state)  # it may lack num_batches_tracked, as old files do
    if between == 0:
        backbone.relu = nn.Identity()  # the stem's; blocks have their own
    print(f"{arch}: {place} and on, run with ReLU {between != 0}, max-pool {max_pool}")
    root = place.rpartition("conv1.weight")[0]  # "module." of "module.conv1.weight"
    others = set()
    for name in tensors.keys() - names:
        if name.startswith(root):
            others.add(name.removeprefix(root).split(".")[0])
    print(f"beside it, not run: {', '.join(sorted(others)) or 'nothing'}")
    if len(found) > 1:
        print(f"networks there, to choose by --prefix: {', '.join(found)}")
    ours = isinstance(saved, dict) and {"backbone", "network", "log", "args"}.issubset(saved)
    return backbone, place, (saved["args"] if ours else {})


# ------------------------------------------------------------------ 2. Data
def list_images(args, split):
    """[(picture or path, label)] of "train" or "test"; label -1: none."""
    if args.data == "stl10":
        return datasets.STL10("data", split, download=True)  # the labeled images alone
    if args.data in ("cifar10", "cifar100"):
        dataset = getattr(datasets, args.data.upper())
        return dataset("data", train=split == "train", download=True)

    def find(pattern):
        files = sorted(glob(pattern, root_dir=args.data, recursive=True))  # no hidden ones
        return [Path(file) for file in files if datasets.folder.is_image_file(file)]

    files = {"train": find("train/*/**/*"), "test": find("test/*/**/*")}  # as train/cat/1.jpg
    names = sorted({file.parts[1] for file in files["train"]})
    if not names:  # without classes: the images in train/, or all there are
        files = {"train": find("train/**/*") or find("**/*"), "test": []}
        if not files["train"]:
            sys.exit(f"--data {args.data}: no images (nor is it cifar10, cifar100 or stl10)")
        if split == "train":  # to say it once
            print(f"no labels: classes are the folders in {args.data}/train; there are none")
        return [(Path(args.data, file), -1) for file in files[split]]
    if not files["test"] and split == "train":
        print(f"no test images in {args.data}/test: no kNN")
    for file in files["test"]:
        if file.parts[1] not in names:
            sys.exit(f"{args.data}/{file}: there is no class {file.parts[1]} in train")
    return [(Path(args.data, file), names.index(file.parts[1])) for file in files[split]]


def count_pictures(folder):
    """How many files end as pictures do. Prints how many end otherwise."""
    pictures, others = 0, Counter()
    for file in glob("**/*", root_dir=folder, recursive=True):
        if datasets.folder.is_image_file(file):
            pictures += 1
        elif Path(folder, file).is_file():
            others[Path(file).suffix.lower() or "without an ending"] += 1
    if others:
        counts = [f"{count} {ending}" for ending, count in others.most_common(10)]
        print("passed over:", ", ".join(counts))
    if others[".heic"] + others[".heif"] > 0:
        print("to read .heic: pip install pillow_heif")
    return pictures


def list_splits(args):
    """{"train": [(picture or path, label)], "test": ...}; says what of a folder is left out."""
    if find_spec("pillow_heif"):  # then HEIC can be read
        from pillow_heif import register_heif_opener

        register_heif_opener()
        datasets.folder.IMG_EXTENSIONS += (".heic", ".heif")
    pictures = count_pictures(args.data)  # 0 for a built-in set
    listed = {split: list_images(args, split) for split in ("train", "test")}
    outside = pictures - len(listed["train"]) - len(listed["test"])
    if outside > 0:
        print(f"passed over: {outside} pictures not in {args.data}/train, or not in a class")
    return listed


def class_names(listed, folder):
    """Names of the classes 0, 1, ... in the [(picture or path, label)] of "train"."""
    if isinstance(listed, datasets.VisionDataset):
        return listed.classes
    return sorted({path.relative_to(folder).parts[1] for path, label in listed if label >= 0})


def choose(listed, count, args):
    """Indices into [(picture or path, label)]: the first --subset of a fixed shuffle. With a
    count, at most that many of these, the same number of each class, drawn by --seed."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(listed), generator=generator)[: args.subset]
    if count is not None:
        generator.manual_seed(args.seed)
        order = order[torch.randperm(len(order), generator=generator)]
        labels = torch.tensor([label for _, label in listed])[order]
        classes = labels.unique()
        order = torch.cat([order[labels == c][: count // len(classes)] for c in classes])
    return order.tolist()


def load_picture(source, size, resize):
    """A picture or its path -> (3, size, size) uint8: upright, resized, the middle of it."""
    picture = Image.open(source) if isinstance(source, Path) else source
    if picture.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel")
    if resize > size:  # for networks of others; ours have seen JPEGs decoded in full
        picture.draft("RGB", (2 * resize, 2 * resize))  # large JPEGs small, 4x as fast
    picture = ImageOps.exif_transpose(picture).convert("RGB")  # upright
    return TF.pil_to_tensor(TF.center_crop(TF.resize(picture, resize), size))


# ------------------------------------------------------------------ 3. Features
def track(order, name):
    """Yields batches of 100 and prints how far it is: on a terminal in a line that rewrites
    itself, in a file every thousand images."""
    began = time.time()
    for start in range(0, len(order), 100):
        line = f"{name}: {start} of {len(order)} images"
        if start > 0:
            minutes = (time.time() - began) / 60 / start * (len(order) - start)
            line += f", {minutes:.1f} minutes left"
        if sys.stdout.isatty():
            print(line.ljust(60), end="\r", flush=True)
        elif start > 0 and start % 1000 == 0:
            print(line)
        yield order[start : start + 100]


@torch.no_grad()
def extract_features(backbone, args, split, listed, count=None):
    """Returns {"features": (N, D), "labels": (N,), "paths": N paths, or indices into a
    built-in set} of images not augmented, and ["path: reason", ...] of those not read."""
    backbone.eval().to(args.device, memory_format=torch.channels_last)
    features = [torch.empty(0, backbone.inplanes)]  # if nothing can be read; inplanes is D
    labels, paths = [], []
    passed_over = []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for batch in track(choose(listed, count, args), split):  # few pictures at once
            pictures = []
            items = [listed[i] for i in batch]
            jobs = [pool.submit(load_picture, x, args.size, args.resize) for x, _ in items]
            for i, (source, label), job in zip(batch, items, jobs):
                try:
                    pictures.append(job.result())
                except Exception as error:
                    passed_over.append(f"{source}: {error}")
                    continue
                labels.append(label)
                paths.append(str(source) if isinstance(source, Path) else i)
            if pictures:
                x = torch.stack(pictures).to(args.device) / 255
                features.append(backbone(TF.normalize(x, args.mean, args.std)).cpu())
    if listed:
        sizes = f"resized to {args.resize} px, cut to {args.size} px"
        print(f"{split}: {len(labels)} images, {sizes}, {backbone.inplanes} features")
    labels = torch.tensor(labels, dtype=torch.int64)
    return {"features": torch.cat(features), "labels": labels, "paths": paths}, passed_over


def knn_accuracy(bank, labels, queries, truth, k=200, temperature=0.1):
    """Top-1 in %: the k nearest in the bank vote on the class. Wu et al. 2018, Sec. 3.4."""
    bank, hits = F.normalize(bank), []
    for part, y in zip(F.normalize(queries).split(1000), truth.split(1000)):  # to save memory
        cosine, nearest = (part @ bank.T).topk(min(k, len(bank)))  # (1000, k)
        weights = (cosine.cpu() / temperature).exp()  # of the votes
        votes = torch.zeros(len(part), int(labels.max()) + 1)  # (1000, classes)
        votes.scatter_add_(1, labels[nearest.cpu()], weights)  # each neighbor for its class
        hits.append(votes.argmax(1) == y)
    return 100 * torch.cat(hits).float().mean().item()


# ------------------------------------------------------------------ 4. The linear layer
def fit(layer, h, y, decay, covariance):
    """Minimizes mean cross-entropy + decay / 2 * |weight|^2 by L-BFGS, preconditioned: the
    Hessian of the weights is about at most covariance / 2 + decay (Boehning 1992), and they
    are learned in a basis in which this bound is the identity."""
    bound = covariance / 2 + decay * torch.eye(len(covariance)).to(covariance)
    basis = torch.linalg.cholesky(bound).inverse().float()  # (D, D); till here in float64
    change = torch.zeros_like(layer.weight, requires_grad=True)  # (classes, D), in the basis
    settings = {"max_iter": 100, "tolerance_change": 1e-5, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([change, layer.bias], **settings)

    def closure():
        optimizer.zero_grad()
        w = layer.weight.detach() + change @ basis
        loss = F.cross_entropy(F.linear(h, w, layer.bias), y) + decay / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    layer.weight.data += change.detach() @ basis


def linear_probe(h, y):
    """Logistic regression: features h (N, D), labels y (N,) -> nn.Linear for these, and the
    weight decay (on standardized features) that did best on a tenth held out."""
    layer = nn.Linear(h.shape[1], int(y.max()) + 1, device=h.device)
    mean = h.mean(0)
    std = h.std(0).clamp(min=0.01 * h.std().item() + 1e-12)  # never 0
    order = torch.randperm(len(h)).to(h.device)
    h = h[order].sub_(mean).div_(std)  # one copy, features are large
    y = y[order]
    covariance = sum(x.double().T @ x.double() for x in h.split(1000)) / len(h)
    held = len(h) // 10
    hits = {}
    # Each fit starts from the last. With 50 to 1000 labels, to try 10 and 1 as well was worse
    for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        fit(layer, h[held:], y[held:], decay, covariance)
        hits[decay] = (layer(h[:held]).argmax(1) == y[:held]).sum().item()
    best = max(hits, key=hits.get)  # on a tie the strongest
    fit(layer, h, y, best, covariance)
    layer.weight.data /= std  # for features that are not standardized
    layer.bias.data -= layer.weight.data @ mean
    return layer, best


def print_accuracy(train, test, device):
    """Top-1 of kNN and of a linear layer, both of which know the training images."""
    h, y = train["features"].to(device), train["labels"]
    test_h, test_y = test["features"].to(device), test["labels"]
    for k, temperature in ((200, 0.1), (10, torch.inf)):  # at infinity all votes are equal
        knn = knn_accuracy(h, y, test_h, test_y, k, temperature)
        print(f"kNN top-1: {knn:.2f}% (k={min(k, len(h))}, temperature {temperature})")
    layer, decay = linear_probe(h, y.to(device))
    top1 = 100 * (layer(test_h).argmax(1).cpu() == test_y).float().mean().item()
    chosen = "best on a tenth held out" if len(y) >= 10 else "not chosen: under 10 images"
    print(f"linear top-1: {top1:.2f}% (weight decay {decay}, {chosen})")


# ------------------------------------------------------------------ 5. Main
def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("checkpoint", nargs="?", help="a saved ResNet; without it an untrained one")
    add("--prefix", default="", help="take the network whose tensors' names start so")
    add("--max-pool", action=switch, help="of a saved network; None: if its stem is 7x7")
    add("--mean", type=float, nargs=3, default=(0.485, 0.456, 0.406), help="of RGB in 0-1")
    add("--std", type=float, nargs=3, default=(0.229, 0.224, 0.225), help="of RGB in 0-1")
    add("--data", help="cifar10, cifar100, stl10, a folder; None: as trained, else cifar10")
    add("--size", type=int, help="in pixels; None: as trained, else 32 (3x3 stem) or 224")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--labels", type=int, help="train on at most so many images, as many of each class")
    add("--seed", type=int, default=0, help="of --labels, held-out tenth, untrained network")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1")
    add("--features", help="new file to save features, labels and paths in")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.features:
        features_file = Path(args.features)
        unread_file = features_file.with_name(f"{features_file.name}.passed-over.txt")
        for file in (features_file, unread_file):
            if file.exists():
                sys.exit(f"{file} exists: choose another name for --features")
        features_file.parent.mkdir(parents=True, exist_ok=True)
        part_file = features_file.with_name(f"{features_file.name}.part")
        part_file.touch()  # where nothing can be written this fails, and not after an hour
        part_file.unlink()

    # Network
    torch.manual_seed(args.seed)
    place, trained = None, {}
    if args.checkpoint:
        backbone, place, trained = load_backbone(args.checkpoint, args.prefix, args.max_pool)
        small_stem = backbone.conv1.kernel_size == (3, 3)
        args.size = args.size or trained.get("size", 32 if small_stem else 224)
    else:
        args.size = args.size or 32
        print(f"no checkpoint: an untrained ResNet-18 for images of {args.size} px")
        backbone = build_backbone("resnet18", args.size <= 64, max_pool=args.size > 64)
    args.resize = args.size  # as in the training scripts
    if args.checkpoint and not trained and args.size > 64:
        args.resize = round(args.size * 8 / 7)  # 256 for 224, as usual for ImageNet
    args.data = args.data or trained.get("data", "cifar10")
    print(args)

    # Data
    listed = list_splits(args)
    classes = class_names(listed["train"], args.data)
    if not args.features and (len(classes) < 2 or len(listed["test"]) == 0):
        sys.exit("no accuracy without classes and test images; --features FILE saves features")
    if args.labels is not None and (not classes or args.labels < len(classes)):
        sys.exit(f"--labels {args.labels}: each of {len(classes)} classes needs one")

    # Features
    train, unread = extract_features(backbone, args, "train", listed["train"], args.labels)
    test, unread_test = extract_features(backbone, args, "test", listed["test"])
    unread += unread_test
    if len(train["labels"]) == 0:
        sys.exit(f"no picture can be read, for example {unread[:1]}")
    if args.features:
        saved = {"train": train, "test": test, "args": vars(args), "place": place}
        saved |= {"classes": classes, "passed_over": unread}
        torch.save(saved, part_file)
        part_file.rename(features_file)  # never half-written
    if unread:
        print(f"passed over {len(unread)} pictures:", *unread[:10], sep="\n  ")
    if unread and args.features:
        unread_file.write_text("\n".join(unread) + "\n", errors="backslashreplace")
        print(f"all of these are in {unread_file}")

    # Accuracy
    why = ""
    if len(test["labels"]) == 0:
        why = "no test images"
    if len(train["labels"].unique()) < 2:
        why = "one class" if classes else "no labels"
    if why:
        count = len(train["labels"]) + len(test["labels"])
        file = args.features or "no file"
        print(f"features of {count} images in {file}; {why}, so no accuracy")
    else:
        print_accuracy(train, test, args.device)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # odd file names
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
