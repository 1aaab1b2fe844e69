"""The batched augmentation against torchvision's, image by image, for the same parameters."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

EXACT = 1e-5  # of 1, the rounding of float32
# The recipe (SimSiam App. A and D, SimCLR App. A) in torchvision's transforms
CROP = v2.RandomResizedCrop(72, scale=(0.2, 1), ratio=(3 / 4, 4 / 3))
JITTER = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
BLUR = v2.GaussianBlur(7, sigma=(0.1, 2))
RECIPE = v2.Compose(
    [
        CROP,
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([JITTER], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([BLUR], 0.5),
    ]
)


def assert_alike(ours, theirs, name):
    """Two samples of one distribution. Kolmogorov-Smirnov: the largest distance between their
    shares below a value exceeds this limit once in 1000 times."""
    both = torch.tensor([*ours, *theirs], dtype=torch.float64)
    a, b = both[: len(ours)].sort().values, both[len(ours) :].sort().values
    below = [torch.searchsorted(x, both + 1e-6) / len(x) for x in (a, b)]
    limit = 1.95 * math.sqrt(1 / len(a) + 1 / len(b))
    assert (below[0] - below[1]).abs().max() < limit, name


def crop_with_boxes(script, x, monkeypatch):
    """random_resized_crop(x), and what it drew: left, top, width, height, (N,) each."""
    sample, grids = script.F.grid_sample, []

    def spy(x, grid, **options):
        grids.append(grid)
        return sample(x, grid, **options)

    monkeypatch.setattr(script.F, "grid_sample", spy)
    views = script.random_resized_crop(x)
    size, half = x.shape[-1], x.shape[-1] // 2
    u = (grids[0][:, 0, :, 0] + 1) / 2 * size
    v = (grids[0][:, :, 0, 1] + 1) / 2 * size
    width = (u[:, half] - u[:, half - 1]) * size
    height = (v[:, half] - v[:, half - 1]) * size
    left, top = u.mean(1) - width / 2, v.mean(1) - height / 2
    boxes = [t.round().int().tolist() for t in (left, top, width, height)]
    return views, *boxes


def test_crop_equals_torchvision(script, monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    views, left, top, width, height = crop_with_boxes(script, x, monkeypatch)
    for i in range(64):
        expected = TF.resized_crop(x[i], top[i], left[i], height[i], width[i], [32, 32])
        torch.testing.assert_close(views[i], expected, atol=EXACT, rtol=0)
    assert len(set(zip(left, top, width, height))) > 50


def test_boxes_are_drawn_as_torchvision_draws_them(script, monkeypatch):
    torch.manual_seed(0)
    n, size = 4000, 32
    x = torch.zeros(n, 3, size, size)
    _, left, top, width, height = crop_with_boxes(script, x, monkeypatch)
    drawn = [CROP.make_params([x[0]]) for _ in range(n)]
    for ours, name in ((left, "left"), (top, "top"), (width, "width"), (height, "height")):
        assert_alike(ours, [p[name] for p in drawn], name)
    ratios = [p["width"] / p["height"] for p in drawn]
    assert_alike([w / h for w, h in zip(width, height)], ratios, "ratio")


def test_where_no_box_fits_the_view_is_the_whole_image(script, monkeypatch):
    """As torchvision does: ten boxes as large as the image, but wider than it."""
    largest = lambda x, low, high: x.fill_(high)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "uniform_", largest)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(script.random_resized_crop(x), x, atol=EXACT, rtol=0)


def test_hue_equals_torchvision(script):
    torch.manual_seed(0)
    x, turns = torch.rand(32, 3, 16, 16), torch.empty(32, 1, 1, 1).uniform_(-0.5, 0.5)
    x[0], x[1], x[2] = 0, 1, x[2].mean(0)  # black, white, gray
    expected = torch.stack([TF.adjust_hue(a, t.item()) for a, t in zip(x, turns)])
    torch.testing.assert_close(script.rotate_hue(x, turns), expected, atol=EXACT, rtol=0)


def recorded(script, monkeypatch, images, **options):
    """augment(images), the numbers that it drew for each image, one list a draw, and the order."""
    draws, orders = [], []
    uniform, randperm = torch.Tensor.uniform_, torch.randperm

    def spy(x, low, high):
        draws.append(uniform(x, low, high).flatten().tolist())
        return x

    def spy_order(n):
        orders.append(randperm(n))
        return orders[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", spy)
        patch.setattr(torch, "randperm", spy_order)
        views = script.augment(images, **options)
    return views, draws, orders[0].tolist()


def reference_view(x, draws, order, blur, solarize):
    """augment after its crop for one image x (3, S, S), by torchvision."""
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    draws = iter(draws)
    if next(draws) < 0.5:
        x = TF.horizontal_flip(x)
    jittered = x
    for change in order:
        jittered = steps[change](jittered, next(draws))
    if next(draws) < 0.8:
        x = jittered
    if next(draws) < 0.2:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if blur:
        sigma, coin = next(draws), next(draws)
        assert 0.1 <= sigma <= 2
        x = TF.gaussian_blur(x, blur, sigma) if coin < 0.5 else x  # by a kernel of blur x blur
    if solarize is not None:
        x = TF.solarize(x, 0.5) if next(draws) < solarize else x
    assert list(draws) == []
    return x


def test_the_draws_have_the_ranges_of_the_recipe(script, monkeypatch):
    """In the order of the code; that they do what they should is tested below."""
    ranges, orders = [], []
    uniform, randperm = torch.Tensor.uniform_, torch.randperm

    def spy(x, low, high):
        ranges.append((low, high))
        return uniform(x, low, high)

    monkeypatch.setattr(torch.Tensor, "uniform_", spy)
    monkeypatch.setattr(torch, "randperm", lambda n: orders.append(randperm(n)) or orders[-1])
    script.augment(torch.zeros(2, 3, 72, 72, dtype=torch.uint8))
    low, high = CROP.ratio
    expected = [CROP.scale, (math.log(low), math.log(high)), (0, 1)]  # crop; a coin for flip
    jitter = [JITTER.brightness, JITTER.contrast, JITTER.saturation, JITTER.hue]
    expected += [jitter[change] for change in orders[0]]
    expected += [(0, 1), (0, 1), BLUR.sigma, (0, 1)]  # coins for jitter, gray, blur
    expected += [(0, 1)] if script.__name__ == "byol" else []  # for solarization
    assert len(ranges) == len(expected)
    for drawn, wanted in zip(ranges, expected):
        assert drawn == pytest.approx(wanted)


def scene():
    """A picture (3, 72, 72) uint8 with slopes, edges and colors."""
    x, y = torch.meshgrid(torch.arange(72), torch.arange(72), indexing="xy")
    board = 60 * ((x // 6 + y // 6) % 2)
    return torch.stack([60 + 2 * x, 40 + board + y, 30 + board]).to(torch.uint8)


def look(views):
    """Numbers of each view (N, 3, S, S) that a change of the recipe would change."""
    r, g, b = views.unbind(1)
    gray = views.mean(1)
    steps = gray.diff(dim=2).abs().flatten(1)
    return {
        "brightness": gray.mean((1, 2)),
        "contrast": gray.std((1, 2)),
        "saturation": (views.amax(1) - views.amin(1)).mean((1, 2)),
        "red less green": (r - g).mean((1, 2)),
        "green less blue": (g - b).mean((1, 2)),
        "right less left": (r[:, :, 36:] - r[:, :, :36]).mean((1, 2)),
        "sharpness": steps.amax(1) / steps.mean(1).clamp(min=1e-3),
    }


@pytest.fixture(scope="module")
def torchvisions():
    """What the recipe makes of a picture 1,500 times."""
    torch.manual_seed(0)
    return look(torch.stack([RECIPE(scene() / 255) for _ in range(1500)]))


def test_views_look_like_torchvisions(script, torchvisions):
    """The whole recipe at once: each number is spread over the views as over torchvision's."""
    torch.manual_seed(1)
    batches = [script.augment(scene().expand(10, 3, 72, 72)) for _ in range(150)]
    for name, ours in look(torch.cat(batches)).items():
        assert_alike(ours.tolist(), torchvisions[name].tolist(), name)


@pytest.mark.parametrize(("size", "blur"), [(16, None), (80, 9)])
def test_colors_and_blur_equal_torchvision(script, monkeypatch, size, blur):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8)
    images[0], images[1], images[2] = 0, 255, 90  # black, white, gray: no hue, no saturation
    monkeypatch.setattr(script, "random_resized_crop", lambda x: x)
    options = {"solarize": 0.5} if script.__name__ == "byol" else {}
    orders = set()
    for _ in range(6 if size == 16 else 3):
        views, draws, order = recorded(script, monkeypatch, images, **options)
        orders.add(tuple(order))
        of_image = [[d[i % len(d)] for d in draws] for i in range(40)]  # one sigma for all
        for image, drawn, view in zip(images, of_image, views):
            expected = reference_view(image / 255, drawn, order, blur, options.get("solarize"))
            off = (view - expected).abs()
            if options:  # rounding may put a value on the other side of the threshold
                off = off[(expected - 0.5).abs() > EXACT]
            assert off.max() < EXACT
    assert len(orders) > 2


def test_the_blur_takes_rows_and_columns_by_turns(script, monkeypatch):
    """Its kernel of 23 x 23 pixels at 224 px would take 20 times as long as two of 23."""
    sides, blur = [], TF.gaussian_blur
    monkeypatch.setattr(TF, "gaussian_blur", lambda x, k, s: sides.append(k) or blur(x, k, s))
    script.augment(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert sides == [[23, 1], [1, 23]]


def test_every_image_has_its_own_parameters(script):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    views = script.augment(image.expand(32, -1, -1, -1))
    assert views.shape == (32, 3, 32, 32)
    assert views.dtype == torch.float32
    assert len({view.numpy().tobytes() for view in views}) == 32


def test_shares_of_flipped_jittered_gray(script):
    torch.manual_seed(0)
    images = torch.zeros(5000, 3, 8, 8, dtype=torch.uint8)
    images[:, 0], images[:, 1], images[:, 2] = 200, 100, 50
    views = script.augment(images)[:, :, 4, 4] * 255  # (N, 3): flat images stay flat
    gray = (views.amax(1) - views.amin(1) < 0.1).float().mean()
    same = ((views - torch.tensor([200.0, 100, 50])).abs().amax(1) < 0.1).float().mean()
    assert abs(gray - 0.2) < 0.02
    assert abs(same - 0.2 * 0.8) < 0.02  # neither jittered nor gray
    ramp = torch.arange(8, dtype=torch.uint8).mul(30).expand(2000, 3, 8, 8).contiguous()
    views = script.augment(ramp)
    flipped = (views[:, 0, 4, 0] > views[:, 0, 4, 7]).float().mean()
    assert abs(flipped - 0.5) < 0.05


def test_views_are_pictures_and_normalize_takes_imagenet_statistics(script):
    torch.manual_seed(0)
    views = script.augment(torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8))
    assert 0 <= views.min() < views.max() <= 1
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    torch.testing.assert_close(script.normalize(views), TF.normalize(views, mean, std))


def test_augment_leaves_its_input_alone(script):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before = images.clone()
    script.augment(images)
    assert torch.equal(images, before)


class Count(TorchDispatchMode):
    """Counts the operations that are not views: on a GPU each is a kernel or more."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns]
        self.total += not any(a is not None and not a.is_write for a in aliases)
        return func(*args, **(kwargs or {}))


def test_few_operations(script):
    with Count() as count:
        script.augment(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert 50 < count.total <= 150
