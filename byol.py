"""BYOL: Bootstrap Your Own Latent, Grill et al. 2020, arXiv:2006.07733.

    for x in batches:                       # Sec. 3.1
        x1, x2 = augment(x), augment(x)     # two random views of every image
        z1, z2 = f(x1), f(x2)               # f: backbone, then projector
        p1, p2 = q(z1), q(z2)               # q: predictor
        t1, t2 = f'(x1), f'(x2)             # f': the target network, without gradient
        L = R(p1, t2) + R(p2, t1)           # R(p, t) = 2 - 2 cosine(p, t)
        update f and q by the gradient of L
        f' = tau f' + (1 - tau) f           # so the target follows f slowly

Nothing pushes two images apart: it takes q and the slow f' to keep z from being equal for all.

    python byol.py                          # learn from CIFAR-10 without its labels
    python linear_eval.py runs/byol/checkpoint.pt

Differs from the paper (ImageNet): SGD (lr, weight decay: lightly's CIFAR-10 benchmark) instead of
LARS, warm-up over a tenth of the run, target decay from 0.99, crops and colors as in SimSiam.
"""

import argparse
import copy
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import nn
from torchvision import datasets, models, ops, utils
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, pil_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images
SAVE_SECONDS = 60  # at least, from one checkpoint to the next


# ------------------------------------------------------------------ 1. Augmentation
def random_resized_crop(x):
    """A box of each image, half of them mirrored, stretched to its size: x (N, 3, S, S), in 0-1."""
    size = x.shape[-1]
    area = torch.empty(len(x), 10, 1, device=x.device).uniform_(0.2, 1) * size**2  # ten tries
    ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    extent = torch.cat([area * ratio, area / ratio], 2).sqrt().round()  # (N, 10, 2) width, height
    first = (extent <= size).all(2, keepdim=True).float().argmax(1, keepdim=True)  # to fit
    extent = extent.take_along_dim(first, 1).transpose(1, 2).clamp(max=size)  # (N, 2, 1) pixels
    corner = (torch.rand_like(extent) * (size - extent + 1)).floor()  # (N, 2, 1) upper left
    centers = (torch.arange(size, device=x.device) + 0.5) / size  # (S,) of a view's pixels, 0-1
    inside = (centers * extent).clamp(min=0.5).minimum(extent - 0.5)  # the box: (N, 2, S)
    u, v = (2 * (corner + inside) / size - 1).unbind(1)  # (N, S) each, the image spans -1 to 1
    u = torch.where(torch.rand(len(x), 1, device=x.device) < 0.5, u.flip(1), u)
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[:, :, None]), 3)  # (N, S, S, 2)
    return F.grid_sample(x, grid, align_corners=False)


def normalize(x):
    for c in range(3):  # by numbers: a tensor of them would have to be copied to the GPU
        x[:, c].sub_(MEAN[c]).div_(STD[c])
    return x


def augment(images, solarize=0.0):
    """A random view of each: (N, 3, S, S) uint8 -> normalized float. solarize: probability."""
    x = random_resized_crop(images / 255)
    jitter, gray, blur, solar, *factors, turns = torch.rand(8, len(x), 1, 1, 1, device=x.device)
    jitter = jitter < 0.8  # all four of an image, or none
    factors = [1 + jitter * 0.4 * (2 * f - 1) for f in factors]  # three of (N, 1, 1, 1)
    for i in torch.randperm(4).tolist():
        if i < 3:  # brightness, contrast, saturation: blend with black, mean gray, the gray image
            luma = TF.rgb_to_grayscale(x)  # (N, 1, S, S)
            other = (torch.zeros_like(luma), luma.mean((2, 3), keepdim=True), luma)[i]
            x = torch.lerp(other, x, factors[i]).clamp(0, 1)
        else:  # hue: in sixths of the circle (r at 0, g 2, b 4), turned by up to 0.6, a tenth of it
            value, top = x.max(1, keepdim=True)  # (N, 1, S, S), and which channel it is
            chroma = value - x.amin(1, keepdim=True)
            offset = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, top)  # g - b, b - r or r - g
            hue = 2 * top + offset / chroma.clamp(min=1e-8) + jitter * 0.6 * (2 * turns - 1)
            hue = (hue + 5 - 2 * torch.arange(3, device=x.device).view(3, 1, 1)) % 6  # (N, 3, S, S)
            x = value - chroma * torch.minimum(hue, 4 - hue).clamp(0, 1)  # HSV to RGB
    x = torch.where(gray < 0.2, TF.rgb_to_grayscale(x), x)
    if x.shape[-1] > 64:  # smaller images stay sharp; kernel: a tenth of the side
        sigma = 0.1 + 1.9 * torch.rand(()).item()  # one for all, drawn on the CPU
        x = torch.where(blur < 0.5, TF.gaussian_blur(x, x.shape[-1] // 20 * 2 + 1, sigma), x)
    x = torch.where((solar < solarize) & (x >= 0.5), 1 - x, x)  # invert bright values
    return normalize(x)


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
def regression_loss(p, t):
    """Eq. (2), mean over the batch: p, t (B, dim) -> |p - t|^2 of the normalized, from 0 to 4."""
    return 2 - 2 * F.cosine_similarity(p.float(), t.float(), dim=1).mean()


class BYOL(nn.Module):
    """Each view predicts the other's target. backbone: a ResNet with identity fc."""

    def __init__(self, backbone, hidden=4096, dim=256):
        super().__init__()
        self.backbone = backbone
        self.projector = ops.MLP(backbone.inplanes, [hidden, dim], norm_layer=nn.BatchNorm1d)
        self.predictor = ops.MLP(dim, [hidden, dim], norm_layer=nn.BatchNorm1d)
        self.target = copy.deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)

    def forward(self, x1, x2):
        """Two views (B, 3, S, S) -> the loss, summed over both directions, and z1 (B, dim)."""
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))  # (B, dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, dim)
        with torch.no_grad():
            t1, t2 = self.target(x1), self.target(x2)  # (B, dim)
        return regression_loss(p1, t2) + regression_loss(p2, t1), z1

    @torch.no_grad()
    def update_target(self, decay):
        """Eq. (1): every weight of the target <- decay * itself + (1 - decay) * the online one."""
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_([*self.target.parameters()], online, 1 - decay)  # one call for all


# ------------------------------------------------------------------ 4. Data
def load_split(args, split):
    """Decode a split: (N, 3, S, S) uint8, labels (N,) or -1. Raises OSError or ValueError."""
    if args.data in BUILT_IN:
        dataset = getattr(datasets, args.data.upper())
        try:
            part = split if args.data == "stl10" else split == "train"
            data = dataset(args.data_dir, part, download=True)  # data[i]: an RGB image, its label
        except (OSError, RuntimeError) as error:
            raise OSError(f"{dataset.url}: {error}; see --data-dir and --data FOLDER") from error
    elif Path(args.data, split).is_dir():
        if len({str(find_classes(Path(args.data, s))) for s in ("train", split)}) > 1:
            raise ValueError(f"--data {args.data}: {split}/ has other classes than train/")
        data = datasets.ImageFolder(Path(args.data, split)).samples  # data[i]: a path, its label
    else:
        files = sorted(Path(args.data).rglob("*"))
        data = [(file, -1) for file in files if file.suffix.lower() in IMG_EXTENSIONS]
    if not data:
        raise FileNotFoundError(f"--data {args.data}: neither a folder of images nor {[*BUILT_IN]}")
    torch.manual_seed(args.seed)
    order = torch.randperm(len(data))[: args.subset].tolist()
    images = torch.empty(len(order), 3, args.size, args.size, dtype=torch.uint8)
    labels = torch.empty(len(order), dtype=torch.int64)

    def decode(part):
        for i in part.tolist():
            image, labels[i] = data[order[i]]
            try:
                image = image if args.data in BUILT_IN else pil_loader(image)
            except (OSError, SyntaxError) as error:
                raise ValueError(f"cannot read {image}: {error}") from error
            images[i] = TF.pil_to_tensor(TF.center_crop(TF.resize(image, args.size), args.size))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # list() raises what a thread raised
        list(pool.map(decode, torch.arange(len(order)).split(100)))
    return images, labels


# ------------------------------------------------------------------ 5. Monitoring
@torch.no_grad()
def knn_accuracy(backbone, train, test, device, k=200, temperature=0.1):
    """Top-1 in % of the k nearest training images' vote, weighted by exp(cosine / temperature), on
    backbone features: Wu et al. 2018, Sec. 3.4. train, test: (N, 3, S, S) uint8, labels (N,)."""
    backbone.eval()

    def embed(x):
        return F.normalize(backbone(normalize(x.to(device) / 255)), dim=1)  # (1000, D)

    bank, labels, hits = torch.cat([embed(x) for x in train[0].split(1000)]), train[1].to(device), 0
    for x, y in zip(test[0].split(1000), test[1].split(1000)):
        cosine, nearest = (embed(x) @ bank.T).topk(min(k, len(bank)))  # (1000, k)
        votes = torch.zeros(len(x), int(labels.max()) + 1, device=device)  # (1000, classes)
        votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += (votes.argmax(1).cpu() == y).sum().item()
    backbone.train()
    return 100 * hits / len(test[1])


def spread(z):
    """The collapse meter of Fig. 2, times sqrt(D): z (B, D) -> 0 (constant) to 1 (isotropic)."""
    return F.normalize(z.float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


# ------------------------------------------------------------------ 6. Training
def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, or a folder of images")
    add("--data-dir", default="data", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="side of the images in pixels, None: the set's, for a folder 32")
    add("--subset", type=int, help="use that many images, drawn with the seed")
    add("--arch", default="resnet18", choices=["resnet18", "resnet34", "resnet50"], help="backbone")
    add("--epochs", type=int, default=100, help="passes over the images")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=0.12, help="learning rate per 256 images of the batch")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of the run")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--ema-decay", type=float, default=0.99, help="of the target, rises to 1 (Sec. 3.2)")
    args = parser.parse_args(argv)
    args.size = args.size or BUILT_IN.get(args.data, 32)
    return args


def main(argv=None):
    args = parse_args(argv)
    device, out = torch.device(args.device), Path(args.out)
    if (out / "checkpoint.pt").exists() and not args.resume:
        raise FileExistsError(f"{out} holds a checkpoint: go on with --resume, or change --out")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    train = load_split(args, "train")
    images = load_split(args, "unlabeled")[0] if args.data == "stl10" else train[0]
    labeled = train[1][0] >= 0 and (args.data in BUILT_IN or Path(args.data, "test").is_dir())
    test = load_split(args, "test") if labeled else None
    print(f"{len(images)} images of {args.size} px" + ("" if test else ", no labels: kNN is off"))
    fits = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    images = images.to(device) if fits else images
    steps = len(images) // args.batch_size  # an epoch; the rest of the images sit this one out
    if steps == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} images")
    torch.manual_seed(args.seed)
    model = BYOL(build_backbone(args.arch, args.size))
    model.to(device, memory_format=torch.channels_last)
    lr, start, log = args.lr * args.batch_size / 256, 0, []
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD(weights, lr, 0.9, weight_decay=args.weight_decay)
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases and BatchNorm: no decay
    optimizer.add_param_group({"params": others, "weight_decay": 0})
    if args.resume:
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["epoch"], state["log"]
    if args.compile:
        model.compile()
    out.mkdir(parents=True, exist_ok=True)
    x = images[:8].to(device)
    views = torch.stack([normalize(x / 255), augment(x), augment(x, 0.2)], 1).flatten(0, 1)
    views = TF.normalize(views, [-m / s for m, s in zip(MEAN, STD)], [1 / s for s in STD])
    utils.save_image(F.interpolate(views, size=128), out / "views.png", nrow=3, padding=8)
    began = saved = time.time()
    for epoch in range(start + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_000 + epoch)  # so a resumed run draws the same
        order = torch.randperm(len(images))[: steps * args.batch_size].view(steps, -1)
        total, epoch_began = torch.zeros((), device=device), time.time()
        for step, batch in enumerate(order.to(images.device), (epoch - 1) * steps):
            anneal = (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2  # from 1 to 0
            for group in optimizer.param_groups:
                group["lr"] = lr * anneal * min(1, 10 * (step + 1) / args.epochs / steps)  # warm-up
            x = images[batch] if fits else images[batch].pin_memory().to(device, non_blocking=True)
            x1, x2 = augment(x), augment(x, solarize=0.2)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, z1 = model(x1, x2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target(1 - (1 - args.ema_decay) * anneal)
            total += loss.detach()  # not .item(): the host would wait for the GPU
            if sys.stderr.isatty():
                print(f"step {step % steps + 1}/{steps}", end="\r", file=sys.stderr, flush=True)
        loss, z_spread = torch.stack([total / steps, spread(z1.detach())]).tolist()
        row = {"epoch": epoch, "loss": loss, "spread": z_spread, "kNN": "", "lr": group["lr"]}
        row["images/s"] = steps * args.batch_size / (time.time() - epoch_began)
        if test and epoch * 10 // args.epochs > (epoch - 1) * 10 // args.epochs:  # ten times a run
            row["kNN"] = knn_accuracy(model.backbone, train, test, device)
        row["minutes left"] = (time.time() - began) / 60 * (args.epochs - epoch) / (epoch - start)
        line = [f"{name} {x:.4g} " for name, x in row.items() if x != ""]
        print(*line, "" if z_spread >= 0.1 else "collapsed?", flush=True)
        log.append(",".join(map(str, row.values())))
        (out / "log.csv").write_text("\n".join([",".join(row), *log]) + "\n")
        if epoch == args.epochs or time.time() - saved >= SAVE_SECONDS:
            state = {"backbone": model.backbone.state_dict(), "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "epoch": epoch, "args": vars(args)}
            torch.save(state | {"log": log}, out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # never half a checkpoint
            saved = time.time()
    print(f"now: python linear_eval.py {out}/checkpoint.pt")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # one line instead of a traceback
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
