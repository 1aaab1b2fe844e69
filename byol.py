"""BYOL: Bootstrap Your Own Latent, Grill et al. 2020, arXiv:2006.07733.

    for x in batches:                           # Sec. 3.1
        x1, x2 = augment(x), augment(x)         # two random views of every image
        h1, h2 = backbone(x1), backbone(x2)     # features: what is kept in the end
        z1, z2 = projector(h1), projector(h2)   # projections
        p1, p2 = predictor(z1), predictor(z2)   # predictions
        t1, t2 = target(x1), target(x2)         # of a slow copy of backbone and projector
        L = R(p1, t2) + R(p2, t1)               # R(p, t) = 2 - 2 cosine(p, t)
        update all but the target by the gradient of L
        target = tau target + (1 - tau) (backbone, projector)   # Eq. (1), weight by weight

Collapse (all p and t alike, L = 0) is what predictor and slow target are to prevent (Sec. 3.2).
Differs from the paper: ResNet-18, 100 epochs, tau from 0.99; SimSiam's views, with the paper's
solarizing of the second; SGD, not LARS, no warm-up, weight decay on biases and BatchNorm too.
lr 0.03 and decay 2e-3 act as lightly's 0.12 and 5e-4 do on its loss, L / 4 - 1.

    python byol.py && python linear_eval.py runs/byol/checkpoint.pt
"""

import argparse
import math
import sys
import time
from copy import deepcopy
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models


# ------------------------------------------------------------------ 1. Augmentation
def random_resized_crop(x):
    """A random box of each image, resized to the image's size: x (B, 3, S, S)."""
    S = x.shape[-1]
    area = S**2 * x.new_empty(len(x), 11).uniform_(0.2, 1)  # in pixels; ten boxes, one spare
    ratio = x.new_empty(len(x), 11).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()  # w / h
    area[:, 10], ratio[:, 10] = S**2, 1  # the spare box is the whole image
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (B, 11)
    fits = (width <= S) & (height <= S)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1): the first that fits
    width, height = width.gather(1, first), height.gather(1, first)  # (B, 1) each
    left = (torch.rand_like(width) * (S - width + 1)).floor()  # 0, 1, ..., S - width
    top = (torch.rand_like(height) * (S - height + 1)).floor()
    # The view's columns and rows in pixels of the image, within the box; grid (B, S, S, 2)
    middles = (torch.arange(S, device=x.device) + 0.5) / S  # (S,): 0 to 1 across the box
    columns = (left + width * middles).clamp(left + 0.5, left + width - 0.5)  # (B, S)
    rows = (top + height * middles).clamp(top + 0.5, top + height - 0.5)  # (B, S)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), 3)
    return F.grid_sample(x, grid * 2 / S - 1, align_corners=False)  # -1 to 1 across the image


def rotate_hue(x, turns):
    """Turn the hue of RGB images x (B, 3, S, S) by turns (B, 1, 1, 1) of the color circle."""
    r, g, b = x.split(1, dim=1)  # (B, 1, S, S) each
    largest = x.amax(1, keepdim=True)
    chroma = largest - x.amin(1, keepdim=True)
    divisor = chroma.clamp(min=1e-8)  # not 0 for gray, whose hue has no effect
    # Hue in sixths: that of the largest channel (red 0, green 2, blue 4), plus -1 to 1
    hue = 4 + (r - g) / divisor
    hue = torch.where(largest == g, 2 + (b - r) / divisor, hue)
    hue = torch.where(largest == r, (g - b) / divisor, hue)
    hue = hue + 6 * turns
    # Back to RGB: a channel is largest within 1 of its own hue (0, 2, 4), lowest beyond 2
    away = torch.cat([hue, hue - 2, hue - 4], 1)  # (B, 3, S, S)
    away = ((away + 3) % 6 - 3).abs()  # from -3 to 3 around the circle; as a distance
    dip = (away - 1).clamp(0, 1)  # 0: largest, 1: lowest
    return largest - chroma * dip


def augment(images, solarize=0.0):
    """A random view of each image: (B, 3, S, S) uint8 -> float32 in 0-1. SimSiam App. A."""

    def draw(low, high):  # a number for each image
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    x = random_resized_crop(images / 255)
    x = torch.where(draw(0, 1) < 0.5, x.flip(3), x)
    changes = ["brightness", "contrast", "saturation", "hue"]
    jittered = x
    for i in torch.randperm(4).tolist():  # one order for all; on the CPU, to read it at once
        if changes[i] == "brightness":
            jittered = draw(0.6, 1.4) * jittered
        elif changes[i] == "contrast":
            mean = TF.rgb_to_grayscale(jittered).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
            jittered = mean + draw(0.6, 1.4) * (jittered - mean)
        elif changes[i] == "saturation":
            gray = TF.rgb_to_grayscale(jittered)  # (B, 1, S, S)
            jittered = gray + draw(0.6, 1.4) * (jittered - gray)
        else:
            jittered = rotate_hue(jittered, draw(-0.1, 0.1))
        jittered = jittered.clamp(0, 1)
    x = torch.where(draw(0, 1) < 0.8, jittered, x)
    x = torch.where(draw(0, 1) < 0.2, TF.rgb_to_grayscale(x), x)
    if x.shape[-1] > 64:  # small images are not blurred, SimSiam App. D
        sigma = torch.empty(1).uniform_(0.1, 2).item()  # in pixels, one for all
        width = 2 * (x.shape[-1] // 20) + 1  # the kernel's: odd, a tenth of the image's
        blurred = TF.gaussian_blur(x, [width, 1], sigma)  # along the rows
        blurred = TF.gaussian_blur(blurred, [1, width], sigma)  # and columns: as both at once
        x = torch.where(draw(0, 1) < 0.5, blurred, x)
    return torch.where((draw(0, 1) < solarize) & (x >= 0.5), 1 - x, x)  # invert bright values


def normalize(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """x (B, 3, S, S) in 0-1, less ImageNet's mean, over its deviation. Numbers, not tensors:
    copying those to the GPU would make the host wait."""
    return torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), mean, std)], 1)


# ------------------------------------------------------------------ 2. Model
def build_backbone(arch, size):
    """torchvision's ResNet without its classifier: (B, 3, size, size) -> (B, 512 or 2048)."""
    backbone = models.get_model(arch, zero_init_residual=True)  # blocks add nothing at first
    backbone.fc = nn.Identity()
    if size <= 64:  # a stem that keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone


# ------------------------------------------------------------------ 3. Loss and method
def regression_loss(p, t):
    """Eq. (2), mean over the batch: p, t (B, dim), normalized -> |p - t|^2, from 0 to 4."""
    return 2 - 2 * F.cosine_similarity(p.float(), t.float(), dim=1).mean()


def mlp(inputs, hidden, dim):
    """A projector or predictor, Sec. 3.3: (B, inputs) -> (B, dim)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, dim, bias=False),
    )


class BYOL(nn.Module):
    """Each view predicts the other's target. backbone: a ResNet, its fc an identity."""

    def __init__(self, backbone, hidden=4096, dim=256):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.inplanes, hidden, dim)  # inplanes: 512 or 2048 features
        self.predictor = mlp(dim, hidden, dim)
        self.target = deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)

    def forward(self, x1, x2):
        """Two views (B, 3, S, S) -> both losses' sum, and p1 (B, dim) to detect collapse."""
        h1, h2 = self.backbone(x1), self.backbone(x2)  # features (B, 512 or 2048)
        z1, z2 = self.projector(h1), self.projector(h2)  # projections (B, dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # predictions (B, dim)
        t1, t2 = self.target(x1).detach(), self.target(x2).detach()  # targets (B, dim)
        return regression_loss(p1, t2) + regression_loss(p2, t1), p1

    def update_target(self, rate):
        """Eq. (1), rate = 1 - tau: each weight of the target moves toward the online one."""
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        for t, weight in zip(self.target.parameters(), online, strict=True):
            t.data.lerp_(weight.data, rate)


def train_step(network, optimizer, x, bf16):
    """One update by images x (B, 3, S, S) uint8 -> the loss and p1, without gradients."""
    x1, x2 = augment(x), augment(x, solarize=0.2)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss, p1 = network(normalize(x1), normalize(x2))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), p1.detach()


# ------------------------------------------------------------------ 4. Data
def track(items, name):
    """The items one by one; on a terminal a line that rewrites itself says how far it is."""
    for i, item in enumerate(items):
        if sys.stdout.isatty():
            print(f"{name}  {i}/{len(items)}".ljust(40), end="\r", flush=True)
        yield item


def list_images(args, split):
    """[(picture or path, label)] of "train" or "test"; label -1: none."""
    if args.data == "stl10":
        part = "train+unlabeled" if split == "train" else "test"
        return datasets.STL10("data", part, download=True)
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


def load_split(args, split):
    """Images (N, 3, size, size) uint8, labels (N,): the first --subset of a fixed shuffle."""
    listed = list_images(args, split)
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0))[: args.subset]
    images = torch.empty(len(order), 3, args.size, args.size, dtype=torch.uint8)
    labels = []
    for i in track(order.tolist(), f"{split} images"):
        source, label = listed[i]
        try:
            picture = Image.open(source) if isinstance(source, Path) else source
            if picture.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel")
            picture = ImageOps.exif_transpose(picture).convert("RGB")  # upright
            picture = TF.center_crop(TF.resize(picture, args.size), args.size)
            images[len(labels)] = TF.pil_to_tensor(picture)  # the next free row
            labels.append(label)
        except Exception as error:
            print(f"passed over {source}: {error}")
    return images[: len(labels)], torch.tensor(labels, dtype=torch.int64)


# ------------------------------------------------------------------ 5. Monitoring
@torch.no_grad()
def compute_features(backbone, images, device):
    """Features (N, D) of images (N, 3, S, S) uint8, with the backbone in eval mode."""
    backbone.eval()
    features = [backbone(normalize(x.to(device) / 255)) for x in track(images.split(100), "kNN")]
    backbone.train()
    return torch.cat(features)


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


def spread(p):
    """Deviation of p / |p| in the batch, p (B, dim), times sqrt(dim): 0 if all point one way,
    1 if all ways. SimSiam Fig. 2 shows this deviation, of z."""
    return F.normalize(p.float()).std(0).mean().item() * p.shape[1] ** 0.5


# ------------------------------------------------------------------ 6. Training
def parse_args(argv=None, **saved_flags):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction  # switch: --x, --no-x
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, or a folder of images")
    add("--size", type=int, default=32, help="side of the images in pixels")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--arch", default="resnet18", choices=["resnet18", "resnet50"])
    add("--epochs", type=int, default=100, help="passes; the lr falls to 0 by the last")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=0.03, help="learning rate per 256 images of the batch")
    add("--weight-decay", type=float, default=2e-3, help="L2 penalty")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1")
    add("--bf16", action=switch, help="compute in bfloat16; by default where a GPU has it")
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of the run")
    add("--resume", action="store_true", help="continue --out, with its flags or those given")
    add("--ema-decay", type=float, default=0.99, help="tau, of the target; rises to 1 (Sec. 3.3)")
    parser.set_defaults(**saved_flags)
    return parser.parse_args(argv)


def save(args, epoch, log, network, optimizer):
    """Write log.csv and checkpoint.pt, which has all that --resume needs."""
    Path(args.out, "log.csv").write_text("\n".join(log) + "\n")
    asked = {k: v for k, v in vars(args).items() if k not in ("device", "out", "resume")}
    state = {"epoch": epoch, "log": log, "args": asked, "network": network.state_dict()}
    state["backbone"] = network.backbone.state_dict()  # for use elsewhere
    state["optimizer"] = optimizer.state_dict()
    torch.save(state, Path(args.out, "checkpoint.tmp"))
    Path(args.out, "checkpoint.tmp").replace(Path(args.out, "checkpoint.pt"))  # as a whole


def main(argv=None):
    args = parse_args(argv)
    checkpoint = Path(args.out, "checkpoint.pt")
    saved = {"epoch": 0, "log": ["epoch,loss,spread,lr,seconds,kNN"]}
    if args.resume and not checkpoint.exists():
        sys.exit(f"--resume: there is no {checkpoint}")
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        args = parse_args(argv, **saved["args"])  # flags given now come first
    elif Path(args.out).exists():
        sys.exit(f"{args.out} exists: go on with --resume, or choose another --out")
    gpu = args.device.startswith("cuda")
    bf16 = args.bf16
    if bf16 is None:
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

    # Data
    images, labels = load_split(args, "train")
    test_images, test_labels = load_split(args, "test")
    known = labels >= 0  # in STL-10 not all are
    classes = len(labels[known].unique())
    steps = len(images) // args.batch_size  # of full batches
    if steps == 0:
        sys.exit(f"--data {args.data}: {len(images)} images, less than one --batch-size")
    if gpu and images.nbytes < torch.cuda.mem_get_info(args.device)[0] / 3:
        images = images.to(args.device)  # leaving memory for the training
    print(f"{len(images)} images, {classes} classes, {len(test_images)} to test", args)

    # Network
    torch.manual_seed(args.seed)
    network = BYOL(build_backbone(args.arch, args.size))
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9)  # lr, decay: at each step

    # Go on from a checkpoint, or begin
    log = saved["log"]
    if args.resume:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        Path(args.out).mkdir(parents=True)
    save(args, saved["epoch"], log, network, optimizer)  # so that --resume knows the flags

    # Train
    saved_at = time.time()
    for epoch in range(saved["epoch"] + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        began = time.time()
        batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)[:steps]
        total = torch.zeros((), device=args.device)
        for step, rows in enumerate(track(batches, f"epoch {epoch}")):
            done = (epoch - 1 + (step + 0.5) / steps) / args.epochs  # part of the run
            anneal = (1 + math.cos(math.pi * done)) / 2  # 1 to 0
            lr = args.lr * args.batch_size / 256 * anneal
            optimizer.param_groups[0].update(lr=lr, weight_decay=args.weight_decay)
            loss, p1 = train_step(network, optimizer, images[rows].to(args.device), bf16)
            network.update_target((1 - args.ema_decay) * anneal)  # tau rises to 1
            total += loss  # not .item(): the host would wait for the GPU
        loss = total.item() / steps
        seconds = time.time() - began
        assert math.isfinite(loss), "the loss is not finite: lower --lr"

        # Save before measuring, which may run out of memory
        meter = spread(p1)  # of the last batch
        log.append(f"{epoch},{loss},{meter},{lr},{seconds:.1f},")  # kNN is to follow
        measure = epoch % math.ceil(args.epochs / 10) == 0 or epoch == args.epochs
        if measure or time.time() - saved_at > 60:
            save(args, epoch, log, network, optimizer)
            saved_at = time.time()
        knn = ""
        if measure and classes > 1 and len(test_images) > 0:
            bank = compute_features(network.backbone, images, args.device)[known]
            queries = compute_features(network.backbone, test_images, args.device)
            knn = f"{knn_accuracy(bank, labels[known], queries, test_labels):.2f}"
            log[-1] += knn
            save(args, epoch, log, network, optimizer)
        print(f"epoch {epoch}  loss {loss:.4f}  spread {meter:.3f}  kNN {knn:5}  {seconds:.1f} s")
    print(f"done: {checkpoint}")


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # looks for the fastest convolutions
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, in a file as well
    try:
        main()
    except KeyboardInterrupt:
        out = parse_args().out
        if not Path(out, "checkpoint.pt").exists():
            sys.exit("\nstopped before the first epoch: nothing to go on from yet")
        sys.exit(f'\nstopped: go on with python {sys.argv[0]} --resume --out "{out}"')
