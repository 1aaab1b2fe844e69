"""What each part of a training step costs, on this machine, in one run.

    python tests/bench.py --batch-size 256            # on the GPU if there is one, else on the CPU
    python tests/bench.py --parts augmentation probe  # some of the parts only

A time is the median over the repetitions, after one that does not count; what is compared takes
turns, so that a noisy machine hits all of it alike. Compare the ratios, not the times.

- steps: the script's real step, its train_step with what the loop has around it, against the bare
  one: the network's forward and backward and the update, on two batches that lie on the device,
  with a mean for a loss.
- augmentation: views a second, against torchvision's per-image transforms in worker processes.
- variants: one thing changed at a time, in the bare step of the first of the methods.
- decode: a folder of 60,000 small images into one tensor.
- sizes: the real step at growing batches and images.
- probe: linear_eval's fit on 50,000 features of 512 dimensions.
"""

import argparse
import importlib
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LOSSES = {"simsiam": "negative_cosine", "byol": "regression_loss", "simclr": "nt_xent"}
CLASSES = {"simsiam": "SimSiam", "byol": "BYOL", "simclr": "SimCLR"}
PARTS = ("steps", "augmentation", "variants", "decode", "sizes", "probe")


# ------------------------------------------------------------------ Measuring
def wait(device):
    """Let the GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(functions, args, calls=None, repeat=None):
    """{name: [seconds of a call, by repetition]} for {name: function}, which take turns,
    there and back. calls: in a row, for one time; on a GPU the host then runs ahead of it."""
    calls = calls or (args.calls if args.device.type == "cuda" else 1)
    times = {name: [] for name in functions}
    for repetition in range((repeat or args.repeat) + 1):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            wait(args.device)
            began = time.perf_counter()
            for _ in range(calls):
                functions[name]()
            wait(args.device)
            if repetition > 0:  # the first warms up
                times[name].append((time.perf_counter() - began) / calls)
    return times


def medians(times):
    return {name: statistics.median(of_name) for name, of_name in times.items()}


def memory(training):
    """Peak of one more real step on a GPU, in GiB, without the data set; not known on a CPU."""
    if training.device.type == "cpu":
        return ""
    torch.cuda.reset_peak_memory_stats()
    training.real()
    wait(training.device)
    return torch.cuda.max_memory_allocated() / 2**30


def table(title, columns, rows):
    """Print a table as its rows come: the first column to the left, numbers to the right."""
    print(f"\n{title}\n  {columns[0]:<30}" + "".join(f"{c:>14}" for c in columns[1:]), flush=True)
    for first, *rest in rows:
        cells = [x if isinstance(x, str) else f"{x:.4g}" for x in rest]
        print(f"  {first:<30}" + "".join(f"{x:>14}" for x in cells), flush=True)


# ------------------------------------------------------------------ A step
class Training:
    """A method's script, set up as its main does: the real step, the bare one, and their parts."""

    def __init__(self, name, args, batch_size=None, size=None, channels_last=True, **sgd):
        self.script = importlib.import_module(name)
        self.name, self.device = name, args.device
        self.batch_size, size = batch_size or args.batch_size, size or args.size
        flags = ["--batch-size", str(self.batch_size), "--size", str(size), "--epochs", "100"]
        self.flags = self.script.parse_args([*flags, "--device", args.device.type])
        self.loss = getattr(self.script, LOSSES[name])
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        backbone = self.script.build_backbone("resnet18", size)
        model = getattr(self.script, CLASSES[name])(backbone).to(args.device)
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.network = self.model
        self.images = torch.randint(
            0, 256, (2 * self.batch_size, 3, size, size), dtype=torch.uint8, device=args.device
        )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 1e-3, 0.9, weight_decay=5e-4, **sgd
        )
        self.order = torch.randperm(2 * self.batch_size, device=args.device).view(2, -1)
        pictures = [self.script.augment(self.images[row]) for row in self.order]
        self.views = [self.script.normalize(x) for x in pictures]
        if not channels_last:
            self.views = [view.contiguous() for view in self.views]
        self.dtype = torch.bfloat16 if args.device.type == "cuda" else None
        self.flags.bf16 = self.dtype is not None
        self.steps = 0
        self.total = torch.zeros((), device=self.device)

    def real(self):
        """A step as in the loop of the script's main, with the next batch."""
        rows = self.order[self.steps % 2]
        anneal = (1 + math.cos(math.pi * (self.steps % 1000 + 0.5) / 10_000)) / 2
        lr = self.flags.lr * self.batch_size / 256 * anneal
        group = self.optimizer.param_groups[0]
        group.update(lr=lr, weight_decay=self.flags.weight_decay)
        x = self.images[rows].to(self.device)
        loss, _ = self.script.train_step(self.network, self.optimizer, x, self.flags.bf16)
        if self.name == "byol":
            self.model.update_target((1 - self.flags.ema_decay) * anneal)
        self.total += loss
        self.steps += 1

    def autocast(self):
        enabled = self.dtype is not None
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=enabled)

    @contextmanager
    def mean_for_a_loss(self):
        """In place of the method's loss, so that there is something to go backward from."""

        def mean(a, b, *_):
            return a.float().mean() + (b.float().mean() if self.name == "simclr" else 0)

        setattr(self.script, LOSSES[self.name], mean)
        try:
            yield
        finally:
            setattr(self.script, LOSSES[self.name], self.loss)

    def bare(self):
        """Forward, backward and update on two views that lie there, normalized."""
        with self.mean_for_a_loss(), self.autocast():
            loss, _ = self.network(*self.views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def together(self):
        """As bare, but one forward of the backbone for both views, and of nothing else."""
        x, backbone = torch.cat(self.views), self.model.backbone
        try:
            with self.mean_for_a_loss(), self.autocast():
                self.model.backbone = _Next(iter(backbone(x).chunk(2)))
                loss, _ = self.network(*self.views)
        finally:
            self.model.backbone = backbone
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def augmentation(self):
        x = self.images[self.order[0]]
        for _ in range(2):
            self.script.normalize(self.script.augment(x))

    def loss_alone(self):
        width = 128 if self.name == "simclr" else 256 if self.name == "byol" else 2048
        if not hasattr(self, "outputs"):
            shape = (self.batch_size, width)
            dtype = self.dtype or torch.float32
            self.outputs = [torch.randn(shape, device=self.device, dtype=dtype) for _ in range(2)]
        a, b = (x.clone().requires_grad_() for x in self.outputs)
        if self.name == "simclr":
            self.loss(a, b, 0.5).backward()
        else:  # of two symmetric terms
            (self.loss(a, b.detach()) + self.loss(b, a.detach())).backward()

    def moving_average(self):
        self.model.update_target(0.01)


class _Next(nn.Module):
    """Stands in for the backbone, whose features of both views are there already."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x):
        return next(self.features)


# ------------------------------------------------------------------ The parts
def steps(args):
    columns = [
        "",
        "real / bare",
        "from",
        "to",
        "bare ms",
        "real ms",
        "augment %",
        "loss %",
        "EMA %",
    ]
    columns += ["rest %", "images/s", "GiB"]

    def rows():
        for name in args.methods:
            training = Training(name, args)
            parts = {"bare": training.bare, "real": training.real}
            parts |= {"augment": training.augmentation, "loss": training.loss_alone}
            if name == "byol":
                parts["EMA"] = training.moving_average
            times = interleaved(parts, args)
            ratios = [real / bare for real, bare in zip(times["real"], times["bare"])]
            ratio, t = statistics.median(ratios), medians(times)
            alone = [100 * t.get(part, 0) / t["bare"] for part in ("augment", "loss", "EMA")]
            yield [
                name,
                *(ratio, min(ratios), max(ratios)),
                *(1000 * t["bare"], 1000 * t["real"]),
                *(*alone, 100 * (ratio - 1) - sum(alone)),
                args.batch_size / t["real"],
                memory(training),
            ]
            del training, parts

    title = (
        f"A step, batch {args.batch_size}, {args.size} px; the parts alone, in % of the bare step"
    )
    table(title, columns, rows())
    if args.device.type == "cuda":
        for name in args.methods:
            training, found = Training(name, args), "none"
            training.real()
            torch.cuda.set_sync_debug_mode("error")
            try:
                training.real()
            except RuntimeError as error:
                found = str(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            print(f"  {name}: host-device synchronization that torch reports in a step: {found}")


class PerImage(Dataset):
    """The peers' way: torchvision's transforms on one PIL image at a time, two views of each."""

    def __init__(self, images, size):
        self.images = [TF.to_pil_image(image) for image in images]
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.2, 1)),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                *([v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1)])] if size > 64 else []),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


def augmentation(args):
    training = Training("simsiam", args)
    count = max(min(2048, args.images) // args.batch_size, 1) * args.batch_size
    images = torch.randint(0, 256, (count, 3, args.size, args.size), dtype=torch.uint8)
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(
        PerImage(images, args.size),
        max(1, count // (8 * workers)),  # several batches for each, so that none is idle
        num_workers=workers,
        persistent_workers=True,
        pin_memory=args.device.type == "cuda",
    )

    def per_image():
        for x1, x2 in loader:
            x1.to(args.device), x2.to(args.device)

    def ours():
        for _ in range(count // args.batch_size):
            training.augmentation()

    functions = {"ours": ours, "per image": per_image, "bare": training.bare}
    t = medians(interleaved(functions, args, calls=1))
    bare = t["bare"] * count / args.batch_size
    beside = args.device.type == "cuda"  # the GPU trains while the workers augment
    rows = []
    for label, name in (
        ("whole batches", "ours"),
        (f"per image, {workers} processes", "per image"),
    ):
        epoch = max(t[name], bare) if beside and name == "per image" else t[name] + bare
        share = 100 * (epoch - bare) / epoch
        rows.append([label, 2 * count / t[name], t[name] / t["ours"], share])
    columns = ["", "views/s", "times as long", "% of an epoch"]
    title = f"Augmentation, batches of {args.batch_size}, {args.size} px, on {args.device.type}"
    table(title, columns, rows)


def variants(args):
    name = args.methods[0]

    def other(**options):
        return Training(name, args, **options)

    usual = other()
    functions = {"as in the script": usual.bare, "backbone once for both views": usual.together}
    half = other()
    half.dtype = None if half.dtype else torch.bfloat16
    functions["float32, TF32 convolutions" if half.dtype is None else "bfloat16"] = half.bare
    functions["contiguous, not channels_last"] = other(channels_last=False).bare
    foreach = args.device.type == "cpu"  # the other one is the default
    functions["SGD, foreach" if foreach else "SGD, a loop"] = other(foreach=foreach).bare
    functions["SGD, fused"] = other(fused=True).bare
    note = "torch.compile is not tried: it takes a minute" if args.no_compile else ""
    compiled = other()
    if not note:
        compiled.network = torch.compile(compiled.model)
        began = time.perf_counter()
        try:
            compiled.bare()
            functions["torch.compile"] = compiled.bare
            note = f"torch.compile took {time.perf_counter() - began:.0f} s before the first step"
        except Exception as error:
            note = f"torch.compile: {type(error).__name__}: {str(error)[:200]}"
    for variant, function in list(functions.items()):  # bfloat16 takes minutes where it is emulated
        began = time.perf_counter()
        try:
            function()
            wait(args.device)
            why = f"over {args.limit:g} s" if time.perf_counter() - began > args.limit else ""
        except torch.OutOfMemoryError:
            why = "no memory"
        if why:
            print(f"  {variant}: {why}, left out", flush=True)
            del functions[variant]
    t = medians(interleaved(functions, args))
    base = t["as in the script"]
    rows = [[variant, base / seconds, 1000 * seconds] for variant, seconds in t.items()]
    table(f"Variants of {name}'s bare step", ["", "times as fast", "ms"], rows)
    print(f"  {note}")


def decode(args):
    from simsiam import load_split, parse_args

    total = args.images
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        count = min(500, total)
        small = nn.functional.interpolate(torch.rand(count, 3, 8, 8), 32, mode="bicubic")
        for i, image in enumerate(small.clamp(0, 1)):
            save_image(image, Path(folder, f"{i}.png"))
        for i in range(count, total):
            os.link(Path(folder, f"{i % count}.png"), Path(folder, f"{i}.png"))
        flags = parse_args(["--data", folder])
        functions = {"decode": lambda: load_split(flags, "train")}
        t = medians(interleaved(functions, args, calls=1, repeat=2))
    rows = [[label, seconds, total / seconds] for label, seconds in t.items()]
    table(
        f"Decoding {total} images of 32 px ({count} distinct ones, cached)",
        ["", "seconds", "images/s"],
        rows,
    )


def sizes(args):
    columns = ["", "ms", "images/s", "ms an image", "GiB"]

    def rows():
        for name in args.methods:
            growing = [[(b, args.size) for b in (64, 128, 256, 512, 1024, 2048, 4096)]]
            growing += [[(64, side)] for side in (32, 64, 96, 224)]
            for series in growing:
                for batch, size in series:
                    label = f"{name}, batch {batch}, {size} px{', other stem' if size > 64 else ''}"
                    try:
                        training = Training(name, args, batch, size)
                        began = time.perf_counter()
                        training.real()
                        wait(args.device)
                        if time.perf_counter() - began > args.limit:
                            yield [label, f"over {args.limit:g} s", "", "", ""]
                            break
                        t = medians(interleaved({"real": training.real}, args))["real"]
                        yield [label, 1000 * t, batch / t, 1000 * t / batch, memory(training)]
                    except RuntimeError as error:  # of memory, each library has its own words
                        if "alloc" not in str(error).lower():
                            raise
                        yield [label, "no memory", "", "", ""]
                        break
                    finally:
                        training = None

    table("The real step at growing sizes", columns, rows())


def probe(args):
    from linear_eval import linear_probe

    torch.manual_seed(0)
    y = torch.arange(50_000, device=args.device) % 10
    mix = torch.randn(512, 512, device=args.device) / 512**0.5
    h = (torch.randn(10, 512, device=args.device)[y] / 4 + torch.randn_like(mix)[0]) @ mix
    h = (h + torch.randn(len(y), 512, device=args.device) @ mix).relu()
    results = []

    def fit():
        torch.manual_seed(0)
        layer, decay = linear_probe(h, y)
        results.append([100 * (layer(h).argmax(1) == y).float().mean().item(), decay])

    t = medians(interleaved({"fit": fit}, args, calls=1))
    columns = ["", "seconds", "train top-1", "decay"]
    table("linear_eval's fit", columns, [["50,000 features x 512", t["fit"], *results[0]]])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--batch-size", type=int, default=512, help="images a step")
    add("--size", type=int, default=32, help="side of the images in pixels")
    add("--methods", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--repeat", type=int, default=5, help="repetitions that count")
    add(
        "--calls", type=int, default=10, help="calls in a row, of which one time is taken, on a GPU"
    )
    add("--images", type=int, default=60_000, help="to decode, and at most 2048 to augment")
    add("--limit", type=float, default=20, help="seconds: stop at a step that takes longer")
    add("--no-compile", action="store_true", help="do not try torch.compile")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{name}, {torch.get_num_threads()} threads, {versions}, {args.repeat} repetitions")
    for part in args.parts:
        globals()[part](args)


if __name__ == "__main__":
    main()
