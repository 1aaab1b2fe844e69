"""What linear_eval draws: the map against PCA, the frames, and that every file is there."""

import pytest
import torch
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


def test_neighbors_are_the_nearest_and_framed_by_their_class(tmp_path):
    torch.manual_seed(0)
    train_h = torch.eye(12).repeat(1, 1)
    train_y = torch.arange(12) % 2
    images = torch.full((12, 3, 8, 8), 128, dtype=torch.uint8)
    test_h = train_h[:2] + 0.5 * train_h[2:4] + 0.25 * train_h[5:7]  # of classes 0 and 1
    share = linear_eval.draw_neighbors(
        tmp_path, (images, train_y, train_h), (images[:2], torch.tensor([0, 1]), test_h), guesses=3
    )
    assert share == pytest.approx(100 * 2 / 3)  # two of the right class, then one of the other
    with Image.open(tmp_path / "neighbors.png") as picture:
        frames = [picture.getpixel((4 + 108 * column + 1, 5)) for column in range(4)]
    green, red, white = (40, 180, 60), (220, 40, 40), (255, 255, 255)
    assert frames == [white, green, green, red]


def test_every_picture_is_drawn(folder, tmp_path, capsys):
    out = tmp_path / "pictures"
    flags = ["--data", str(folder), "--size", "8", "--device", "cpu", "--pictures", str(out)]
    linear_eval.main(flags)
    printed = capsys.readouterr().out.splitlines()
    sizes = {}
    for path in out.iterdir():
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    assert sizes == {
        "neighbors.png": (10 * 108 + 4, 3 * 108 + 4),
        "map.png": (1600, 1600),
        "map_classes.png": (1840, 1600),
    }
    assert [line.split(":")[0].strip() for line in printed[4:7]] == ["blue", "green", "red"]
    assert printed[-1].startswith("linear top-1: ")
    with pytest.raises(FileExistsError, match="--pictures .* exists"):
        linear_eval.main(flags)


def test_classes_are_printed_with_what_they_are_taken_for(capsys):
    labels, guesses = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    linear_eval.print_classes(["cat", "dog"], guesses, labels)
    assert capsys.readouterr().out == "    cat: 75.0%, taken for dog 25.0%\n    dog: 100.0%\n"


def test_colors_can_be_told_apart():
    colors = linear_eval.palette(10).float()
    distances = torch.cdist(colors, colors).fill_diagonal_(torch.inf)
    assert distances.min() > 80
