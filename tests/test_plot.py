"""The pictures show what they say: the right images, in the right places, under the right names."""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import torch
from PIL import Image

EMPTY = {"features": torch.empty(0, 2), "labels": torch.empty(0, dtype=torch.int64), "paths": []}
MADE_WITH = {
    "checkpoint": "x.pt",
    "prefix": "",
    "max_pool": None,
    "seed": 0,
    "size": 8,
    "resize": 8,
    "mean": 0,
    "std": 1,
}
needs_libraries = pytest.mark.skipif(
    not plot.find_spec("matplotlib") or not plot.find_spec("sklearn"),
    reason="needs: pip install matplotlib scikit-learn",
)


def color(i):
    """A color of its own for each of 500 images, none of which is white or gray."""
    return (40 + 20 * (i % 10), 30 + 4 * (i // 10), 7 * i % 30)


def images(folder, angles, names=None, labels=None):
    """Images of one color each, and the split that linear_eval.py would save: the features are at
    these angles in degrees, and of different lengths."""
    folder.mkdir(parents=True)
    paths = []
    for i, name in enumerate(names or [f"{i}.png" for i in range(len(angles))]):
        Image.new("RGB", (9, 20), color(i)).save(folder / name, format="png")
        paths.append(str(folder / name))
    radians = torch.tensor(angles, dtype=torch.float32).deg2rad()
    h = torch.stack([radians.cos(), radians.sin()], 1) * torch.arange(1, len(angles) + 1)[:, None]
    labels = torch.tensor([-1] * len(angles) if labels is None else labels)
    return {"features": h, "labels": labels, "paths": paths}


def save(file, train, test=EMPTY, classes=(), **args):
    saved = {"train": train, "test": test, "args": MADE_WITH | args, "classes": list(classes)}
    torch.save(saved, file)
    return str(file)


def rows_of(figure, tmp_path):
    """[[(color, text below), ...], ...]; colors from the file that the figure is saved as."""
    figure.savefig(tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as picture:
        page = picture.convert("RGB")
    rows = {}
    for ax in figure.axes:
        if ax.images:
            box = ax.get_position()
            x, y = (box.x0 + box.x1) / 2 * page.width, (1 - (box.y0 + box.y1) / 2) * page.height
            shown = page.getpixel((round(x), round(y)))
            rows.setdefault(ax.get_subplotspec().rowspan.start, []).append((shown, ax.get_xlabel()))
    return [rows[i] for i in sorted(rows)]


def draw(function, tmp_path, *sources, **args):
    """The figure of one of plot.py's functions."""
    from matplotlib.figure import Figure

    defaults = {"query": [], "queries": None, "above": 0.95, "groups": None, "count": 2000}
    defaults |= {"seed": 0, "level": [], "kind": "", "out": tmp_path / "x.png"}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loaded = () if function is plot.curves else plot.load_features(*sources)
    function(figure, argparse.Namespace(source=sources, **(defaults | args)), *loaded)
    return figure


def names_in(row):
    return [text.split("\n")[0] for _, text in row]


def colors(rows):
    return [[shown for shown, _ in row] for row in rows]


def expect(*rows):
    return [[color(i) for i in row] for row in rows]


# ------------------------------------------------------------------ Neighbors
@needs_libraries
def test_neighbors_are_the_nearest_by_the_cosine(tmp_path, capsys):
    train = images(tmp_path / "a", [40, 70, 110, 20], labels=[0, 1, 1, 0])
    file = save(tmp_path / "f.pt", train, classes=["cat", "dog"])
    rows = rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)
    assert colors(rows) == expect([0, 3, 1, 2], [1, 0, 2, 3], [2, 1, 0, 3], [3, 0, 1, 2])
    texts = [text.split("\n") for _, text in rows[0]]
    assert texts[:2] == [["cat"], ["cat", "cosine 0.940"]]
    assert [text[0] for text in texts] == ["cat", "cat", "dog", "dog"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [train["paths"][0], f"  0.940  {train['paths'][3]}"]


@needs_libraries
def test_neighbors_of_test_images_are_training_images(tmp_path):
    train = images(tmp_path / "a", [40, 70, 110])
    test = images(tmp_path / "b", [0, 0, 0, 92, 45, 44])
    file = save(tmp_path / "f.pt", train, test)
    rows = rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)
    assert colors(rows) == expect([0, 0, 1, 2], [1, 0, 1, 2], [2, 0, 1, 2], [3, 2, 1, 0])


@needs_libraries
def test_of_equally_near_ones_the_first_come_first(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0] * 20))
    rows = rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)
    assert colors(rows)[:2] == expect([0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7])
    assert len(rows) == 4


@needs_libraries
def test_one_image_has_no_neighbors(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0]))
    assert colors(rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)) == expect([0])


@needs_libraries
def test_queries_by_name(tmp_path):
    names = ["trip 1.png", "trip 2.png", "cat.png", "дом ü.png"]
    train = images(tmp_path / "a", [0, 10, 20, 30], names)
    file = save(tmp_path / "f.pt", train, images(tmp_path / "b", [29]))
    rows = rows_of(draw(plot.neighbors, tmp_path, file, query=["дом", "trip"]), tmp_path)
    assert colors(rows) == expect([3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 2, 3])
    assert names_in(rows[0]) == ["дом ü.png", "cat.png", "trip 2.png", "trip 1.png"]
    with pytest.raises(SystemExit, match=r"--query dog: in no path; one path is .*b.0\.png"):
        draw(plot.neighbors, tmp_path, file, query=["cat", "dog"])


@needs_libraries
def test_queries_of_another_file(tmp_path):
    bank = save(tmp_path / "f.pt", images(tmp_path / "a", [*range(0, 90, 10)]))
    other = images(tmp_path / "b", [41, 1, 2, 3, 84])
    new = save(tmp_path / "new.pt", other)
    rows = rows_of(draw(plot.neighbors, tmp_path, bank, queries=new), tmp_path)
    assert len(rows) == 5
    assert colors(rows)[0] == expect([0, 4, 5, 3, 6, 2, 7, 1])[0]
    assert colors(rows)[4] == expect([4, 8, 7, 6, 5, 4, 3, 2])[0]
    again = save(tmp_path / "again.pt", {key: part[:2] for key, part in other.items()})
    rows = rows_of(draw(plot.neighbors, tmp_path, new, queries=again), tmp_path)
    assert colors(rows) == expect([0, 0, 3, 2, 1, 4], [1, 1, 2, 3, 0, 4])  # it is there already


@needs_libraries
@pytest.mark.parametrize("name", MADE_WITH)
def test_features_of_different_networks_are_not_compared(name, tmp_path):
    bank = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10]))
    new = save(tmp_path / "new.pt", images(tmp_path / "b", [41]), **{name: "other"})
    with pytest.raises(SystemExit, match=rf"new\.pt was made with another {name} than .*f\.pt"):
        draw(plot.neighbors, tmp_path, bank, queries=new)


@needs_libraries
def test_a_page_has_a_limit(tmp_path):
    bank = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10]))
    new = save(tmp_path / "new.pt", images(tmp_path / "b", [5] * 30))
    figure = draw(plot.neighbors, tmp_path, bank, queries=new)
    assert len(rows_of(figure, tmp_path)) == 25
    assert "at most 25" in figure.get_suptitle()


# ------------------------------------------------------------------ Pairs
def groups_in(file):
    with Path(file).open(newline="", encoding="utf-8", errors="surrogateescape") as text:
        return [*csv.reader(text, delimiter="\t")]


NAMES = ["a.png", "two words.png", "фото 'ü'.png", 'with "quotes".png', "tab\tin it.png"]


@needs_libraries
def test_pairs_and_chains(tmp_path):
    """10 and 24 are together by 17 alone; 40 and 40 are closer; 70 is near to none."""
    train = images(tmp_path / "a", [10, 40, 17, 70, 24.5], NAMES)
    test = images(tmp_path / "b", [40], ["a copy of what I train with.png"])
    file = save(tmp_path / "f.pt", train, test)
    figure = draw(plot.pairs, tmp_path, file, above=np.cos(np.deg2rad(8)))
    rows = rows_of(figure, tmp_path)
    assert {*colors(rows)[0]} == {color(0), color(1)}  # the test image and train's second
    assert {*colors(rows)[1]} == {color(0), color(2), color(4)}
    assert colors(rows)[1][2] == color(4)  # least near
    texts = [text.splitlines() for row in rows for _, text in row]
    assert {tuple(text[:2]) for text in texts[:2]} == {
        ("a copy of w...n with.png", "b"),
        ("two words.png", "a"),
    }
    assert [text[2] for text in texts[:2]] == ["cosine 1.000, 1 of 2", "cosine 1.000, 2 of 2"]
    assert texts[4] == ["tab in it.png", "a", "cosine 0.991, 3 of 3"]
    assert figure.get_suptitle() == "near-copies: the closest of 2 groups"
    groups = groups_in(tmp_path / "x.txt")
    folder = f"{tmp_path}/a/"
    assert [cosine for cosine, *_ in groups] == ["1.0000", "0.9925"]
    assert {*groups[0][1:]} == {folder + NAMES[1], test["paths"][0]}
    assert {*groups[1][1:]} == {folder + NAMES[0], folder + NAMES[2], folder + NAMES[4]}
    assert groups[1][3] == folder + NAMES[4]


@needs_libraries
def test_real_copies_come_first_in_a_chain(tmp_path):
    """0 to 70 is a chain in steps of 10; 35 is there twice."""
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10, 20, 30, 35, 40, 50, 60, 70, 35]))
    [row] = rows_of(draw(plot.pairs, tmp_path, file, above=0.98), tmp_path)
    assert len(row) == 8
    assert {*colors([row])[0][:2]} == {color(4), color(9)}
    texts = [text.split("\n")[2] for _, text in row]
    assert texts[:2] == ["cosine 1.000, 1 of 10", "cosine 1.000, 2 of 10"]
    [group] = groups_in(tmp_path / "x.txt")
    assert group[0] == "1.0000"
    assert len(group) == 11


@needs_libraries
def test_of_equal_copies_the_shortest_name_comes_first(tmp_path):
    names = ["p - Copy (2).png", "p.png", "p - Copy.png"]
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [30, 30, 30], names))
    assert colors(rows_of(draw(plot.pairs, tmp_path, file), tmp_path)) == expect([1, 2, 0])
    [[_, *paths]] = groups_in(tmp_path / "x.txt")
    assert [Path(path).name for path in paths] == ["p.png", "p - Copy.png", "p - Copy (2).png"]


@needs_libraries
def test_groups_are_those_of_the_definition(tmp_path, monkeypatch):
    """Whatever is connected by cosines above the threshold, from all cosines at once."""
    torch.manual_seed(0)
    n = 250
    train = {"features": torch.rand(n, 3), "labels": torch.full((n,), -1)}
    train["paths"] = [f"{i:03}.png" for i in range(n)]
    monkeypatch.setattr(plot.Path, "exists", lambda path: path.suffix in (".png", ".pt"))
    file = save(tmp_path / "f.pt", train, EMPTY | {"features": torch.empty(0, 3)})
    draw(plot.pairs, tmp_path, file, above=0.9995)
    h = torch.nn.functional.normalize(train["features"])
    near = h @ h.T > 0.9995
    expected = set()
    for i in range(n):
        group, before = near[i], None
        while before is None or group.sum() > before.sum():
            before, group = group, near[group].any(0)
        if group.sum() > 1:
            names = [f"{j:03}.png" for j in group.nonzero().flatten().tolist()]
            largest = (h[group] @ h[group].T).fill_diagonal_(-1).max()
            expected.add((f"{largest:.4f}", *names))
    groups = groups_in(tmp_path / "x.txt")
    assert {(cosine, *sorted(paths)) for cosine, *paths in groups} == expected
    assert len(groups) == len(expected) > 20
    assert max(len(group) for group in groups) > 4
    cosines = [float(cosine) for cosine, *_ in groups]
    assert cosines == sorted(cosines, reverse=True)


@needs_libraries
def test_a_group_larger_than_a_row_is_all_in_the_list(tmp_path):
    train = images(tmp_path / "a", [*range(60)])
    file = save(tmp_path / "f.pt", train)
    [row] = rows_of(draw(plot.pairs, tmp_path, file, above=0.999), tmp_path)
    assert len(row) == 8
    [[cosine, *paths]] = groups_in(tmp_path / "x.txt")
    assert cosine == "0.9998"
    assert sorted(paths) == sorted(train["paths"])


@needs_libraries
def test_more_groups_than_a_page_holds(tmp_path, capsys):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [3 * (i // 2) for i in range(60)]))
    figure = draw(plot.pairs, tmp_path, file, above=0.9999)
    assert len(rows_of(figure, tmp_path)) == 25
    assert len(groups_in(tmp_path / "x.txt")) == 30
    assert "30 groups of near-copies, all of them in " in capsys.readouterr().out
    assert figure.get_suptitle() == "near-copies: the closest of 30 groups"


@needs_libraries
def test_no_pairs(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 30, 60]))
    with pytest.raises(
        SystemExit, match="no two pictures are above 0.95: choose a smaller --above"
    ):
        draw(plot.pairs, tmp_path, file)
    assert not (tmp_path / "x.txt").exists()


@needs_libraries
def test_exact_copies_alone(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 1, 30, 30, 60]))
    assert colors(rows_of(draw(plot.pairs, tmp_path, file, above=1), tmp_path)) == expect([2, 3])


@needs_libraries
def test_a_list_is_not_written_over(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 0]))
    (tmp_path / "x.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"x\.txt exists: choose another name"):
        plot.main(["pairs", file, str(tmp_path / "x.png")])
    assert (tmp_path / "x.txt").read_text() == "mine"


@needs_libraries
def test_too_many_pairs_for_the_memory(tmp_path):
    """As of a network that has collapsed."""
    path = images(tmp_path / "a", [0])["paths"]
    train = {"features": torch.ones(1100, 2), "labels": torch.full((1100,), -1)}
    file = save(tmp_path / "f.pt", train | {"paths": path * 1100})
    for above in (0.95, 1.0):
        with pytest.raises(SystemExit, match=f"pictures have over 1000 copies above {above}: cho"):
            draw(plot.pairs, tmp_path, file, above=above)


# ------------------------------------------------------------------ Map
def two_kinds(n, seed=0):
    """Features (2n, 16) in two clusters, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2 * n, 16, generator=generator) / 10
    h[:n, 0] += 1
    h[n:, 1] += 1
    return h


def cells_of(picture, side, legend):
    """{color in the middle of a cell: (column, row from below, color of the frame)}."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    found = {}
    for top in range(legend, len(pixels), side):
        for left in range(0, pixels.shape[1], side):
            middle = tuple(pixels[top + side // 2, left + side // 2].tolist())
            if middle != (255, 255, 255):
                assert middle not in found
                row = (len(pixels) - top) // side - 1
                frame = tuple(pixels[top + 1, left + side // 2].tolist())
                found[middle] = (left // side, row, frame)
    return found


@needs_libraries
def test_a_map_has_each_picture_once_in_the_frame_of_its_class(tmp_path):
    train = images(tmp_path / "a", [0] * 40, labels=[0] * 20 + [1] * 20)
    train["features"] = two_kinds(20)
    none = EMPTY | {"features": torch.empty(0, 16)}
    file = save(tmp_path / "f.pt", train, none, ["left", "right"])
    plot.main(["map", file, str(tmp_path / "m.png")])
    columns = int((1.5 * 1.3 * 40) ** 0.5) + 1
    cells = cells_of(tmp_path / "m.png", 1400 // columns, legend=30)
    assert set(cells) == {color(i) for i in range(40)}
    places = torch.tensor([cells[color(i)][:2] for i in range(40)]).float()
    distances = torch.cdist(places, places)
    nearest = distances.fill_diagonal_(99).argmin(1)
    assert ((nearest < 20) == (torch.arange(40) < 20)).float().mean() > 0.9
    names = plot.choose_colors(["left", "right"])
    for i in range(40):
        r, g, b = cells[color(i)][2]
        assert f"#{r:02x}{g:02x}{b:02x}" == names["left" if i < 20 else "right"]


@needs_libraries
@pytest.mark.parametrize(
    ("count", "name", "height"),
    [
        (10, "automobile", 30),
        (11, "automobile", 60),
        (100, "sweet_pepper", 390),
        (9, 40 * "e", 90),
    ],
)
def test_the_legend_of_a_map(count, name, height, tmp_path):
    """All classes by name and color, above the pictures and not beyond the page."""
    from matplotlib.colors import to_hex

    train = images(tmp_path / "a", [*range(5)], labels=[0] * 5)
    classes = [f"{name[:-2]}{i:02}" for i in range(count)]
    file = save(tmp_path / "f.pt", train, classes=classes)
    figure = draw(plot.picture_map, tmp_path, file)
    figure.savefig(tmp_path / "m.png")
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == classes
    shown = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert shown == [*plot.choose_colors(classes).values()]
    columns = int((1.5 * 1.3 * 5) ** 0.5) + 1
    rows = int(1.3 * 5 / columns) + 1
    side = 1400 // columns
    assert Image.open(tmp_path / "m.png").size == (columns * side, rows * side + height)
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= columns * side
    assert box.y0 > rows * side - 1


@needs_libraries
def test_pictures_are_near_their_places(tmp_path, monkeypatch):
    """Places on a coarse grid go to the cells there; of four at one place one stays, and the
    others are next to it."""
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0] * 9))
    _, pictures, _ = plot.load_features(file)
    u = torch.tensor([0, 0.42, 1, 0, 1, 0.5, 0.5, 0.5, 0.5])
    v = torch.tensor([0, 0.0, 0, 1, 1, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(plot, "place", lambda *_: (pictures, torch.stack([u, v], 1)))
    plot.main(["map", file, str(tmp_path / "m.png")])
    cells = cells_of(tmp_path / "m.png", 1400 // 5, legend=0)  # 5 columns, 3 rows
    assert {cells[color(i)][:2] for i in range(5)} == {(0, 0), (2, 0), (4, 0), (0, 2), (4, 2)}
    assert cells[color(0)][:2] == (0, 0)  # the lower left corner, as in the points
    assert cells[color(4)][:2] == (4, 2)
    crowd = {cells[color(i)][:2] for i in range(5, 9)}
    assert crowd == {(2, 2), (1, 2), (3, 2), (2, 1)}


@needs_libraries
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_map_of_few(n, tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [*range(0, 20 * n, 20)]))
    plot.main(["map", file, str(tmp_path / "m.png")])
    side = 1400 // (int((1.5 * 1.3 * n) ** 0.5) + 1)
    cells = cells_of(tmp_path / "m.png", side, legend=0)
    assert set(cells) == {color(i) for i in range(n)}
    assert {frame for _, _, frame in cells.values()} == {(255, 255, 255)}  # no classes


@needs_libraries
@pytest.mark.parametrize("h", [torch.ones(30, 16), torch.zeros(30, 16)], ids=["equal", "zero"])
def test_a_map_of_a_network_that_has_collapsed(h, tmp_path):
    train = images(tmp_path / "a", [0] * 30) | {"features": h}
    file = save(tmp_path / "f.pt", train, EMPTY | {"features": torch.empty(0, 16)})
    plot.main(["map", file, str(tmp_path / "m.png")])
    cells = cells_of(tmp_path / "m.png", 1400 // 8, legend=0)
    assert set(cells) == {color(i) for i in range(30)}


def place(file, **args):
    args = argparse.Namespace(**({"count": 2000, "seed": 0} | args))
    chosen, places = plot.place(args, *plot.load_features(file))
    return [picture["name"] for picture in chosen], places


@needs_libraries
def test_places_gather_what_is_similar(tmp_path, monkeypatch):
    none = {"features": two_kinds(20), "labels": torch.full((40,), -1)}
    none["paths"] = [f"{i}.png" for i in range(40)]
    monkeypatch.setattr(plot.Path, "exists", lambda path: path.suffix in (".png", ".pt"))
    file = save(tmp_path / "f.pt", none, EMPTY | {"features": torch.empty(0, 16)})
    names, places = place(file)
    assert sorted(names) == sorted(none["paths"])
    assert names != none["paths"]  # drawn at random, so that --count takes any
    torch.testing.assert_close(places.amin(0), torch.zeros(2))
    torch.testing.assert_close(places.amax(0), torch.ones(2))
    first = torch.tensor([int(name[:-4]) < 20 for name in names])
    apart = torch.cdist(places[first], places[~first]).mean()
    together = torch.cdist(places[first], places[first]).mean()
    assert apart > 2 * together
    again, places_again = place(file)
    assert again == names
    assert torch.equal(places_again, places)
    assert len(place(file, count=7)[0]) == 7
    assert set(place(file, count=7)[0]) != set(place(file, count=7, seed=1)[0])


@needs_libraries
def test_a_map_is_of_the_test_images(tmp_path):
    train, test = images(tmp_path / "a", [0, 10]), images(tmp_path / "b", [0, 20, 50])
    file = save(tmp_path / "f.pt", train, test)
    assert sorted(place(file)[0]) == test["paths"]


@needs_libraries
def test_a_map_of_points(tmp_path):
    train = images(tmp_path / "a", [0] * 40, labels=[0] * 10 + [1] * 10 + [2] * 20)
    train["features"] = two_kinds(20)
    classes = ["cat", "dog", "ship"]
    file = save(tmp_path / "f.pt", train, EMPTY | {"features": torch.empty(0, 16)}, classes)
    names, places = place(file)
    numbers = torch.tensor([train["labels"][train["paths"].index(name)] for name in names])
    [ax] = draw(plot.color_map, tmp_path, file).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == classes
    everything, *groups = ax.collections
    np.testing.assert_allclose(everything.get_offsets(), places)
    for i, group in enumerate(groups):
        np.testing.assert_allclose(group.get_offsets(), places[numbers == i])
    assert len({tuple(group.get_facecolor()[0]) for group in groups}) == 3
    assert ax.get_title() == "t-SNE of the features of 40 pictures"
    _, ax = draw(plot.color_map, tmp_path, file, groups=["animal=dog,cat", "sea=ship"]).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["animal", "sea"]
    _, animals, ships = ax.collections
    np.testing.assert_allclose(animals.get_offsets(), places[numbers < 2])
    np.testing.assert_allclose(ships.get_offsets(), places[numbers == 2])
    with pytest.raises(SystemExit, match="--groups animal=dog,cow: the classes are cat, dog, ship"):
        draw(plot.color_map, tmp_path, file, groups=["animal=dog,cow"])
    for flags in (["--color"], ["--groups", "animal=cat,dog"]):
        plot.main(["map", file, str(tmp_path / f"{len(flags)}.png"), *flags])
    assert Image.open(tmp_path / "1.png").size == (800, 600)
    assert Image.open(tmp_path / "2.png").size == (1600, 600)


@needs_libraries
def test_points_need_classes(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10]))
    with pytest.raises(SystemExit, match=r"f\.pt has no classes; without --color a map shows"):
        plot.main(["map", file, str(tmp_path / "m.png"), "--color"])


@needs_libraries
@pytest.mark.parametrize("count", [1, 2, 10, 11, 100])
def test_all_colors_differ(count):
    assert len(set(plot.choose_colors([f"{i}" for i in range(count)]).values())) == count


# ------------------------------------------------------------------ A picture
@needs_libraries
def test_pictures_are_not_upside_down(tmp_path):
    train = images(tmp_path / "a", [0, 10])
    for path in train["paths"]:
        picture = Image.new("RGB", (20, 20), "red")
        picture.paste("blue", (0, 10, 20, 20))
        picture.save(path)
    file = save(tmp_path / "f.pt", train)
    plot.main(["map", file, str(tmp_path / "m.png")])
    page = Image.open(tmp_path / "m.png").convert("RGB")
    side = page.width // 2
    corners = [(x, y) for x in range(0, page.width, side) for y in range(0, page.height, side)]
    upper = {page.getpixel((x + side // 2, y + side // 4)) for x, y in corners}
    lower = {page.getpixel((x + side // 2, y + side // 4 * 3)) for x, y in corners}
    assert upper - {(255, 255, 255)} == {(255, 0, 0)}
    assert lower - {(255, 255, 255)} == {(0, 0, 255)}
    for ax in draw(plot.neighbors, tmp_path, file).axes:
        if ax.images:
            assert ax.get_ylim()[0] > ax.get_ylim()[1]
            assert ax.images[0].origin == "upper"
            assert tuple(ax.images[0].get_array()[5, 5][:3]) == (255, 0, 0)


def test_a_picture_is_upright_and_its_middle(tmp_path):
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 50))  # after a turn by 180 degrees the lower half
    picture.paste("lime", (100, 50, 200, 100))
    turned = Image.Exif()
    turned[0x0112] = 3
    picture.save(tmp_path / "p.png", exif=turned)
    shown = plot.draw({"name": "p", "source": tmp_path / "p.png"}, 40)
    assert shown.size == (40, 40)
    assert shown.getpixel((20, 5)) == (0, 255, 0)
    assert shown.getpixel((20, 35)) == (0, 0, 255)
    assert shown.getpixel((3, 5)) == (0, 255, 0)


def test_a_picture_is_whole_along_its_shorter_side(tmp_path):
    picture = Image.new("RGB", (100, 100), "blue")
    picture.paste("red", (5, 5, 95, 95))
    picture.save(tmp_path / "p.png")
    shown = plot.draw({"name": "p", "source": tmp_path / "p.png"}, 50)
    assert shown.getpixel((0, 25)) == (0, 0, 255)
    assert shown.getpixel((49, 25))[2] > 200
    assert shown.getpixel((25, 25)) == (255, 0, 0)


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    Image.new("RGB", (1600, 1200), "red").save(tmp_path / "p.jpg")
    decoded = []
    resize = plot.linear_eval.TF.resize

    def spy(picture, size):
        decoded.append(picture.size)
        return resize(picture, size)

    monkeypatch.setattr(plot.linear_eval.TF, "resize", spy)
    plot.draw({"name": "p", "source": tmp_path / "p.jpg"}, 30)
    assert decoded == [(200, 150)]


@pytest.mark.parametrize("broken", [False, True], ids=["moved", "broken"])
@pytest.mark.parametrize("side", [3, 20, 144])
def test_what_is_gone_is_an_empty_frame_with_its_name(side, broken, tmp_path, capsys):
    gone = tmp_path / "gone in the summer.png"
    if broken:
        gone.write_text("no picture")
    shown = np.asarray(plot.draw({"name": str(gone), "source": gone}, side).convert("L"))
    assert shown.shape == (side, side)
    gray = 128
    assert (shown[0] == gray).all()
    assert (shown[-1] == gray).all()
    assert (shown[:, 0] == gray).all()
    assert (shown[:, -1] == gray).all()
    inside = shown[1:-1, 1:-1]
    if side > 3:
        assert (inside == 255).mean() > 0.5
        assert (inside < 200).any()  # the name
    assert f"not drawn: {gone}: " in capsys.readouterr().out


@needs_libraries
def test_a_missing_picture_keeps_its_place(tmp_path):
    train = images(tmp_path / "a", [0, 10, 20])
    Path(train["paths"][1]).unlink()
    file = save(tmp_path / "f.pt", train)
    rows = rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)
    assert names_in(rows[0]) == ["0.png", "1.png", "2.png"]
    assert colors(rows)[0][::2] == [color(0), color(2)]
    plot.main(["map", file, str(tmp_path / "m.png")])
    assert {color(0), color(2)} == set(cells_of(tmp_path / "m.png", 1400 // 3, legend=0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("IMG_20230175_844132.jpg", "IMG_20230175_844132.jpg"),
        ("holiday 2024 in Rome.jpg", "holiday 2024 in Rome.jpg"),
        ("holiday in Rome 00000123.jpg", "holiday in ...000123.jpg"),
        ("two\n lines\tand  blanks", "two lines and blanks"),
        ("not UTF-8: \udcff.jpg", "not UTF-8: ?.jpg"),
        ("写真 фото ü", "写真 фото ü"),
    ],
)
def test_names_are_shortened_in_the_middle(name, expected):
    assert plot.shorten(name) == expected
    assert len(expected) <= 24


@needs_libraries
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_can_be_drawn(tmp_path):
    names = ["$x_{$.png", "a\nb.png", "写真.png", "\udcff.png"]
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10, 20, 1], names))
    for kind in ("neighbors", "pairs", "map"):
        plot.main([kind, file, str(tmp_path / f"{kind}.png")])
    rows = rows_of(draw(plot.neighbors, tmp_path, file), tmp_path)
    assert names_in(rows[0]) == ["$x_{$.png", "?.png", "a b.png", "写真.png"]
    assert sorted(groups_in(tmp_path / "pairs.txt")[0][1:]) == sorted(
        str(tmp_path / "a" / name) for name in names
    )


# ------------------------------------------------------------------ Files
@needs_libraries
def test_what_is_not_said(tmp_path, monkeypatch):
    """Copies have a cosine above 0.95, and a map has at most 2,000 pictures."""
    train = images(tmp_path / "a", [0, 17, 50, 70])
    file = save(tmp_path / "f.pt", train)
    plot.main(["pairs", file, str(tmp_path / "p.png")])
    [[cosine, *paths]] = groups_in(tmp_path / "p.txt")
    assert cosine == "0.9563"
    assert sorted(paths) == train["paths"][:2]
    seen = []

    def spy(args, h, pictures, saved):
        seen.append((args.count, args.seed))
        return pictures, torch.zeros(4, 2)

    monkeypatch.setattr(plot, "place", spy)
    plot.main(["map", file, str(tmp_path / "m.png")])
    assert seen == [(2000, 0)]


@needs_libraries
def test_what_cannot_be_drawn_or_written(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10]))
    torch.save({"backbone": {}}, tmp_path / "checkpoint.pt")
    Image.new("RGB", (5, 5)).save(tmp_path / "p.png")
    out = str(tmp_path / "new folder" / "out.jpg")
    plot.main(["neighbors", file, out])
    assert Image.open(out).format == "JPEG"
    for source, target, message in (
        (file, out, r"out\.jpg exists: choose another name"),
        (file, "out", r"out: the name of a picture ends in \.png, \.jpg"),
        (file, str(tmp_path / "OUT.TXT"), r"OUT\.TXT: the name of a picture ends in"),
        (str(tmp_path / "g.pt"), "x.png", r"there is no file .*g\.pt"),
        (str(tmp_path), "x.png", "is a folder: name a file in it"),
        (str(tmp_path / "p.png"), "x.png", "nothing that torch.save wrote"),
        (str(tmp_path / "checkpoint.pt"), "x.png", r"checkpoint\.pt has no features: .*--features"),
    ):
        with pytest.raises(SystemExit, match=message):
            plot.main(["neighbors", source, target])


@needs_libraries
def test_run_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = save(tmp_path / "f.pt", images(Path("a"), [0, 10]))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(
        SystemExit, match=r"no picture of .*f\.pt is there \(a.1\.png\): run this w"
    ):
        plot.main(["map", file, "m.png"])
    assert not Path("m.png").exists()


@needs_libraries
def test_one_file_of_features_at_a_time(tmp_path):
    file = save(tmp_path / "f.pt", images(tmp_path / "a", [0, 10]))
    with pytest.raises(TypeError):
        plot.main(["map", file, file, str(tmp_path / "m.png")])


@needs_libraries
def test_heic_is_drawn(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    train = images(tmp_path / "a", [0, 10])
    train["paths"][0] = str(tmp_path / "a" / "0.heic")
    pillow_heif.from_pillow(Image.new("RGB", (90, 90), color(0))).save(train["paths"][0])
    plot.main(["map", save(tmp_path / "f.pt", train), str(tmp_path / "M.PNG")])
    shown = cells_of(tmp_path / "M.PNG", 1400 // 2, legend=0)
    assert min(sum(abs(a - b) for a, b in zip(rgb, color(0))) for rgb in shown) < 12


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_missing_packages_are_named(missing, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda name: None if name == missing else sys)
    with pytest.raises(SystemExit, match="pip install matplotlib scikit-learn"):
        plot.main(["map", "f.pt", str(tmp_path / "m.png")])


# ------------------------------------------------------------------ Runs
@pytest.fixture
def logs(tmp_path):
    for run in ("with", "without"):
        (tmp_path / run).mkdir()
        rows = ["epoch,loss,spread,kNN,lr", "1,-0.3,0.8,24.4,0.1", "2,-0.5,0.9,,0.1"]
        (tmp_path / run / "log.csv").write_text("\n".join([*rows, "3,-0.6,0.9,25,0.1"]))
    return [str(tmp_path / "with"), str(tmp_path / "without")]


def drawn(ax):
    return [[[*map(float, line.get_xdata())], [*map(float, line.get_ydata())]] for line in ax.lines]


@needs_libraries
def test_learning_shows_knn_where_it_was_measured(logs, tmp_path):
    levels = [f"{i}={i}.5" for i in range(5)]
    figure = draw(plot.curves, tmp_path, *logs, kind="learning", level=levels)
    [ax] = figure.axes
    knn = [[1, 3], [24.4, 25]]
    assert drawn(ax)[:2] == [knn, knn]
    assert [line[1] for line in drawn(ax)[2:]] == [[i + 0.5, i + 0.5] for i in range(5)]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*logs, "0", "1", "2", "3", "4"]
    styles = [line.get_linestyle() for line in ax.lines]
    assert styles == ["-", "-", "--", ":", "-.", "--", ":"]
    assert (ax.get_title(), ax.get_xlabel()) == ("kNN accuracy, percent", "epoch")
    plot.main(["learning", *logs, str(tmp_path / "x.png"), "--level", "pixels=41.1"])
    assert Image.open(tmp_path / "x.png").size == (900, 340)


@needs_libraries
def test_collapse_shows_three_columns(logs, tmp_path):
    figure = draw(plot.curves, tmp_path, *logs, kind="collapse", level=["pixels=41"])
    loss, spread = [[1, 2, 3], [-0.3, -0.5, -0.6]], [[1, 2, 3], [0.8, 0.9, 0.9]]
    assert [drawn(ax)[0] for ax in figure.axes] == [loss, spread, [[1, 3], [24.4, 25]]]
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 3]  # the level is one of kNN
    assert figure.axes[2].get_ylim()[0] == 0
    assert figure.axes[2].get_ylim()[1] > 41
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*logs, "pixels"]
    plot.main(["collapse", *logs, str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()
