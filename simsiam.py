"""SimSiam: Exploring Simple Siamese Representation Learning, Chen & He 2021, arXiv:2011.10566.

    for x in batches:                           # Algorithm 1
        x1, x2 = augment(x), augment(x)         # two random views of every image
        h1, h2 = backbone(x1), backbone(x2)     # features: what is kept in the end
        z1, z2 = projector(h1), projector(h2)   # projections (the paper's f: with backbone)
        p1, p2 = predictor(z1), predictor(z2)   # predictions (the paper's h: predictor)
        L = D(p1, z2) / 2 + D(p2, z1) / 2       # D(p, z) = -cosine(p, stopgrad(z))
        update the three networks by the gradient of L

Collapse: every image gets the same answer, L nears its minimum, -1, and nothing is learned. No
term of L pushes images apart; take away predictor or stopgrad and it happens (Sec. 4.1, 4.2).
Differs from the paper (App. D, CIFAR-10): 100 epochs instead of 800.

    python simsiam.py && python linear_eval.py runs/simsiam/checkpoint.pt
"""

import argparse
import math
import sys
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
    k = torch.stack([5 + hue, 3 + hue, 1 + hue], 1) % 6  # r, g, b fall at 0-1, rise at 3-4
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def augment(images):
    """A random view of each image: (B, 3, S, S) uint8 -> float32 in 0-1. SimSiam App. A."""

    def draw(low, high):  # a number for each image
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    x = random_resized_crop(images / 255)
    x = torch.where(draw(0, 1) < 0.5, x.flip(3), x)
    jittered = x
    for change in torch.randperm(4).tolist():  # one order a call; drawn on the CPU: no wait
        gray = TF.rgb_to_grayscale(jittered)  # (B, 1, S, S)
        black, mean = 0 * gray, gray.mean((2, 3), keepdim=True)
        if change < 3:  # toward the other image (below 1) or away from it
            other = (black, mean, gray)[change]  # for brightness, contrast, saturation
            jittered = torch.lerp(other, jittered, draw(0.6, 1.4)).clamp(0, 1)
        else:
            jittered = rotate_hue(jittered, draw(-0.1, 0.1)[:, 0])
    x = torch.where(draw(0, 1) < 0.8, jittered, x)
    x = torch.where(draw(0, 1) < 0.2, TF.rgb_to_grayscale(x), x)
    if x.shape[-1] > 64:  # smaller images stay sharp; kernel: a tenth of the side
        sigma = torch.empty(1).uniform_(0.1, 2).item()  # one a call
        blurred = TF.gaussian_blur(x, x.shape[-1] // 20 * 2 + 1, sigma)
        x = torch.where(draw(0, 1) < 0.5, blurred, x)
    return x


def normalize(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    """Pictures x (B, 3, S, S) in 0-1, by mean and deviation of ImageNet's r, g, b."""
    return torch.stack([(c - m) / s for c, m, s in zip(x.unbind(1), mean, std)], 1)


def two_views(images):
    """x1, x2 for the loss: two random views of each image, (B, 3, S, S) in 0-1 each."""
    return augment(images), augment(images)


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
    """Eq. (1), batch mean; stopgrad is in forward: p, z (B, dim) -> -1 to 1."""
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
            nn.BatchNorm1d(dim, affine=False),  # a learned shift could turn all z one way
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, bottleneck, bias=False),
            nn.BatchNorm1d(bottleneck),
            nn.ReLU(),
            nn.Linear(bottleneck, dim),
        )

    def forward(self, x1, x2):
        """Two views (B, 3, S, S) -> the loss, Eq. (4); p1 (B, dim), whose rows are alike in a
        collapse (those of z less so: BatchNorm holds their mean at 0)."""
        h1, h2 = self.backbone(x1), self.backbone(x2)  # features (B, inplanes)
        z1, z2 = self.projector(h1), self.projector(h2)  # projections (B, dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # predictions (B, dim)
        if self.stop_grad:
            z1, z2 = z1.detach(), z2.detach()  # constants for the gradient, Eq. (3)
        return negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2, p1


def train_step(network, optimizer, x, bf16):
    """One update by images x (B, 3, S, S) uint8 -> the loss, and what shows collapse."""
    x1, x2 = two_views(x)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss, watched = network(normalize(x1), normalize(x2))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), watched.detach()


# ------------------------------------------------------------------ 4. Data
def list_images(args, split):
    """[(picture or path, label)] of "train" or "test"; label -1: none."""
    if args.data in ("cifar10", "cifar100"):
        dataset = getattr(datasets, args.data.upper())
        return dataset("data", train=split == "train", download=True)
    files = sorted(glob("**/*", root_dir=args.data, recursive=True))  # skips hidden files
    files = [Path(file) for file in files if datasets.folder.is_image_file(file)]
    train = [file for file in files if file.parts[0] == "train"]
    names = sorted({file.parts[1] for file in train if len(file.parts) > 2})
    if not names:  # without classes: the images in train/, or all there are
        unlabeled = [(Path(args.data, file), -1) for file in train or files]
        return unlabeled if split == "train" else []
    labeled = [file for file in files if file.parts[0] == split and len(file.parts) > 2]
    return [(Path(args.data, file), names.index(file.parts[1])) for file in labeled]


def load_split(args, split):
    """Images (N, 3, size, size) uint8 and labels (N,), always in the same random order."""
    listed = list_images(args, split)
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0))[: args.subset]
    images = torch.empty(len(order), 3, args.size, args.size, dtype=torch.uint8)
    labels = torch.empty(len(order), dtype=torch.int64)
    for row, i in enumerate(order.tolist()):
        source, labels[row] = listed[i]
        try:
            picture = Image.open(source) if isinstance(source, Path) else source
            assert not picture.mode.startswith(("I", "F")), "more than 8 bits a channel"
            picture = ImageOps.exif_transpose(picture).convert("RGB")  # upright
            picture = TF.center_crop(TF.resize(picture, args.size), args.size)
            images[row] = TF.pil_to_tensor(picture)
        except Exception as error:
            sys.exit(f"cannot read {source}: {error}")
    return images, labels


# ------------------------------------------------------------------ 5. Monitoring
@torch.no_grad()
def compute_features(backbone, images, device):
    """Features (N, D) of images (N, 3, S, S) uint8, with the backbone in eval mode."""
    backbone.eval()
    features = [backbone(normalize(x.to(device) / 255)) for x in images.split(100)]
    backbone.train()
    return torch.cat(features)


def knn_accuracy(bank, labels, queries, truth, k=200, temperature=0.1):
    """Top-1 in %: the k nearest in the bank vote on the class. Wu et al. 2018, Sec. 3.4."""
    similarity = F.normalize(queries) @ F.normalize(bank).T  # (M, N)
    cosine, nearest = similarity.topk(min(k, len(bank)))  # (M, k)
    votes = torch.zeros(len(queries), int(labels.max()) + 1)  # (M, classes)
    votes.scatter_add_(1, labels[nearest.cpu()], (cosine.cpu() / temperature).exp())
    return 100 * (votes.argmax(1) == truth).float().mean().item()


def spread(p):
    """As SimSiam's Fig. 2, times sqrt(dim): 0 if all p (B, dim) point one way, 1 if all ways."""
    return F.normalize(p.float()).std(0).mean().item() * p.shape[1] ** 0.5


# ------------------------------------------------------------------ 6. Training
def parse_args(argv=None, **defaults):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="cifar10", help="cifar10, cifar100, a folder: train/NAME/, or unlabeled")
    add("--size", type=int, default=32, help="side of the images in pixels")
    add("--subset", type=int, help="take that many images of each split, always the same")
    add("--arch", default="resnet18", choices=["resnet18", "resnet34", "resnet50"])
    add("--epochs", type=int, default=100, help="passes; the lr falls to 0 by the last")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=0.03, help="learning rate per 256 images of the batch")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="or cuda:1")
    add("--bf16", action=switch, help="compute in bfloat16, None: on a GPU that has it")
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of the run")
    add("--resume", action="store_true", help="go on from --out, by its flags unless given")
    add("--stop-grad", action=switch, default=True, help="off: collapse")
    return parser.parse_args(argv, argparse.Namespace(**defaults))  # what argv gives wins


def main(argv=None):
    args = parse_args(argv)
    checkpoint = Path(args.out, "checkpoint.pt")
    saved = {"epoch": 0, "log": []}
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        args = parse_args(argv, **{**saved["args"], "out": args.out})
    if Path(args.out).exists() and not args.resume:
        sys.exit(f"{args.out} exists: go on with --resume, or choose another --out")
    gpu = args.device.startswith("cuda")
    if args.bf16 is None:
        args.bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)

    # Data
    images, labels = load_split(args, "train")
    test_images, test_labels = load_split(args, "test")
    classes = len(labels[labels >= 0].unique())
    steps = len(images) // args.batch_size  # of full batches
    if steps == 0:
        sys.exit(f"--data {args.data}: {len(images)} images, less than one --batch-size")
    if gpu and images.nbytes < torch.cuda.mem_get_info(args.device)[0] / 2:
        images = images.to(args.device)
    print(f"{len(images)} images, {classes} classes, {len(test_images)} to test", args, flush=True)
    Path(args.out).mkdir(parents=True, exist_ok=args.resume)

    # Network
    torch.manual_seed(args.seed)
    network = SimSiam(build_backbone(args.arch, args.size), stop_grad=args.stop_grad)
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9)

    # Go on from a checkpoint
    if saved["epoch"] > 0:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])

    # Train
    for epoch in range(saved["epoch"] + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)[:steps]
        total = torch.zeros((), device=args.device)
        for step, rows in enumerate(batches, start=(epoch - 1) * steps):
            anneal = (1 + math.cos(math.pi * (step + 0.5) / (args.epochs * steps))) / 2  # 1 to 0
            lr = args.lr * args.batch_size / 256 * anneal
            optimizer.param_groups[0].update(lr=lr, weight_decay=args.weight_decay)
            loss, watched = train_step(network, optimizer, images[rows].to(args.device), args.bf16)
            total += loss  # not .item(): the host would wait for the GPU

        # Report
        loss = total.item() / steps
        meter = spread(watched)
        assert math.isfinite(loss), "the loss is not finite: lower --lr"
        measure = epoch % math.ceil(args.epochs / 10) == 0 or epoch == args.epochs
        knn = ""
        if measure and classes > 1 and len(test_images) > 0:
            bank = compute_features(network.backbone, images, args.device)
            queries = compute_features(network.backbone, test_images, args.device)
            knn = round(knn_accuracy(bank, labels, queries, test_labels), 2)
        word = "collapsed?" if meter < 0.1 else ""
        print(f"epoch {epoch}  loss {loss:.4f}  spread {meter:.3f}  kNN {knn} {word}", flush=True)
        saved["log"].append(f"{epoch},{loss},{meter},{knn},{lr}\n")
        Path(args.out, "log.csv").write_text("epoch,loss,spread,kNN,lr\n" + "".join(saved["log"]))

        # Save
        if measure:
            saved |= {"epoch": epoch, "args": {"method": "SimSiam", **vars(args)}}
            saved["backbone"] = network.backbone.state_dict()
            saved["network"] = network.state_dict()
            saved["optimizer"] = optimizer.state_dict()
            torch.save(saved, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)  # a killed run leaves no half


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # looks for the fastest convolutions
    main()
