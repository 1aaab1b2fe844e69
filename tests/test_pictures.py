"""What linear_eval draws: the map against PCA and against autograd, the frames, the colors."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import linear_eval


def trustworthiness(h, y, k=10):
    """From the definition (Venna & Kaski 2001): 1 minus a penalty for each of the k neighbors on
    the map y (N, 2) that is none in h (N, D), by how far down the list of h it stands."""
    n = len(h)
    ranks = torch.cdist(h, h).fill_diagonal_(-1).argsort(1).argsort(1)  # 0: the point itself
    neighbors = torch.cdist(y, y).fill_diagonal_(torch.inf).topk(k, largest=False).indices
    penalty = (ranks.gather(1, neighbors) - k).clamp(min=0).sum().item()
    return 1 - 2 * penalty / (n * k * (2 * n - 3 * k - 1))


def clusters(n=300, dim=20, count=6):
    torch.manual_seed(0)
    labels = torch.arange(n) % count
    return 4 * torch.randn(count, dim)[labels] + torch.randn(n, dim), labels


def test_trustworthiness_of_a_perfect_and_of_a_random_map():
    h = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    assert trustworthiness(h, h) == 1
    assert trustworthiness(h, h.roll(77, 0)) < 0.7


def test_tsne_keeps_neighbors_better_than_pca():
    h, labels = clusters()
    y = linear_eval.tsne(h)
    pca = h - h.mean(0)
    pca = pca @ torch.linalg.svd(pca, full_matrices=False)[2][:2].T
    assert trustworthiness(h, y) > trustworthiness(h, pca) + 0.02
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert (labels[nearest] == labels).float().mean() > 0.97


def test_tsne_finds_the_perplexity(monkeypatch):
    """Read off the affinities: before symmetry, each row has the entropy log(perplexity)."""
    rows = []
    entr = torch.special.entr
    monkeypatch.setattr(torch.special, "entr", lambda p: rows.append(p) or entr(p))
    linear_eval.tsne(clusters()[0], perplexity=17, steps=1)
    entropy = entr(rows[-1]).sum(1).exp()
    torch.testing.assert_close(entropy, torch.full_like(entropy, 17), atol=0.01, rtol=0)


def affinities(h, monkeypatch):
    """The p_ij of the paper: the rows that tsne finds, made symmetric."""
    rows = []
    entr = torch.special.entr
    monkeypatch.setattr(torch.special, "entr", lambda p: rows.append(p) or entr(p))
    linear_eval.tsne(h, steps=0)
    monkeypatch.undo()
    return (rows[-1] + rows[-1].T) / (2 * len(h))


def divergence(p, y):
    """The paper's cost, Eq. (2) with Eq. (4), as far as y changes it; P may be exaggerated:
    sum p_ij log(1 + |y_i - y_j|^2) + log sum (1 + |y_k - y_l|^2)^-1."""
    others = ~torch.eye(len(y), dtype=torch.bool)
    apart = 1 + (y[:, None] - y[None]).square().sum(2)[others]
    return (p[others] * apart.log()).sum() + (1 / apart).sum().log()


def test_tsne_goes_down_the_gradient(monkeypatch):
    """Three steps, the first with exaggeration and less momentum, by autograd."""
    h, _ = clusters(n=60)
    p = affinities(h, monkeypatch)
    y, velocity = linear_eval.tsne(h, steps=0), 0
    for exaggeration, momentum in ((12, 0.5), (1, 0.8), (1, 0.8)):
        y = y.requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(exaggeration * p, y), y)
        velocity = momentum * velocity - len(h) / (4 * exaggeration) * gradient
        y = (y + velocity).detach()
    torch.testing.assert_close(linear_eval.tsne(h, steps=3), y, rtol=1e-3, atol=1e-6)


def test_tsne_starts_from_the_principal_components():
    h, _ = clusters(n=60)
    start = linear_eval.tsne(h, steps=0)
    axes = torch.linalg.eigh(h.T.cov())[1].flip(1)[:, :2]
    cosine = F.cosine_similarity((h - h.mean(0)) @ axes, start, dim=0).abs()
    torch.testing.assert_close(cosine, torch.ones(2))
    torch.testing.assert_close(start.std(0), torch.full((2,), 1e-4), rtol=0.02, atol=0)


@pytest.mark.parametrize("h", [torch.ones(5, 8), torch.eye(8)[:2], 1e-6 * torch.eye(8)])
def test_tsne_of_degenerate_features_is_finite(h):
    assert linear_eval.tsne(h).isfinite().all()


def grays(count):
    """Images that can be told apart by their gray: 20, 30, 40, ..."""
    return (20 + 10 * torch.arange(count)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)


def test_neighbors_are_the_nearest_and_framed_by_their_class(tmp_path):
    h, y = torch.eye(12), torch.arange(12) % 2
    classes = torch.tensor([1, 0, 1])
    first = torch.tensor([[3, 5, 6], [2, 4, 7], [1, 9, 0]])  # of each test image the three nearest
    near = 0.1 * torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    near.scatter_(1, first, torch.tensor([[1.0, 0.5, 0.25]]).repeat(3, 1))
    nearest = near.argsort(1, descending=True)[:, :9]
    share = linear_eval.draw_neighbors(tmp_path, grays(12), y, h, 100 + grays(3), classes, near)
    assert share == pytest.approx(100 * (y[nearest] == classes[:, None]).float().mean().item())
    white, green, red = (255,) * 3, (0, 200, 0), (200, 0, 0)
    with Image.open(tmp_path / "neighbors.png") as picture:
        assert picture.size == (10 * 106 + 2, 2 * 106 + 2)  # a row for each of two classes
        for row, test in enumerate((1, 0)):  # class 0 first
            for column in range(10):
                x, top = 2 + 106 * column, 2 + 106 * row
                i = nearest[test, column - 1].item() if column else None
                gray = 20 + 10 * i if column else 120 + 10 * test
                right = column and y[i] == classes[test]
                frame = white if not column else green if right else red
                inner = [picture.getpixel((x + d, top + d)) for d in (4, 52, 99)]
                assert inner == [(gray,) * 3] * 3
                outer = [picture.getpixel((x + d, top + 50)) for d in (0, 3, 100, 103)]
                assert outer == [frame] * 4


def test_the_map_shows_each_image_at_its_place(tmp_path, monkeypatch):
    places = torch.tensor([[0.0, 0], [10, 0], [0, 4], [10, 4], [5, 2], [5, 2]])
    monkeypatch.setattr(linear_eval, "tsne", lambda h: places)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    linear_eval.draw_map(tmp_path, grays(6), labels, torch.rand(6, 4), ["cat", "dog", "emu"])
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (1620, 1620)
        shown = [(0, 0), (1584, 0), (0, 1584), (1584, 1584), (792, 792)]
        for i, (x, y) in enumerate(shown):
            frame = {picture.getpixel((x + d, y + 18)) for d in (0, 2, 33, 35)}
            inner = {picture.getpixel((x + d, y + 18)) for d in (3, 18, 32)}
            assert frame == {colors[labels[i]]}
            assert len(inner) == 1
            assert inner <= {(20 + 10 * j,) * 3 for j in ((4, 5) if i == 4 else (i,))}
        assert picture.getpixel((300, 300)) == (255, 255, 255)
    with Image.open(tmp_path / "map_classes.png") as picture:
        assert picture.size == (2 * (810 + 120), 1620)
        for i, (x, y) in enumerate([(9, 9), (1609, 9), (9, 1609), (1609, 1609), (809, 809)]):
            assert picture.getpixel((x, y)) == colors[labels[i]]
        for c, color in enumerate(colors):
            y = 2 * (14 * c + 8) + 9
            assert picture.getpixel((1629, y)) == color
            words = picture.crop((1640, y - 7, 1860, y + 13)).convert("L")
            assert words.getextrema()[0] < 60  # black letters beside it


def test_a_hundred_classes_have_a_legend(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_eval, "tsne", lambda h: h[:, :2])
    names = [f"class {c}" for c in range(100)]
    linear_eval.draw_map(tmp_path, grays(2), torch.tensor([0, 99]), torch.eye(2), names)
    with Image.open(tmp_path / "map_classes.png") as picture:
        last = picture.crop((picture.height, picture.height - 40, picture.width, picture.height))
        assert last.convert("L").getextrema()[0] < 60


def test_every_picture_is_drawn(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "pictures"
    flags = ["--data", str(folder), "--size", "8", "--device", "cpu", "--pictures", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(linear_eval, "linear_probe", None)  # a run that fails
        with pytest.raises(TypeError):
            linear_eval.main(flags)
    always_blue = torch.nn.Linear(512, 3)
    always_blue.load_state_dict({"weight": torch.zeros(3, 512), "bias": torch.eye(3)[0]})
    monkeypatch.setattr(linear_eval, "linear_probe", lambda h, y: (always_blue, 0.1))
    linear_eval.main(flags)  # the failed one does not stand in the way
    printed = capsys.readouterr().out.splitlines()
    sizes = {}
    for path in out.iterdir():
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    assert sizes == {
        "neighbors.png": (10 * 106 + 2, 3 * 106 + 2),
        "map.png": (1620, 1620),
        "map_classes.png": (1860, 1620),
    }
    assert printed[-5:-2] == ["    blue: 100.0%", "    green: 0.0%", "    red: 0.0%"]
    assert printed[-1] == "linear top-1: 33.33%"
    assert printed[-2].endswith("% of the neighbors of 24 test images are of their class")
    (out / "neighbors.png").unlink()
    before = (out / "map.png").read_bytes()
    with pytest.raises(FileExistsError, match="map.png exists: choose another name"):
        linear_eval.main([*flags, "--seed", "1"])
    assert (out / "map.png").read_bytes() == before


def test_tsne_of_few_images_still_looks_at_their_features():
    """With fewer images than neighbors asked for, all others would be equally near."""
    h, labels = clusters(n=24, count=3)
    y = linear_eval.tsne(h)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert (labels[nearest] == labels).all()
    pca = h - h.mean(0)
    pca = pca @ torch.linalg.svd(pca, full_matrices=False)[2][:2].T
    assert trustworthiness(h, y, k=5) > trustworthiness(h, pca, k=5)
