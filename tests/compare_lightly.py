"""The scripts beside lightly's modules, losses and transforms, on the same images.

    pip install lightly
    python tests/compare_lightly.py simclr --data FOLDER --seed 0
    python tests/compare_lightly.py simclr --data FOLDER --speed

Equal on both sides: the images, ResNet-18 with its 3x3 stem and the last BatchNorm of each block
starting at zero, heads' widths, crops from 0.2 of the area, jitter, gray views and BYOL's
solarizing at the scripts' strengths, no blur, normalizing; batch size, SGD with momentum 0.9 and
weight decay on all weights, the cosine of the learning rate and of BYOL's moving average, the
precision, and how the features are judged. lightly's BYOL loss, half the sum of two negative
cosines, is taken times four, the paper's. Not equal: draws; lightly's order of color changes is
drawn for each image, a script's for each batch; lightly's last layers of BYOL's and SimCLR's heads
have a bias; and lightly's views are made by worker processes, one image after the other.

The README's table is of seeds 0 and 1 with the default settings, for SimSiam with --lr 0.5
--epochs 6, by which it learns more.
"""

import argparse
import copy
import importlib
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
linear_eval = importlib.import_module("linear_eval")


# ------------------------------------------------------------------ lightly's side
def transforms(method, size):
    """lightly's two transforms of an image, at the scripts' strengths."""
    from lightly.transforms import BYOLView1Transform, BYOLView2Transform
    from lightly.transforms.simclr_transform import SimCLRViewTransform
    from lightly.transforms.simsiam_transform import SimSiamViewTransform

    jitter = {"cj_bright": 0.4, "cj_contrast": 0.4, "cj_sat": 0.4, "cj_hue": 0.1}
    settings = {"input_size": size, "min_scale": 0.2, "gaussian_blur": 0.0, **jitter}
    if method == "byol":
        return BYOLView1Transform(**settings), BYOLView2Transform(**settings)
    kind = {"simsiam": SimSiamViewTransform, "simclr": SimCLRViewTransform}[method]
    return kind(**settings), kind(**settings)


class Views(torch.utils.data.Dataset):
    """Two views of each picture."""

    def __init__(self, images, method, size):
        self.pictures = [TF.to_pil_image(image) for image in images]
        self.first, self.second = transforms(method, size)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.first(self.pictures[i]), self.second(self.pictures[i])


class SimSiam(torch.nn.Module):
    def __init__(self, backbone):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import heads

        super().__init__()
        self.backbone = backbone
        last = torch.nn.BatchNorm1d(2048, affine=False)
        layers = [
            (512, 2048, torch.nn.BatchNorm1d(2048), torch.nn.ReLU()),
            (2048, 2048, last, None),
        ]
        self.projector = heads.ProjectionHead(layers)  # two layers, as in the paper for CIFAR-10
        self.predictor = heads.SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x1, x2):
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return (self.criterion(p1, z2.detach()) + self.criterion(p2, z1.detach())) / 2


class BYOL(torch.nn.Module):
    def __init__(self, backbone):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import heads
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone = backbone
        self.projector = heads.BYOLProjectionHead(512, 4096, 256)
        self.predictor = heads.BYOLPredictionHead(256, 4096, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projector_momentum = copy.deepcopy(self.projector)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projector_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x1, x2):
        p1 = self.predictor(self.projector(self.backbone(x1)))
        p2 = self.predictor(self.projector(self.backbone(x2)))
        t1 = self.projector_momentum(self.backbone_momentum(x1)).detach()
        t2 = self.projector_momentum(self.backbone_momentum(x2)).detach()
        return 4 * (self.criterion(p1, t2) + self.criterion(p2, t1)) / 2

    def update_target(self, rate):
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.backbone_momentum, 1 - rate)
        update_momentum(self.projector, self.projector_momentum, 1 - rate)


class SimCLR(torch.nn.Module):
    def __init__(self, backbone):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import heads

        super().__init__()
        self.backbone = backbone
        self.projector = heads.SimCLRProjectionHead(512, 1024, 128, batch_norm=False)
        self.criterion = NTXentLoss(temperature=0.5)

    def forward(self, x1, x2):
        return self.criterion(self.projector(self.backbone(x1)), self.projector(self.backbone(x2)))


CLASSES = {"simsiam": SimSiam, "byol": BYOL, "simclr": SimCLR}


class Lightly:
    """A training by lightly's parts, an epoch a call."""

    def __init__(self, script, images, args):
        self.args = args
        torch.manual_seed(args.seed)
        backbone = script.build_backbone("resnet18", args.size)
        self.network = CLASSES[args.method](backbone).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=1, momentum=0.9, weight_decay=args.weight_decay
        )
        self.loader = torch.utils.data.DataLoader(
            Views(images, args.method, args.size),
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
        )
        self.step = 0

    def epoch(self):
        steps = self.args.epochs * len(self.loader)
        for x1, x2 in self.loader:
            anneal = (1 + math.cos(math.pi * (self.step % steps + 0.5) / steps)) / 2
            self.optimizer.param_groups[0]["lr"] = (
                self.args.lr * self.args.batch_size / 256 * anneal
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                loss = self.network(x1, x2)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.args.method == "byol":
                self.network.update_target(0.01 * anneal)
            self.step += 1
        return loss.item()


# ------------------------------------------------------------------ Both
def flags(args, out):
    given = f"--data {args.data} --size {args.size} --subset {args.images} --device cpu"
    given += f" --batch-size {args.batch_size} --lr {args.lr} --weight-decay {args.weight_decay}"
    given += f" --epochs {args.epochs} --seed {args.seed}"
    return [*given.split(), "--bf16" if args.bf16 else "--no-bf16", "--out", str(out)]


def judge(script, backbone, args):
    """kNN with k=200 and k=10, and the linear layer: top-1 in % of all test images."""
    images, y = script.load_split(script.parse_args(flags(args, "x")), "train")
    everything = copy.copy(args)
    everything.images = 10**9
    test_images, test_y = script.load_split(script.parse_args(flags(everything, "x")), "test")
    h = script.compute_features(backbone, images, "cpu")
    test_h = script.compute_features(backbone, test_images, "cpu")
    torch.manual_seed(0)
    layer, _ = linear_eval.linear_probe(h, y)
    linear = 100 * (layer(test_h).argmax(1) == test_y).float().mean().item()
    k200 = linear_eval.knn_accuracy(h, y, test_h, test_y)
    k10 = linear_eval.knn_accuracy(h, y, test_h, test_y, k=10, temperature=torch.inf)
    return f"kNN k=200 {k200:.2f}, k=10 {k10:.2f}, linear {linear:.2f}"


def compare(script, args):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        script.main(flags(args, out))
        backbone = script.build_backbone("resnet18", args.size)
        backbone.load_state_dict(torch.load(out / "checkpoint.pt")["backbone"])
    print(f"{args.method} seed {args.seed} script:  {judge(script, backbone, args)}", flush=True)
    images, _ = script.load_split(script.parse_args(flags(args, "x")), "train")
    lightly = Lightly(script, images, args)
    for epoch in range(args.epochs):
        print(f"lightly, epoch {epoch + 1}: last loss {lightly.epoch():.4f}", flush=True)
    result = judge(script, lightly.network.backbone, args)
    print(f"{args.method} seed {args.seed} lightly: {result}", flush=True)


def speed(script, args, rounds=5):
    """Images a second of both, which take turns, a short epoch each."""
    images, _ = script.load_split(script.parse_args(flags(args, "x")), "train")
    lightly = Lightly(script, images, args)
    kind = {"simsiam": "SimSiam", "byol": "BYOL", "simclr": "SimCLR"}[args.method]
    network = getattr(script, kind)(script.build_backbone("resnet18", args.size))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, weight_decay=args.weight_decay
    )

    def ours():
        steps = len(images) // args.batch_size
        for rows in torch.randperm(len(images)).split(args.batch_size)[:steps]:
            script.train_step(network, optimizer, images[rows], args.bf16)
            if args.method == "byol":
                network.update_target(0.01)

    times = {"script": [], "lightly": []}
    for _ in range(rounds + 1):
        for name, epoch in (("script", ours), ("lightly", lightly.epoch)):
            began = time.perf_counter()
            epoch()
            times[name].append(time.perf_counter() - began)
    count = len(images) // args.batch_size * args.batch_size
    for name, seconds in times.items():
        rate = count / statistics.median(seconds[1:])
        print(
            f"{args.method} {name}: {rate:.0f} images a second, {args.workers} workers of lightly"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("method", choices=list(CLASSES))
    add("--data", required=True, help="folder: train/NAME/, test/NAME/")
    add("--size", type=int, default=16)
    add("--images", type=int, default=10_000, help="of the training split")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.3, help="per 256 images")
    add("--weight-decay", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes that make lightly's views")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True)
    add("--speed", action="store_true", help="measure images a second instead")
    args = parser.parse_args(argv)
    script = importlib.import_module(args.method)
    if args.speed:
        speed(script, args)
    else:
        compare(script, args)


if __name__ == "__main__":
    main()
