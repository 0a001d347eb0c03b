"""Evaluation data: every form gives the same images, and whatever is wrong with them is named."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsq_deploy.errors import DataError
from zsq_deploy.evaldata import EvalData, load_eval_data, load_images
from zsq_deploy.model.graph import TensorSpec

F32 = np.dtype(np.float32)
COLOUR = TensorSpec("x", (None, 3, 6, 8), F32)
GRAY = TensorSpec("x", (None, 1, 6, 8), F32)


def pixels(count: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, channels), dtype=np.uint8)


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def write_csv_folder(folder: Path, x: np.ndarray, y: list[object], *, sub: str = "images") -> Path:
    (folder / sub).mkdir(parents=True)
    rows = [["File ", "label", "licence"]]
    for index, (image, label) in enumerate(zip(x, y, strict=True)):
        Image.fromarray(image).save(folder / sub / f"{index}.png")
        rows.append([f"{index}.png", str(label), "CC0, by somebody"])
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    return folder


def write_class_folders(folder: Path, x: np.ndarray, names: list[str]) -> Path:
    for index, (image, name) in enumerate(zip(x, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{index}.png")
    return folder


def collected(data: EvalData, batch: int = 3) -> tuple[np.ndarray, np.ndarray]:
    pieces = list(data.batches(batch))
    for images, labels in pieces:
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert len(images) == len(labels)
    return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])


def test_npz(tmp_path):
    x, y = pixels(), np.array([0, 1, 2, 0, 1, 2, 9], np.uint8)
    data = load_eval_data(write_npz(tmp_path / "d.npz", x=x, y=y, name=np.array(["a"])), COLOUR, classes=10)
    got, labels = collected(data)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(labels, y)
    assert len(data) == 7
    assert data.source.endswith("d.npz")


@pytest.mark.parametrize("shape", [(7, 6, 8), (7, 6, 8, 1)])
def test_gray_npz_and_a_column_of_labels(tmp_path, shape):
    x = pixels(channels=1)
    data = load_eval_data(write_npz(tmp_path / "d.npz", x=x.reshape(shape), y=np.arange(7)[:, None]), GRAY)
    got, labels = collected(data)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(labels, np.arange(7))


@pytest.mark.parametrize("sub", ["images", ".", "other"])
def test_folder_with_a_table(tmp_path, sub):
    x = pixels()
    folder = write_csv_folder(tmp_path / "d", x, [3, 1, 4, 1, 5, 9, 2], sub=sub)
    if sub == "other":
        text = (folder / "labels.csv").read_text()
        (folder / "labels.csv").write_text(
            "\n".join(f"other/{line}" if line[0].isdigit() else line for line in text.splitlines())
        )
    got, labels = collected(load_eval_data(folder, COLOUR, classes=10))
    np.testing.assert_array_equal(got, x)
    assert labels.tolist() == [3, 1, 4, 1, 5, 9, 2]


def test_class_folders_by_name(tmp_path):
    x = pixels()
    names = ["dog", "cat", "dog", "ant", "cat", "dog", "ant"]
    data = load_eval_data(write_class_folders(tmp_path / "d", x, names), COLOUR, classes=3)
    got, labels = collected(data)
    assert data.class_names == ("ant", "cat", "dog")
    order = [3, 6, 1, 4, 0, 2, 5]
    np.testing.assert_array_equal(got, x[order])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_class_folders_by_number(tmp_path):
    data = load_eval_data(write_class_folders(tmp_path / "d", pixels(4), ["10", "2", "007", "2"]), COLOUR, classes=1000)
    assert sorted(data.labels.tolist()) == [2, 2, 7, 10]
    assert data.class_names == ()


def test_some_class_names_for_a_network_with_more_classes_are_refused(tmp_path):
    folder = write_class_folders(tmp_path / "d", pixels(2), ["n01440764", "n01443537"])
    with pytest.raises(DataError, match=r"2 class folders, the network 1000"):
        load_eval_data(folder, COLOUR, classes=1000)


def test_files_are_converted_to_what_the_network_takes(tmp_path):
    x = pixels(2)
    folder = write_csv_folder(tmp_path / "d", x, [0, 1])
    gray, _ = collected(load_eval_data(folder, GRAY))
    expected = np.rint(x @ np.array([0.299, 0.587, 0.114]))[..., None]
    assert gray.shape == (2, 6, 8, 1)
    assert np.abs(gray.astype(float) - expected).max() <= 1
    Image.fromarray(x[0]).convert("P").save(folder / "images" / "0.png")
    Image.fromarray(x[1]).convert("RGBA").save(folder / "images" / "1.png")
    colour, _ = collected(load_eval_data(folder, COLOUR))
    assert colour.shape == (2, 6, 8, 3)
    np.testing.assert_array_equal(colour[1], x[1])


def test_resizing_is_done_only_when_asked_for(tmp_path):
    wide = TensorSpec("x", (None, 3, 3, 4), F32)
    x = pixels(2)
    npz = write_npz(tmp_path / "d.npz", x=x, y=np.arange(2))
    folder = write_csv_folder(tmp_path / "d", x, [0, 1])
    for path in (npz, folder):
        with pytest.raises(DataError, match=r"8x6.*takes 4x3") as caught:
            load_eval_data(path, wide)
        assert "--resize" in str(caught.value)
        got, _ = collected(load_eval_data(path, wide, resize=True))
        assert got.shape == (2, 3, 4, 3)
        # a constant stays what it is, and means hardly change
        np.testing.assert_allclose(got.mean((1, 2)), x.mean((1, 2)), atol=12)
    np.testing.assert_array_equal(
        collected(load_eval_data(npz, wide, resize=True))[0], collected(load_eval_data(folder, wide, resize=True))[0]
    )


def test_any_size_goes_when_the_network_takes_any(tmp_path):
    free = TensorSpec("x", (None, 3, None, None), F32)
    folder = write_csv_folder(tmp_path / "d", pixels(2), [0, 1])
    assert collected(load_eval_data(folder, free))[0].shape == (2, 6, 8, 3)
    Image.new("RGB", (5, 5)).save(folder / "images" / "1.png")
    with pytest.raises(DataError, match=r"different sizes.*5x5"):
        load_eval_data(folder, free)


def test_limit_is_spread_evenly_and_take_chooses(tmp_path):
    x, y = pixels(100), np.repeat(np.arange(10), 10)
    path = write_npz(tmp_path / "d.npz", x=x, y=y)
    data = load_eval_data(path, COLOUR, limit=10)
    assert data.labels.tolist() == list(range(10))
    np.testing.assert_array_equal(data.images(0, 10), x[::10])
    assert len(load_eval_data(path, limit=1000)) == 100
    assert len(load_eval_data(path).limit(None)) == 100
    np.testing.assert_array_equal(data.take([1, 0]).images(0, 2), x[[10, 0]])
    with pytest.raises(DataError, match="leaves none"):
        data.limit(0)
    with pytest.raises(DataError, match="no image"):
        data.take([])


def test_digest_follows_the_content(tmp_path):
    x, y = pixels(), np.arange(7)
    base = load_eval_data(write_npz(tmp_path / "a.npz", x=x, y=y))
    same = load_eval_data(write_npz(tmp_path / "b.npz", y=y.astype(np.int8), x=x))
    labels = load_eval_data(write_npz(tmp_path / "c.npz", x=x, y=y[::-1]))
    changed = x.copy()
    changed[6, 5, 7, 2] ^= 1
    image = load_eval_data(write_npz(tmp_path / "d.npz", x=changed, y=y))
    assert base.digest == same.digest
    assert len({base.digest, labels.digest, image.digest, base.limit(3).digest}) == 4
    folder = write_csv_folder(tmp_path / "f", x, list(y))
    before = load_eval_data(folder).digest
    assert before == load_eval_data(folder).digest
    Image.fromarray(changed[6]).save(folder / "images" / "6.png")
    assert load_eval_data(folder).digest != before


def test_folders_are_read_lazily(tmp_path, monkeypatch):
    folder = write_csv_folder(tmp_path / "d", pixels(), list(range(7)))
    data = load_eval_data(folder, COLOUR)
    decoded: list[str] = []
    convert = Image.Image.convert

    def counted(self, *args, **kwargs):
        decoded.append(self.filename)
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "convert", counted)
    next(data.batches(2))
    assert len(decoded) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.arange(2)}, "x is missing"),
        ({"x": pixels(2)}, "no labels: y is missing"),
        ({"x": pixels(0), "y": np.arange(0)}, "no images"),
        ({"x": pixels(2), "y": np.arange(3)}, "2 images and y 3 labels"),
        ({"x": pixels(2).astype(np.float32) / 255, "y": np.arange(2)}, "x is float32"),
        ({"x": pixels(2).transpose(0, 3, 1, 2), "y": np.arange(2)}, r"(?s)shape \(2, 3, 6, 8\).*transpose"),
        ({"x": pixels(2)[0], "y": np.arange(6)}, "channel"),
        ({"x": pixels(2).reshape(2, -1), "y": np.arange(2)}, "shape"),
        ({"x": pixels(2), "y": np.eye(2)}, "argmax"),
        ({"x": pixels(2), "y": np.array([0.0, 1.0])}, "y is float64"),
        ({"x": pixels(2), "y": np.array(["a", "b"])}, "not one integer label"),
        ({"x": pixels(2), "y": np.array([0, 10])}, r"(?s)1 of 2 labels lie outside 0\.\.9.*y\[1\]: 10"),
        ({"x": pixels(2), "y": np.array([-1, 3])}, r"y\[0\]: -1"),
        ({"x": pixels(3), "y": np.array([1, 10, 5])}, "count from 1"),
        ({"x": pixels(2, channels=1), "y": np.arange(2)}, r"(?s)1 channel.*repeat"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    path = write_npz(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_eval_data(path, COLOUR, classes=10)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_pickles_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object), y=np.arange(1))
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 but no more")
    (tmp_path / "d.txt").write_text("")
    for name in ("p.npz", "t.npz", "d.txt", "missing.npz"):
        with pytest.raises(DataError) as caught:
            load_eval_data(tmp_path / name)
        assert name in str(caught.value)


def test_a_truncated_npz_is_named(tmp_path):
    path = write_npz(tmp_path / "d.npz", x=pixels(50), y=np.arange(50))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="cannot be read"):
        load_eval_data(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "no column file and no column label"),
        ("file,class\n0.png,1\n", "no column label"),
        ("file,label\n", "names no image"),
        ("file,label\n0.png,0\n5.png,1\n", "'5.png' of line 3 does not exist"),
        ("file,label\n,1\n", "line 2 does not exist"),
        ("file,label\n0.png,tabby\n", "'tabby' of line 2"),
        ("file,label\n0.png\n", "'' of line 2"),
        ("file,label\n0.png,99999999999999999999\n", "of line 2"),
        ("file,label\n0.png,10\n", r"0\.\.9.*0\.png: 10"),
    ],
)
def test_bad_tables(tmp_path, table, message):
    folder = write_csv_folder(tmp_path / "d", pixels(2), [0, 1])
    (folder / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        load_eval_data(folder, COLOUR, classes=10)


def test_a_table_that_is_not_text(tmp_path):
    folder = write_csv_folder(tmp_path / "d", pixels(1), [0])
    (folder / "labels.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="cannot be read"):
        load_eval_data(folder)


def test_folders_without_images_or_labels(tmp_path):
    with pytest.raises(DataError, match="no images"):
        load_eval_data(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="1 images without labels"):
        load_eval_data(tmp_path)
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=r"beside the class folders \(a.png\)"):
        load_eval_data(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "cat").rename(tmp_path / "images")
    with pytest.raises(DataError, match=r"labels\.csv is missing"):
        load_eval_data(tmp_path)


def test_damaged_images_are_named(tmp_path):
    folder = write_csv_folder(tmp_path / "d", pixels(3), [0, 1, 2])
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "1.png")
    whole = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").write_bytes(whole[: len(whole) - 60])
    data = load_eval_data(folder, COLOUR)  # the header is fine
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        collected(data)
    assert "1.png" in str(caught.value)
    (folder / "images" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        load_eval_data(folder, COLOUR)
    assert "1.png" in str(caught.value)
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(folder / "images" / "1.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        load_eval_data(folder, COLOUR)


def test_networks_that_take_no_images(tmp_path):
    path = write_npz(tmp_path / "d.npz", x=pixels(2), y=np.arange(2))
    with pytest.raises(DataError, match="labelled images can only"):
        load_eval_data(path, TensorSpec("x", (None, 40), F32))


@pytest.mark.assets
def test_the_real_sets(assets):
    cifar = load_eval_data(assets / "data" / "cifar10_test.npz", TensorSpec("x", (None, 3, 32, 32), F32), classes=10)
    assert len(cifar) == 4987
    photos = load_eval_data(
        assets / "data" / "imagenet_like_224", TensorSpec("x", (None, 3, 224, 224), F32), classes=1000, limit=20
    )
    images, labels = next(photos.batches(20))
    assert images.shape == (20, 224, 224, 3)
    assert 60 < images.mean() < 180
    assert labels.max() < 1000


def test_images_without_labels(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    spec = TensorSpec("input", (None, 3, 8, 8), np.dtype(np.float32))
    found = load_images(tmp_path / "x.npz", spec)
    np.testing.assert_array_equal(found.images(0, 7), x)
    assert found.labels.tolist() == [-1] * 7
    folder = tmp_path / "photos" / "deeper"
    folder.mkdir(parents=True)
    for index, image in enumerate(x):
        Image.fromarray(image).save(folder / f"{index}.png")
    found = load_images(tmp_path / "photos", spec, limit=3)
    np.testing.assert_array_equal(found.images(0, 3), x[[0, 2, 4]])
    with pytest.raises(DataError, match="takes 9x9"):
        load_images(tmp_path / "photos", TensorSpec("input", (None, 3, 9, 9), np.dtype(np.float32)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in the folder"):
        load_images(tmp_path / "empty", spec)
    with pytest.raises(DataError, match="do not exist"):
        load_images(tmp_path / "missing", spec)
    np.savez(tmp_path / "y.npz", y=x)
    with pytest.raises(DataError, match="x is missing"):
        load_images(tmp_path / "y.npz", spec)
