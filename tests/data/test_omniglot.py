"""Omniglot from made-up zips, its splits, and the tasks drawn from it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from jiio.data.episodes import Episodes
from jiio.data.omniglot import omniglot, read_characters


def drawing(number: int) -> bytes:
    picture = Image.new("1", (105, 105), 1)
    for k in range(20):
        picture.putpixel(((7 * number + k) % 105, (11 * number) % 105), 0)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def write_zip(path: Path, part: str, characters: int, *, drawers: int = 20, first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for c in range(first, first + characters):
            for d in range(1, drawers + 1):
                name = f"images_{part}/Alphabet_{c // 10}/character{c % 10 + 1:02d}/{c:04d}_{d:02d}.png"
                archive.writestr(name, drawing(100 * c + d))
        archive.writestr(f"images_{part}/readme.txt", "not a drawing")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_zip(tmp_path / "omniglot-py" / "images_background.zip", "background", 12)
    write_zip(tmp_path / "omniglot-py" / "images_evaluation.zip", "evaluation", 5, first=12)
    return tmp_path


def test_characters_are_read_with_ink_1(root: Path) -> None:
    train, test = (omniglot(split, root, division="original") for split in ("train", "test"))
    assert train.shape == (12, 20, 1, 28, 28)
    assert test.shape == (5, 20, 1, 28, 28)
    assert float(train.min()) >= 0
    assert 0 < float(train.max()) <= 1
    assert float(train.mean()) < 0.1


def test_the_random_division_is_disjoint_and_set_by_its_seed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jiio.data.omniglot.TRAIN_CHARACTERS", 11)
    train, test = (omniglot(split, root) for split in ("train", "test"))
    assert len(train) == 11
    assert len(test) == 6
    rows = torch.cat((train, test)).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 17
    assert torch.equal(train, omniglot("train", root))
    assert not torch.equal(train, omniglot("train", root, seed=1))


def test_damaged_and_missing_zips_say_so(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images_background\.zip"):
        omniglot("train", tmp_path / "nowhere")
    file = root / "omniglot-py" / "images_evaluation.zip"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a whole zip"):
        omniglot("test", root, division="original")
    write_zip(file, "evaluation", 3, drawers=19)
    with pytest.raises(ValueError, match="have not 20 drawings"):
        read_characters(file)
    with pytest.raises(ValueError, match="division"):
        omniglot("test", root, division="other")  # pyright: ignore[reportArgumentType]


def test_tasks_are_reproducible_and_support_and_query_differ() -> None:
    images = torch.rand(9, 8, 1, 4, 4)
    episodes = Episodes(images, ways=4, shots=2, queries=3, turned=True, seed=5)
    support, labels, query, answers = episodes.draw(3, 6)
    assert support.shape == (6, 8, 1, 4, 4)
    assert query.shape == (6, 12, 1, 4, 4)
    assert labels[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert answers[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    again = Episodes(images, ways=4, shots=2, queries=3, turned=True, seed=5).draw(3, 6)
    assert torch.equal(support, again[0])
    assert not torch.equal(support, episodes.draw(4, 6)[0])
    for task in range(6):
        every = torch.cat((support[task], query[task])).flatten(1)
        assert len(torch.unique(every, dim=0)) == len(every)


def test_rotations_are_further_classes() -> None:
    images = torch.rand(2, 3, 1, 4, 4)
    support, _, _, _ = Episodes(images, ways=8, shots=1, queries=1, turned=True).draw(0, 1)
    assert support.shape[1] == 8


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ways": 10}, "more than the 9 classes"),
        ({"shots": 5, "queries": 5}, "more than the 8 examples"),
        ({"ways": 1}, "at least 2 ways"),
        ({"queries": 0}, "at least 2 ways, 1 shot and 1 query"),
    ],
)
def test_impossible_tasks_are_refused(options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Episodes(torch.rand(9, 8, 1, 4, 4), **options)
