"""The batched augmentation against torchvision's, image by image, for the same parameters."""

import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import v2

EXACT = 1e-5  # of 1, the rounding of float32


def crop_with_boxes(script, x, monkeypatch):
    """random_resized_crop(x), and what it drew: left, top, width, height, flipped, (N,) each."""
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
    left, top = u.mean(1) - width.abs() / 2, v.mean(1) - height / 2
    boxes = [t.round().int().tolist() for t in (left, top, width.abs(), height)]
    return views, *boxes, (width < 0).tolist()


def test_crop_equals_torchvision(script, monkeypatch):
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32)
    views, left, top, width, height, flipped = crop_with_boxes(script, x, monkeypatch)
    for i in range(64):
        expected = TF.resized_crop(x[i], top[i], left[i], height[i], width[i], [32, 32])
        expected = TF.horizontal_flip(expected) if flipped[i] else expected
        torch.testing.assert_close(views[i], expected, atol=EXACT, rtol=0)
    assert 16 < sum(flipped) < 48
    assert len(set(zip(left, top, width, height))) > 50


def test_boxes_are_drawn_as_torchvision_draws_them(script, monkeypatch):
    torch.manual_seed(0)
    n, size = 4000, 32
    x = torch.zeros(n, 3, size, size)
    _, left, top, width, height, _ = crop_with_boxes(script, x, monkeypatch)
    reference = v2.RandomResizedCrop(size, scale=(0.2, 1))
    drawn = [reference.make_params([x[0]]) for _ in range(n)]
    for ours, name in ((left, "left"), (top, "top"), (width, "width"), (height, "height")):
        ours = torch.tensor(ours).bincount(minlength=size + 1).cumsum(0) / n
        theirs = torch.tensor([p[name] for p in drawn]).bincount(minlength=size + 1).cumsum(0) / n
        # Kolmogorov-Smirnov: below 0.0436 in 99.9 % of the draws from one distribution
        assert (ours - theirs).abs().max() < 0.0436, name


def reference_view(x, draws, order, sigma, blur):
    """augment after its crop and before its normalization, for one image x (3, S, S)."""
    jitter, gray, blurred, *solar, brightness, contrast, saturation, turns = draws
    if jitter < 0.8:
        steps = [
            lambda x: TF.adjust_brightness(x, 0.6 + 0.8 * brightness),
            lambda x: TF.adjust_contrast(x, 0.6 + 0.8 * contrast),
            lambda x: TF.adjust_saturation(x, 0.6 + 0.8 * saturation),
            lambda x: TF.adjust_hue(x, -0.1 + 0.2 * turns),
        ]
        for i in order:
            x = steps[i](x)
    if gray < 0.2:
        x = TF.rgb_to_grayscale(x, num_output_channels=3)
    if blur and blurred < 0.5:
        x = TF.gaussian_blur(x, blur, sigma)
    if solar and solar[0] < 0.5:
        x = TF.solarize(x, 0.5)
    return x


def compare_with_reference(script, monkeypatch, size, blur):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8)
    images[0], images[1], images[2] = 0, 255, 90  # black, white, gray: no hue, no saturation
    monkeypatch.setattr(script, "random_resized_crop", lambda x: x)
    monkeypatch.setattr(script, "MEAN", (0, 0, 0))
    monkeypatch.setattr(script, "STD", (1, 1, 1))
    byol = script.__name__ == "byol"
    orders = set()
    for seed in range(6):
        torch.manual_seed(seed)
        views = script.augment(images, solarize=0.5) if byol else script.augment(images)
        torch.manual_seed(seed)
        draws = torch.rand(8 if byol else 7, 40, 1, 1, 1).flatten(1).T.tolist()
        order = torch.randperm(4).tolist()
        sigma = 0.1 + 1.9 * torch.rand(()).item()
        orders.add(tuple(order))
        for image, draw, view in zip(images, draws, views):
            expected = reference_view(image / 255, draw, order, sigma, blur)
            off = (view - expected).abs()
            if byol:  # rounding may put a value on the other side of the threshold
                off = off[(expected - 0.5).abs() > EXACT]
            assert off.max() < EXACT
    assert len(orders) > 3


def test_colors_equal_torchvision(script, monkeypatch):
    compare_with_reference(script, monkeypatch, size=16, blur=None)


def test_blur_above_64_pixels_equals_torchvision(script, monkeypatch):
    compare_with_reference(script, monkeypatch, size=80, blur=9)


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
    views = script.augment(images)
    std, mean = torch.tensor(script.STD).view(3, 1, 1), torch.tensor(script.MEAN).view(3, 1, 1)
    views = (views * std + mean)[:, :, 4, 4] * 255  # (N, 3): flat images stay flat
    gray = (views.amax(1) - views.amin(1) < 0.1).float().mean()
    same = ((views - torch.tensor([200.0, 100, 50])).abs().amax(1) < 0.1).float().mean()
    assert abs(gray - 0.2) < 0.02
    assert abs(same - 0.2 * 0.8) < 0.02  # neither jittered nor gray


def test_views_are_normalized_by_imagenet_statistics(script):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    black = script.augment(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))  # which no jitter changes
    torch.testing.assert_close(black.mean((0, 2, 3)), -mean / std)
    assert torch.equal(torch.tensor([script.MEAN, script.STD]), torch.stack([mean, std]))


def test_augment_leaves_its_input_alone(script):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    before = images.clone()
    script.augment(images)
    assert torch.equal(images, before)
