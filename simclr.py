"""SimCLR: A Simple Framework for Contrastive Learning, Chen et al. 2020, arXiv:2002.05709.

    for x in batches:                       # Algorithm 1
        x1, x2 = augment(x), augment(x)     # two random views of every image
        z1, z2 = f(x1), f(x2)               # f: backbone, then projector
        L = mean over the 2B views of the cross-entropy with the other 2B - 1 as classes, logits
            cosine(z, z') / tau, and the other view of the same image as the label
        update f by the gradient of L

Pushing all other images of the batch away prevents collapse; a larger batch offers more of them.

    python simclr.py && python linear_eval.py runs/simclr/checkpoint.pt

Differs from the paper (App. B.9, CIFAR-10): ResNet-18, 100 epochs instead of 1000, SGD with weight
decay 5e-4 and no warm-up instead of LARS with 1e-6, crops from 0.2 of the area instead of 0.08.
"""

import argparse
import io
import math
import os
import signal
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision import datasets, models, ops, utils
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
BUILT_IN = {"cifar10": 32, "cifar100": 32, "stl10": 96}  # data sets and the side of their images
SAVE_SECONDS = 60  # at least, from one checkpoint to the next


# ------------------------------------------------------------------ 1. Augmentation
def random_resized_crop(x):
    """A random box of each image, resized to S x S, half of them mirrored: x (N, 3, S, S), 0-1."""
    size = x.shape[-1]
    area = torch.empty(len(x), 10, 1, device=x.device).uniform_(0.2, 1) * size**2  # ten tries
    ratio = (4 / 3) ** torch.empty_like(area).uniform_(-1, 1)  # of width to height, 3/4 to 4/3
    extent = torch.cat([area * ratio, area / ratio], 2).sqrt().round()  # (N, 10, 2) width, height
    first = (extent <= size).all(2, keepdim=True).float().argmax(1, keepdim=True)  # that fits
    extent = extent.take_along_dim(first, 1).transpose(1, 2).clamp(max=size)  # (N, 2, 1) pixels
    corner = (torch.rand_like(extent) * (size - extent + 1)).floor()  # (N, 2, 1) upper left
    centers = (torch.arange(size, device=x.device) + 0.5) / size  # (S,) of a view's pixels, 0-1
    inside = (centers * extent).clamp(min=0.5).minimum(extent - 0.5)  # (N, 2, S) in the box
    u, v = (2 * (corner + inside) / size - 1).unbind(1)  # (N, S) each, the image spans -1 to 1
    u = torch.where(torch.rand(len(x), 1, device=x.device) < 0.5, u.flip(1), u)
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[:, :, None]), 3)  # (N, S, S, 2)
    return F.grid_sample(x, grid, align_corners=False)


def augment(images):
    """A random view of each image, normalized: (N, 3, S, S) uint8 -> float32. SimSiam App. A."""
    x = random_resized_crop(images / 255)
    jitter, gray, blur, *factors, turns = torch.rand(7, len(x), 1, 1, 1, device=x.device)
    factors = [1 + (jitter < 0.8) * 0.4 * (2 * f - 1) for f in factors]  # a fifth: all are 1
    for i in torch.randperm(4).tolist():
        if i < 3:  # brightness, contrast, saturation: blend with black, mean gray, the gray image
            luma = TF.rgb_to_grayscale(x)  # (N, 1, S, S)
            other = (torch.zeros_like(luma), luma.mean((2, 3), keepdim=True), luma)[i]
            x = torch.lerp(other, x, factors[i]).clamp(0, 1)
        else:  # hue in HSV: of a full turn of 6 (r at 0, g 2, b 4) up to a tenth, 0.6, is added
            value, top = x.max(1, keepdim=True)  # (N, 1, S, S), and which channel it is
            chroma = value - x.amin(1, keepdim=True)
            offset = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, top)  # g - b, b - r or r - g
            hue = 2 * top + offset / chroma.clamp(min=1e-8) + (jitter < 0.8) * 0.6 * (2 * turns - 1)
            hue = (hue + 5 - 2 * torch.arange(3, device=x.device).view(3, 1, 1)) % 6  # (N, 3, S, S)
            x = value - chroma * torch.minimum(hue, 4 - hue).clamp(0, 1)  # HSV to RGB
    x = torch.where(gray < 0.2, TF.rgb_to_grayscale(x), x)
    if x.shape[-1] > 64:  # smaller images stay sharp; kernel: a tenth of the side
        sigma = 0.1 + 1.9 * torch.rand(()).item()  # one for all, drawn on the CPU
        x = torch.where(blur < 0.5, TF.gaussian_blur(x, x.shape[-1] // 20 * 2 + 1, sigma), x)
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
def nt_xent(z1, z2, temperature):
    """Eq. (1), mean over all 2B views: z1, z2 (B, dim), rows i: two views of image i -> scalar."""
    z = F.normalize(torch.cat([z1, z2]).float())  # (2B, dim)
    if torch.distributed.is_initialized():  # the other ranks' views are negatives too
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z.detach())
        own = z.detach() + len(parts) * (z - z.detach())  # gradient times ranks, as DDP averages it
        parts[torch.distributed.get_rank()] = own
        z = torch.cat(parts)  # (2B, dim), B of all ranks
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ z.T / temperature  # (2B, 2B) cosine similarities
    logits.fill_diagonal_(-torch.inf)  # a view must not pick itself: k != i
    rows = torch.arange(len(z), device=z.device).view(-1, 2, len(z1))  # ranks, views, images
    return F.cross_entropy(logits, rows.flip(1).flatten())  # to pick: the other view's row


class SimCLR(nn.Module):
    """Each view finds the other. backbone: a ResNet with identity fc, -> (B, inplanes)."""

    def __init__(self, backbone, hidden=1024, dim=128, temperature=0.5):
        super().__init__()
        self.backbone, self.temperature = backbone, temperature
        self.projector = ops.MLP(backbone.inplanes, [hidden, dim])

    def forward(self, x1, x2):
        """Two views (B, 3, S, S) -> the loss, Eq. (1), and z1 (B, dim), to watch for collapse."""
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))  # (B, dim)
        return nt_xent(z1, z2, self.temperature), z1


# ------------------------------------------------------------------ 4. Data
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


# ------------------------------------------------------------------ 5. Monitoring
@torch.no_grad()
def knn_accuracy(backbone, train, test, device, k=200, temperature=0.1):
    """Top-1 in %: the k nearest in train vote. train, test: images (N, 3, S, S), labels (N,)."""
    backbone.eval()  # Wu et al. 2018, Sec. 3.4
    chunks = [*train[0].split(500), *test[0].split(500)]
    h = [F.normalize(backbone(TF.normalize(x.to(device) / 255, MEAN, STD))) for x in chunks]
    bank, queries = torch.cat(h).split([len(train[0]), len(test[0])])  # (N, D)
    labels, votes = F.one_hot(train[1]).float().to(device), []  # (N, classes)
    for q in queries.split(500):
        cosine, nearest = (q @ bank.T).topk(min(k, len(bank)))  # (500, k)
        votes.append(torch.einsum("qk,qkc->qc", (cosine / temperature).exp(), labels[nearest]))
    backbone.train()
    return 100 * (torch.cat(votes).argmax(1).cpu() == test[1]).float().mean().item()


# ------------------------------------------------------------------ 6. Training
def parse_args(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="cifar10", help="cifar10, cifar100, stl10, or a folder of images")
    add("--data-dir", default="data", help="where the built-in sets are, or get downloaded")
    add("--size", type=int, help="side of the images in pixels, None: the set's, for a folder 32")
    add("--subset", type=int, help="use that many images of each split, drawn with the seed")
    add("--arch", default="resnet18", choices=["resnet18", "resnet34", "resnet50"], help="backbone")
    add("--epochs", type=int, default=100, help="passes over the images")
    add("--batch-size", type=int, default=512, help="images a step, each in two views")
    add("--lr", type=float, default=0.3, help="learning rate per 256 images of the batch")
    add("--weight-decay", type=float, default=5e-4, help="L2 penalty")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of the run")
    add("--resume", action="store_true", help="go on from --out; give the other flags as before")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--temperature", type=float, default=0.5, help="tau of Eq. (1), divides the cosines")
    args = parser.parse_args(argv, argparse.Namespace(method="SimCLR"))
    args.size = BUILT_IN.get(args.data, 32) if args.size is None else args.size
    for name, least in (("size", 8), ("subset", 1), ("epochs", 1), ("batch_size", 2), ("lr", 0)):
        if vars(args)[name] is not None and not vars(args)[name] >= least:  # nor NaN
            raise ValueError(f"--{name.replace('_', '-')} {vars(args)[name]} is less than {least}")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, out, safe = torch.device(args.device), Path(args.out), 0  # safe: the last epoch saved
    if (out / "checkpoint.pt").exists() and not args.resume:
        raise FileExistsError(f"{out} holds a checkpoint: go on with --resume, or change --out")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no GPU is available, take --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    stop = argparse.ArgumentParser().exit  # prints a line to standard error and ends
    for n in (signal.SIGINT, signal.SIGTERM) if rank == 0 else ():  # Ctrl-C, and schedulers' kill
        signal.signal(n, lambda n, _: stop(128 + n, f"{safe} epochs saved, go on with --resume\n"))
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    train = load_split(args, "train")
    images = load_split(args, "unlabeled")[0] if args.data == "stl10" else train[0]
    labeled = train[1][0] >= 0 and (args.data in BUILT_IN or Path(args.data, "test").is_dir())
    test = load_split(args, "test") if labeled and rank == 0 else None
    steps = len(images) // args.batch_size  # an epoch; the rest of the images sit this one out
    if steps == 0 or args.batch_size % world or len(images) < (args.subset or 0):
        raise ValueError(f"only {len(images)} images: lower --subset or --batch-size ({world} x n)")
    model = SimCLR(build_backbone(args.arch, args.size), temperature=args.temperature)
    if world > 1:  # under torchrun: a process for each GPU, which works on its part of every batch
        torch.distributed.init_process_group()
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if device.type == "cuda" else -1)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
    model.to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if args.compile else model
    network = nn.parallel.DistributedDataParallel(network) if world > 1 else network
    fits = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    images = images.to(device) if fits else images
    peak, log, saved = args.lr * args.batch_size / 256, [], time.time()
    optimizer = torch.optim.SGD(model.parameters(), peak, 0.9, weight_decay=args.weight_decay)
    if args.resume:
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        for name, value in [i for i in vars(args).items() if i not in state["args"].items()]:
            if name not in ("lr", "epochs", "device", "data_dir", "out", "resume", "compile"):
                raise ValueError(f"{out} has {name} {state['args'].get(name)}, not {value}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        safe, log = state["epoch"], state["log"]
    if rank == 0:
        print(f"{len(images)} images of {args.size} px{'' if test else ', no test labels: no kNN'}")
        out.mkdir(parents=True, exist_ok=True)
        x = images[:8].to(device)
        v = torch.stack([TF.normalize(x / 255, MEAN, STD), augment(x), augment(x)], 1)
        v = TF.normalize(v, [-m / s for m, s in zip(MEAN, STD)], [1 / s for s in STD])
        utils.save_image(F.interpolate(v.flatten(0, 1), 128), out / "views.png", nrow=3, padding=8)
    for epoch in range(safe + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_000 + epoch)  # so a resumed run draws the same
        order = torch.randperm(len(images))[: steps * args.batch_size].view(steps, world, -1)
        torch.manual_seed((args.seed * 1_000_000 + epoch) * 1000 + rank)  # every rank other views
        total, epoch_began = torch.zeros((), device=device), time.time()
        for step, batch in enumerate(order[:, rank].to(images.device), (epoch - 1) * steps):
            done = (step + 0.5) / (args.epochs * steps)  # the share of the run
            anneal = (1 + math.cos(math.pi * done)) / 2  # from 1 to 0
            optimizer.param_groups[0]["lr"] = lr = peak * anneal
            x = images[batch] if fits else images[batch].pin_memory().to(device, non_blocking=True)
            x1, x2 = augment(x), augment(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, z1 = network(x1, x2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()  # not .item(): the host would wait for the GPU
            if sys.stderr.isatty() and rank == 0:
                print(f"step {step % steps + 1}/{steps}", end="\r", file=sys.stderr, flush=True)
        std = F.normalize(z1.detach().float()).std(0).mean() * z1.shape[1] ** 0.5  # SimSiam Fig. 2
        loss, spread = torch.stack([total / steps, std]).tolist()  # spread 0: collapsed, 1: even
        if rank > 0:
            continue
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())):
            raise ValueError(f"epoch {epoch}: the loss is {loss}: lower --lr; {safe} epochs saved")
        row = {"epoch": epoch, "loss": loss, "spread": spread, "kNN": "", "lr": lr}
        row["images/s"] = steps * args.batch_size / (time.time() - epoch_began)
        if test and epoch * 10 // args.epochs > (epoch - 1) * 10 // args.epochs:  # ten times a run
            row["kNN"] = knn_accuracy(model.backbone, train, test, device)
        row["minutes left"] = (args.epochs - epoch) * (time.time() - epoch_began) / 60
        line = [f"{name} {x:.4g} " for name, x in row.items() if x != ""]
        print(*line, "" if spread >= 0.1 else "collapsed?", flush=True)
        log.append(",".join(map(str, row.values())))
        (out / "log.csv").write_text("\n".join([",".join(row), *log]) + "\n")
        if epoch == args.epochs or time.time() - saved >= SAVE_SECONDS:
            state = {"backbone": model.backbone.state_dict(), "model": model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "epoch": epoch, "args": vars(args)}
            torch.save(state | {"log": log}, buffer := io.BytesIO())
            (out / "checkpoint.tmp").write_bytes(buffer.getvalue())  # on a full disk an OSError
            (out / "checkpoint.tmp").replace(out / "checkpoint.pt")  # a killed run leaves no half
            safe, saved = epoch, time.time()
            print(f"saved, to measure: python linear_eval.py {out}/checkpoint.pt", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:  # one line, no traceback
        hint = "; lower --batch-size" if isinstance(error, torch.OutOfMemoryError) else ""
        argparse.ArgumentParser().exit(2, f"{sys.argv[0]}: {error}{hint}\n")
