"""The pictures show what they say."""

import numpy as np
import plot
import pytest
import torch
from PIL import Image


def grays(folder, *levels):
    """Pictures of one gray each, and the split that linear_eval.py would save: the feature of an
    image is an angle that grows with its gray."""
    folder.mkdir(parents=True)
    paths = []
    for level in levels:
        Image.new("L", (9, 20), level).save(folder / f"{level}.png")
        paths.append(str(folder / f"{level}.png"))
    angle = torch.tensor(levels) / 100
    h = torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None]
    return {"features": h, "labels": torch.zeros(len(levels), dtype=torch.int64), "paths": paths}


def shown(picture):
    """The grays in the middle of the images of a picture, row by row."""
    pixels = np.asarray(Image.open(picture).convert("L"))
    rows = []
    for top in range(plot.GAP, len(pixels) - plot.SIDE, plot.SIDE + 3 * plot.GAP):
        line = pixels[top + plot.SIDE // 2 + 2 * plot.GAP]
        left = [plot.GAP, *range(3 * plot.GAP + plot.SIDE + plot.GAP, len(line), 120)]
        rows.append([int(line[x + plot.SIDE // 2]) for x in left])
    return rows


@pytest.mark.parametrize("tested", [True, False])
def test_neighbors_are_the_nearest(tested, tmp_path):
    saved = {"train": grays(tmp_path / "a", 40, 70, 110), "test": grays(tmp_path / "b")}
    expected = [[40, 70, 110], [70, 40, 110], [110, 70, 40]]
    if tested:
        saved["test"] = grays(tmp_path / "c", 92, 45)
        expected = [[92, 110, 70], [45, 40, 70]]
    torch.save(saved, tmp_path / "f.pt")
    plot.main(["neighbors", str(tmp_path / "f.pt"), str(tmp_path / "n.png")])
    assert shown(tmp_path / "n.png") == expected
    with pytest.raises(SystemExit, match=r"n\.png exists: choose another name"):
        plot.main(["neighbors", str(tmp_path / "f.pt"), str(tmp_path / "n.png")])


def test_a_class_has_its_name_above(tmp_path):
    saved = {"train": grays(tmp_path / "a", 0, 0), "test": grays(tmp_path / "b")}
    inks = []
    for label in (0, -1):
        saved["train"]["labels"][:] = label
        torch.save(saved, tmp_path / "f.pt")
        plot.neighbors(tmp_path / "f.pt", tmp_path / f"{label}.png")
        heads = np.asarray(Image.open(tmp_path / f"{label}.png"))[plot.GAP : 3 * plot.GAP]
        inks.append((heads < 128).sum())
    assert inks[0] > 0
    assert inks[1] == 0


def test_places_in_a_data_set_are_no_paths(tmp_path):
    split = grays(tmp_path / "a", 40, 70) | {"paths": [0, 1]}
    torch.save({"train": split, "test": split}, tmp_path / "f.pt")
    with pytest.raises(SystemExit, match="make it with --data FOLDER"):
        plot.neighbors(tmp_path / "f.pt", tmp_path / "n.png")


@pytest.fixture
def logs(tmp_path):
    pytest.importorskip("matplotlib")
    for run in ("with", "without"):
        (tmp_path / run).mkdir()
        rows = ["epoch,loss,spread,kNN,lr", "1,-0.3,0.8,24.4,0.1", "2,-0.5,0.9,,0.1"]
        (tmp_path / run / "log.csv").write_text("\n".join([*rows, "3,-0.6,0.9,25,0.1"]))
    return [str(tmp_path / "with"), str(tmp_path / "without")]


def drawn(ax):
    return [[[*map(float, line.get_xdata())], [*map(float, line.get_ydata())]] for line in ax.lines]


def test_learning_shows_knn_where_it_was_measured(logs, tmp_path):
    ax = plot.learning(logs, tmp_path / "x.png", {"pixels": 41.1})
    knn = [[1, 3], [24.4, 25]]
    assert drawn(ax)[:2] == [knn, knn]
    assert drawn(ax)[2][1] == [41.1, 41.1]
    assert Image.open(tmp_path / "x.png").size == (900, 360)


def test_collapse_shows_three_columns(logs, tmp_path):
    plot.main(["collapse", *logs, str(tmp_path / "x.png")])
    axes = plot.collapse(logs, tmp_path / "y.png")
    loss, spread = [[1, 2, 3], [-0.3, -0.5, -0.6]], [[1, 2, 3], [0.8, 0.9, 0.9]]
    assert [drawn(ax)[0] for ax in axes] == [loss, spread, [[1, 3], [24.4, 25]]]
    assert axes[2].get_ylim()[0] == 0
    assert (tmp_path / "x.png").exists()
