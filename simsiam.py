"""SimSiam: Exploring Simple Siamese Representation Learning, Chen & He 2021, arXiv:2011.10566.

    for x in batches:                           # Algorithm 1
        x1, x2 = augment(x), augment(x)         # two random views of every image
        h1, h2 = backbone(x1), backbone(x2)     # features: what is kept in the end
        z1, z2 = projector(h1), projector(h2)   # projections (the paper's f: backbone, projector)
        p1, p2 = predictor(z1), predictor(z2)   # predictions (the paper's h: predictor)
        L = D(p1, z2) / 2 + D(p2, z1) / 2       # D(p, z) = -cosine(p, stopgrad(z))
        update the three networks by the gradient of L

Collapse: z and p point one way for all images, L is at its minimum, -1, and nothing is learned. No
term of L pushes images apart; take away predictor or stopgrad and it happens (Sec. 4.1, 4.2).
Differs from the paper (App. D, CIFAR-10): 100 epochs instead of 800.

    python simsiam.py && python linear_eval.py runs/simsiam/checkpoint.pt
"""

import argparse
import math
import os
import sys
import time
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision import datasets, models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images
SAVE_SECONDS = 60  # at least, from one checkpoint to the next

# ------------------------------------------------------------------ 1. Augmentation
def random_resized_crop(x):
    """A random box of each image, resized to the image's size: x (B, 3, S, S)."""
    S = x.shape[-1]
    area = S**2 * x.new_empty(len(x), 10, 1).uniform_(0.2, 1)  # of ten boxes, in pixels
    ratio = (4 / 3) ** x.new_empty(len(x), 10, 1).uniform_(-1, 1)  # width to height
    boxes = torch.cat([area * ratio, area / ratio], 2).sqrt().round()  # (B, 10, 2) sides
    boxes = F.pad(boxes, (0, 0, 0, 1), value=S)  # (B, 11, 2): the last is the whole image
    first = (boxes <= S).all(2).float().argmax(1)  # the first box that fits is taken
    box = boxes.take_along_dim(first[:, None, None], 1)[:, 0]  # (B, 2) width, height
    corner = (torch.rand_like(box) * (S - box + 1)).floor()  # (B, 2) left, top
    # affine_grid counts from -1 at the left and top of an image to 1 at its right and bottom
    center = (2 * corner + box) / S - 1
    theta = torch.cat([torch.diag_embed(box / S), center[:, :, None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (B, S, S, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

def rotate_hue(x, turns):
    """Turn the hue of RGB images x (B, 3, S, S) in 0-1 by turns (B, 1, 1), 1 a full one."""
    r, g, b = x.unbind(1)  # (B, S, S) each
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    unit = chroma.clamp(min=1e-8)  # gray has no chroma, and any hue
    # RGB to hue, in sixths of the circle (red at 0, green at 2, blue at 4), and back
    hue = torch.where(value == g, 2 + (b - r) / unit, 4 + (r - g) / unit)
    hue = torch.where(value == r, (g - b) / unit, hue) + 6 * turns
    k = [(n + hue) % 6 for n in (5, 3, 1)]  # of r, g, b; at k 0-1 each falls, at 3-4 it rises
    return torch.stack([value - chroma * torch.minimum(i, 4 - i).clamp(0, 1) for i in k], 1)

def augment(images):
    """A random view of each image: (B, 3, S, S) uint8 -> float32 in 0-1. SimSiam App. A."""

    def draw(low, high):  # a number for each image
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    x = random_resized_crop(images / 255)
    x = torch.where(draw(0, 1) < 0.5, x.flip(3), x)

    jittered = x
    for change in torch.randperm(4).tolist():  # one order a batch; drawn on the CPU, no wait
        gray = TF.rgb_to_grayscale(jittered)  # (B, 1, S, S)
        if change < 3:  # brightness, contrast, saturation: toward other (below 1) or away
            other = (0 * gray, gray.mean((2, 3), keepdim=True), gray)[change]
            jittered = torch.lerp(other, jittered, draw(0.6, 1.4)).clamp(0, 1)  # 1: unchanged
        else:
            jittered = rotate_hue(jittered, draw(-0.1, 0.1)[:, 0])
    x = torch.where(draw(0, 1) < 0.8, jittered, x)
    x = torch.where(draw(0, 1) < 0.2, TF.rgb_to_grayscale(x), x)
    if x.shape[-1] > 64:  # smaller images stay sharp; kernel: a tenth of the side
        sigma = torch.empty(1).uniform_(0.1, 2).item()  # one for the batch
        blurred = TF.gaussian_blur(x, x.shape[-1] // 20 * 2 + 1, sigma)
        x = torch.where(draw(0, 1) < 0.5, blurred, x)
    return x

def normalize(x):
    """Pictures x (B, 3, S, S) in 0-1 to what the network takes, about mean 0, deviation 1."""
    return torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), MEAN, STD)], 1)

# ------------------------------------------------------------------ 2. Model
def build_backbone(arch, size):
    """torchvision's ResNet without its classifier: (B, 3, size, size) -> (B, 512 or 2048)."""
    backbone = models.get_model(arch, zero_init_residual=True)
    backbone.fc = nn.Identity()
    if size <= 64:  # a stem that keeps the resolution, SimCLR App. B.9
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone

# ------------------------------------------------------------------ 3. Loss and method
def negative_cosine(p, z):
    """Eq. (1) without its stopgrad (see forward), batch mean: p, z (B, dim) -> -1 to 1."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()

class SimSiam(nn.Module):
    """Each view predicts the other. backbone: a ResNet with identity fc, -> (B, inplanes)."""
    def __init__(self, backbone, dim=2048, bottleneck=512, stop_grad=True):
        super().__init__()
        self.backbone, self.stop_grad = backbone, stop_grad
        self.projector = nn.Sequential(
            nn.Linear(backbone.inplanes, dim, bias=False),  # BatchNorm would cancel a bias
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),  # no learned shift: could turn all z one way
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, dim),
        )

    def forward(self, x1, x2):
        """Two views (B, 3, S, S) -> the loss, Eq. (4); p1 (B, dim), to see collapse."""
        h1, h2 = self.backbone(x1), self.backbone(x2)  # features (B, inplanes)
        z1, z2 = self.projector(h1), self.projector(h2)  # projections (B, dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # predictions (B, dim)
        if self.stop_grad:
            z1, z2 = z1.detach(), z2.detach()  # constants for the gradient, Eq. (3)
        return negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2, p1

# ------------------------------------------------------------------ 4. Data
def load_split(args, split, rank=0, world=1):
    """Every world-th image of a split: (N, 3, S, S) uint8; the labels of all, -1 for none."""
    if args.data in BUILT_IN:
        part = split if args.data == "stl10" else split == "train"
        data = getattr(datasets, args.data.upper())(args.data_dir, part, download=world == 1)
    else:  # a folder, of which glob passes over what is hidden; a class is train/NAME/
        kinds = Image.registered_extensions()
        files = [Path(f) for f in sorted(glob("**/*.*", root_dir=args.data, recursive=True))]
        files = [f for f in files if "image/" in Image.MIME.get(kinds.get(f.suffix.lower()), "")]
        deep = [f for f in files if f.parts[2:]]
        sets = {s: [f for f in deep if f.parts[0] == s] for s in ("train", "test", "val")}
        names = {s: {f.parts[1] for f in sets[s]} for s in sets}
        tests = [sets[s] for s in ("test", "val") if set() < names[s] <= names["train"]] + [[]]
        alone = [f for f in files if f.parts[0] == "train"] or files  # if there are no classes
        files = tests[0] if split == "test" else sets["train"] or alone
        number = {name: i for i, name in enumerate(sorted(names["train"]))}
        data = [(Path(args.data, f), number[f.parts[1]] if number else -1) for f in files]
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.subset]
    labels, mine = torch.tensor([data[i][1] for i in order.tolist()]), order[rank::world].tolist()
    images = torch.empty(len(mine), 3, args.size, args.size, dtype=torch.uint8)
    for row, i in enumerate(mine):
        picture = data[i][0]  # or its path
        try:
            x = picture if args.data in BUILT_IN else Image.open(picture)
            assert x.mode == "I;16" or x.mode[0] not in "IF", f"{x.mode} has more than 8 bits"
            x = (x.point(lambda value: value / 256) if x.mode == "I;16" else x).convert("RGB")
            images[row] = TF.pil_to_tensor(TF.center_crop(TF.resize(x, args.size), args.size))
        except Exception as error:
            sys.exit(f"cannot read {picture}: {error}")
    return images, labels

# ------------------------------------------------------------------ 5. Monitoring
@torch.no_grad()
def knn_accuracy(backbone, train, test, device, k=200, temperature=0.1):
    """Top-1 in %, Wu et al. 2018, Sec. 3.4. train, test: images (N, 3, S, S), labels (N,)."""
    backbone.eval()
    h = [backbone(normalize(x.to(device) / 255)) for s in (train, test) for x in s[0].split(500)]
    bank, queries = F.normalize(torch.cat(h)).split([len(train[0]), len(test[0])])  # (N, D)
    labels, hits = train[1].to(device), 0
    for q, y in zip(queries.split(500), test[1].to(device).split(500)):
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))  # (500, k)
        votes = q.new_zeros(len(q), int(labels.max()) + 1)  # (500, classes)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1) == y).sum().item()
    backbone.train()
    return 100 * hits / len(queries)

# ------------------------------------------------------------------ 6. Training
def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cuda", "cpu", "mps"][not gpus :] + gpus * ("RANK" not in os.environ)
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, or a folder of images")
    add("--data-dir", default="data", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="pixels, None: the set's own, for a folder 32")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--arch", default="resnet18", choices=["resnet18", "resnet34", "resnet50"])
    add("--epochs", type=int, default=100, help="passes over the images")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=0.03, help="learning rate per 256 images of the batch")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", default=devices[0], choices=devices, help="under torchrun without a number")
    add("--bf16", action=switch, help="compute in bfloat16, None: on a GPU that has it")
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of the run, for all nodes")
    add("--resume", action="store_true", help="go on from --out, if a checkpoint is there")
    add("--stop-grad", action=switch, default=True, help="off: collapse")
    args = parser.parse_args(argv, argparse.Namespace(method="SimSiam"))
    args.size = BUILT_IN.get(args.data, 32) if args.size is None else args.size
    return args

def main(argv=None):
    args = parse_args(argv)
    checkpoint, resume = Path(args.out, "checkpoint.pt"), vars(args).pop("resume")
    if checkpoint.exists() and not resume:
        sys.exit(f"{checkpoint} exists: go on with --resume, or choose another --out")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    device, gpu = torch.device(args.device), args.device.startswith("cuda")
    torch.cuda.set_device(device.index or int(os.environ.get("LOCAL_RANK", 0)) if gpu else -1)
    if args.bf16 is None:
        args.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if world > 1:  # a process for each GPU, which takes its part of the images and batches
        torch.distributed.init_process_group(timeout=20 * torch.distributed.default_pg_timeout)

    # Data: on the GPU if they fit into half of its free memory
    split = "unlabeled" if args.data == "stl10" else "train"
    images, labels = load_split(args, split, rank, world)
    args.images, steps, part = len(labels), len(labels) // args.batch_size, args.batch_size // world
    if steps == 0 or part * world < args.batch_size:
        sys.exit(f"--data {args.data}: {args.images} images; --batch-size: fewer, {world} x n")
    fits = not gpu or images.nbytes < torch.cuda.mem_get_info()[0] / 2
    images = images.to(device) if fits else images
    bank, labels = (images, labels) if split == "train" else load_split(args, "train", rank, world)
    test = load_split(args, "test") if rank == 0 else None

    # Network
    torch.manual_seed(args.seed)
    model = SimSiam(build_backbone(args.arch, args.size), stop_grad=args.stop_grad)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if world > 1 and gpu else model
    model.to(device, memory_format=torch.channels_last)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=args.weight_decay)

    # Go on from a checkpoint
    state, saved_at = {"epoch": 0, "log": []}, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for name, value in sorted(vars(args).items() - state["args"].items()):
            if name not in ("lr", "epochs", "device", "bf16", "data", "data_dir", "out"):
                sys.exit(f"{checkpoint} has {name} {state['args'].get(name)}, not {value}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    # Train
    if rank == 0:
        print(f"{args.images} images of {args.size} px, {len(test[1])} test images for kNN, "
              f"on {device} in {'bfloat16' if args.bf16 else 'float32'}")
    for epoch in range(state["epoch"] + 1, args.epochs + 1):
        torch.manual_seed(hash((args.seed, epoch, rank)))  # so that a resumed run draws the same
        order = torch.randperm(len(images))[: steps * part].view(steps, part).to(images.device)
        total, began = torch.zeros((), device=device), time.time()
        for step, rows in enumerate(order, (epoch - 1) * steps):
            anneal = (1 + math.cos(math.pi * (step + 0.5) / (args.epochs * steps))) / 2  # 1 to 0
            optimizer.param_groups[0]["lr"] = lr = args.lr * args.batch_size / 256 * anneal
            x = images[rows] if fits else images[rows].pin_memory().to(device, non_blocking=True)
            x1, x2 = augment(x), augment(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss, watch = network(normalize(x1), normalize(x2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()  # not .item(): the host would wait for the GPU
        if rank > 0:
            continue
        # Of the last batch, SimSiam Fig. 2 times sqrt(dim): 0 if all point one way, 1 if all ways
        spread = F.normalize(watch.detach().float()).std(0).mean().item() * watch.shape[1] ** 0.5
        row = {"epoch": epoch, "loss": total.item() / steps, "spread": spread, "kNN": "", "lr": lr}
        row["images/s"] = steps * args.batch_size / (time.time() - began)
        if len(test[1]) and epoch * 10 // args.epochs > (epoch - 1) * 10 // args.epochs:
            row["kNN"] = knn_accuracy(model.backbone, (bank, labels[::world]), test, device)
        print(*(f"{k} {v:.5g} " for k, v in row.items() if v != ""), "collapsed?" * (spread < 0.1))
        if not math.isfinite(row["loss"]):
            sys.exit("the loss is not finite: lower --lr")
        state["log"].append(",".join(map(str, row.values())))
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        Path(args.out, "log.csv").write_text("\n".join([",".join(row), *state["log"]]) + "\n")
        if epoch == args.epochs or time.time() - saved_at >= SAVE_SECONDS:
            state |= {"backbone": model.backbone.state_dict(), "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "epoch": epoch, "args": vars(args)}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)  # a killed run leaves no half
            saved_at = time.time()
            print(f"saved epoch {epoch}; to measure it: python linear_eval.py {checkpoint}")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # every line at once, also into a file
    try:
        main()
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as e:  # Ctrl-C has no words
        sys.exit(f"{e}: --batch-size, --data-dir, --data FOLDER, tests/toy.py?" if str(e) else 130)
