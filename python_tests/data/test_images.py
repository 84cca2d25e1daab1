"""A user's data: class folders and arrays, their labels, preprocessing and hash, and what is refused."""

import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import pipelines
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from unlearn_ext.data import _folders as module
from unlearn_ext.data import label_names, open_data, parse_classes, read_class_map
from unlearn_ext.data.labels import composed
from unlearn_ext.errors import InputError

pytest.importorskip("mlxtend")
Image = pytest.importorskip("PIL.Image")

MODEL = {"size": 16, "channels": 1, "classes": 10}
LATENTS = {"latent_size": 4, "latent_channels": 2, "classes": 10}
ID2LABEL = dict(enumerate(pipelines.NAMES))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return pipelines.save_digit_folders(tmp_path_factory.mktemp("digits") / "all", 4)


@pytest.fixture
def digits(kept, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(kept, tmp_path / "digits")


def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        open_data(*args, **kwargs)
    assert "\n" not in str(caught.value)


# --- Folders ------------------------------------------------------------------------------------------------


def test_labels_and_counts_are_known_without_decoding(kept, monkeypatch):
    monkeypatch.setattr(module.Folders, "_decode", None)
    data = open_data(kept, **MODEL, id2label=ID2LABEL)
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [d for d in range(10) for _ in range(4)]
    assert data.counts == dict.fromkeys(range(10), 4) and len(data) == 40
    assert data.mapping[3] == (3, "3", "three", 4)


def test_samples_are_the_digits_in_minus_one_to_one(kept):
    data = open_data(kept, **{**MODEL, "size": 28})
    sample = data[13]
    assert sample.keys() == {"pixel_values", "labels"} and sample["labels"] == 3
    stored = np.array(Image.open(kept / "3" / "001.png"))
    assert sample["pixel_values"].dtype == torch.float32 and sample["pixel_values"].shape == (1, 28, 28)
    expected = torch.from_numpy(stored.astype(np.float64) * 2 / 255 - 1)
    torch.testing.assert_close(sample["pixel_values"][0].double(), expected, rtol=0, atol=1e-6)
    assert sample["pixel_values"].min() == -1 and sample["pixel_values"].max() > 0.9
    batch = next(iter(DataLoader(data, batch_sampler=[[0, 39]])))
    assert batch["pixel_values"].shape == (2, 1, 28, 28) and batch["labels"].tolist() == [0, 9]


@pytest.mark.parametrize("width, height", [(40, 20), (20, 47), (16, 16), (9, 5), (33, 34)])
def test_shorter_side_is_resized_and_the_middle_is_kept(tmp_path, width, height):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "x.PNG")
    data = open_data(tmp_path, size=16, channels=3, classes=1)
    # torchvision's Resize(16) and CenterCrop(16), written out
    short, long = min(width, height), max(width, height)
    resized = (16, int(16 * long / short)) if width <= height else (int(16 * long / short), 16)
    whole = np.array(image.resize(resized, Image.Resampling.BILINEAR))
    top, left = round((whole.shape[0] - 16) / 2.0), round((whole.shape[1] - 16) / 2.0)
    expected = whole[top : top + 16, left : left + 16].transpose(2, 0, 1).astype(np.float32) / 255
    assert torch.equal(data[0]["pixel_values"], (torch.from_numpy(expected) - 0.5) / 0.5)
    assert data.enlarged == ({0} if short < 16 else set())
    assert data.preprocessing["size"] == [16, 16] and data.preprocessing["mode"] == "RGB"


def test_grey_and_colour_are_converted_and_turned_as_the_camera_says(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png", exif=exif)
    Image.fromarray(pixels).convert("P").save(tmp_path / "a" / "y.bmp")
    colour = open_data(tmp_path, size=16, channels=3, classes=1)
    assert colour[0]["pixel_values"][:, 0, 0].tolist() == [-1, -1, -1]
    assert colour[0]["pixel_values"][:, 15, 0].tolist() == [1, -1, -1]
    assert colour[1]["pixel_values"][:, 0, 0].tolist() == [1, -1, -1]
    grey = open_data(tmp_path, size=16, channels=1, classes=1)
    assert grey[1]["pixel_values"].shape == (1, 16, 16)
    assert grey[1]["pixel_values"][0, 0, 0] == pytest.approx(2 * 76 / 255 - 1)  # 0.299 · 255


def test_nested_files_count_and_others_are_ignored(digits):
    (digits / "3" / "deep" / "deeper").mkdir(parents=True)
    shutil.move(digits / "3" / "002.png", digits / "3" / "deep" / "deeper" / "z.png")
    (digits / "3" / "notes.txt").write_text("x")
    (digits / "README").write_text("x")
    (digits / ".hidden").mkdir()
    (digits / "3" / "deep" / "loop").symlink_to(digits / "3")
    data = open_data(digits, **MODEL)
    assert data.counts[3] == 4 and data.ignored == 2
    names = [data._source.name(i) for i in range(12, 16)]
    assert [name.rsplit("/", 1)[1] for name in names] == ["000.png", "001.png", "003.png", "z.png"]


def test_numbered_folders_are_sorted_as_numbers(tmp_path):
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        Image.new("L", (4, 4), number).save(tmp_path / str(number) / "x.png")
    data = open_data(tmp_path, size=4, channels=1, classes=12)
    for index in range(12):
        pixel = round((float(data[index]["pixel_values"][0, 0, 0]) + 1) * 255 / 2)
        assert (pixel, int(data.labels[index])) == (index, index)
    (tmp_path / "0").rename(tmp_path / "12")
    refused("are numbers, but not 0 to 11: say which folder", tmp_path, size=4, channels=1, classes=12)


def test_folders_by_sorted_order_only_if_there_are_as_many_as_classes(digits):
    refused("10 class folders and the model 11 classes: .*--class-map", digits, **{**MODEL, "classes": 11})
    assert open_data(digits, **{**MODEL, "classes": None}).counts[9] == 4
    shutil.rmtree(digits / "4")
    refused("9 class folders and the model 10 classes: .*--class-map", digits, **MODEL)


def test_sorted_order_that_contradicts_the_models_texts_is_refused(kept, tmp_path):
    for digit, name in enumerate(pipelines.NAMES):
        shutil.copytree(kept / str(digit), tmp_path / name)
    named = {**MODEL, "id2label": ID2LABEL}
    confirmed = {**named, "class_map": "sorted"}
    refused("'eight' would be class 0 by sorted order, and the model calls class 8 so", tmp_path, **confirmed)
    mapped = open_data(tmp_path, **named, class_map={n: i for i, n in ID2LABEL.items()})
    assert mapped.folders["eight"] == 8 and mapped.labels.tolist() == sorted(mapped.labels.tolist())
    assert torch.equal(mapped[32]["pixel_values"], open_data(kept, **MODEL)[32]["pixel_values"])
    assert mapped.parse_classes("Eight,3") == [8, 3]


@pytest.mark.parametrize(
    "name, text",
    [
        ("map.json", '{"a": 3, "b c": 1}'),
        ("map.json", '{"a": "three", "b c": "1"}'),
        ("map.txt", "# folder class\na 3\n\nb c\t1\n"),
        ("map.csv", "a,3\nb c, 1\n"),
        ("map.txt", "a: 3\nb c: 1"),
    ],
)
def test_class_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name, label_names(ID2LABEL)) == {"a": 3, "b c": 1}


@pytest.mark.parametrize("text", ["a\nb c\n", '["a", "b c"]'])
def test_a_class_map_without_indices_is_in_the_order_of_classes(tmp_path, text):
    (tmp_path / "map").write_text(text)
    assert read_class_map(tmp_path / "map") == {"a": 0, "b c": 1}


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"a": 1', "not valid JSON"),
        ('{"a": 1.5}', "expected an index for the folder 'a', got 1.5"),
        ('{"a": "twelve"}', "expected an index"),
        ('{"a": 1, "b": 1}', "gives class 1 to both 'a' and 'b'"),
        ('{"a": 1, "a": 2}', "names the folder 'a' twice"),
        ("a 1\nb\n", "the line 'b' has no index"),
        ("", "is empty"),
        ("[1, 2]", "expected a JSON object"),
    ],
)
def test_class_maps_that_are_refused(tmp_path, text, match):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(InputError, match=match):
        read_class_map(tmp_path / "map.txt", label_names(ID2LABEL))


def test_a_class_map_must_name_every_folder_and_fit_the_model(kept, tmp_path):
    some = shutil.copytree(kept / "3", tmp_path / "data" / "x").parent
    assert open_data(some, **MODEL, class_map={"x": 7, "absent": 2}).counts == {7: 4}
    refused("does not name the folder 'x'", some, **MODEL, class_map={"y": 7})
    refused(r"gives 'x' the class 10: the model has 10 classes \(0 to 9\)", some, **MODEL, class_map={"x": 10})
    refused("gives 'x' the class -1", some, **MODEL, class_map={"x": -1})
    refused("the class map .* cannot be read", some, **MODEL, class_map=tmp_path / "absent.json")


def test_folders_that_are_refused(digits, tmp_path):
    refused("there is no data at", tmp_path / "absent", **MODEL)
    refused("takes latents only", digits, **LATENTS)
    refused("interpolation: expected one of", digits, **MODEL, interpolation="area")
    for file in (digits / "7").iterdir():
        file.rename(file.with_suffix(".tif"))
    refused("the class folder .*7 has no images", digits, **MODEL)
    flat = tmp_path / "flat"
    shutil.copytree(digits / "3", flat)
    refused("has no class folders", flat, **MODEL)
    (tmp_path / "data.pt").write_bytes(b"x")
    refused("expected a folder with one folder per class", tmp_path / "data.pt", **MODEL)


# --- Unreadable images --------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_skipped(digits):
    whole = (digits / "2" / "001.png").read_bytes()
    (digits / "2" / "001.png").write_bytes(whole[: len(whole) // 2])
    (digits / "5" / "000.png").write_bytes(b"")
    Image.fromarray(np.full((28, 28), 40000, np.uint16)).save(digits / "6" / "002.png")
    (digits / "8" / "003.png").unlink()
    (digits / "8" / "003.png").symlink_to("nowhere")
    data = open_data(digits, **MODEL)
    assert len(data) == 40
    seen = []
    good = data.verify(range(40), progress=lambda done, count: seen.append((done, count)))
    assert good == [i for i in range(40) if i not in (9, 20, 26, 35)] and seen[-1] == (40, 40)
    assert sorted(data.unreadable) == [9, 20, 26, 35]
    assert "2/001.png" in data.unreadable[9] and "I;16" in data.unreadable[26]
    assert data.verify([9, 10, 10, 8]) == [10, 8]
    with pytest.raises(InputError, match=r"5/000.png cannot be read .*: remove it"):
        data[20]


def test_strict_refuses_the_first_one(digits):
    (digits / "5" / "000.png").write_bytes(b"no picture")
    data = open_data(digits, **MODEL)
    assert data.verify([0, 39], strict=True) == [0, 39]
    with pytest.raises(InputError, match=r"unreadable image: .*5/000.png .*--strict"):
        data.verify(range(40), strict=True)
    with pytest.raises(InputError, match="none of 1 images can be read"):
        data.verify([20])


def test_verified_pictures_are_decoded_once(kept, monkeypatch):
    decoded = []
    decode = module.Folders._decode
    monkeypatch.setattr(module.Folders, "_decode", lambda self, i: decoded.append(i) or decode(self, i))
    data = open_data(kept, **MODEL)
    data.verify([1, 2])
    again = [data[i]["pixel_values"] for i in (1, 2, 3)]
    assert sorted(decoded) == [1, 2, 3]
    fresh = open_data(kept, **MODEL)
    assert all(torch.equal(fresh[i]["pixel_values"], kept) for i, kept in zip((1, 2, 3), again, strict=True))
    monkeypatch.setattr(module, "KEPT_BYTES", 2 * 256)
    bounded = open_data(kept, **MODEL)
    bounded.verify(range(5))
    assert len(bounded._source._kept) == 2
    assert torch.equal(pickle.loads(pickle.dumps(bounded))[4]["pixel_values"], bounded[4]["pixel_values"])


# --- Hashes -------------------------------------------------------------------------------------------------


def test_the_hash_is_of_names_labels_and_content_and_not_of_the_place(kept, digits):
    first = open_data(kept, **MODEL)
    assert first.sha256 == open_data(digits, **{**MODEL, "size": 8}).sha256 and len(first.sha256) == 64
    assert first.sha256_covers == "names and sizes of 40 files, content of 40"
    reordered = {str(i): (i + 1) % 10 for i in range(10)}
    assert open_data(digits, **MODEL, class_map=reordered).sha256 != first.sha256
    spread = {"size": 16, "channels": 1, "class_map": {str(i): 2 * i for i in range(10)}}  # the same order
    assert open_data(digits, **spread).sha256 != first.sha256
    file = digits / "4" / "000.png"
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    changed = open_data(digits, **MODEL).sha256
    assert changed != first.sha256
    file.rename(file.with_name("zzz.png"))
    assert open_data(digits, **MODEL).sha256 not in (changed, first.sha256)


def test_beyond_the_limit_a_sample_of_the_content_is_hashed(kept, digits, monkeypatch):
    total = sum(file.stat().st_size for file in kept.rglob("*.png"))
    monkeypatch.setattr(module, "HASHED_BYTES", total // 4)
    data = open_data(kept, **MODEL)
    before = data.sha256
    assert data.sha256_covers.endswith(("content of 10", "content of 9"))
    (digits / "0" / "000.png").write_bytes(bytes((digits / "0" / "000.png").stat().st_size))
    assert open_data(digits, **MODEL).sha256 != before
    shutil.copy(kept / "0" / "000.png", digits / "0" / "000.png")
    (digits / "9" / "003.png").write_bytes((digits / "9" / "003.png").read_bytes() + b"x")
    assert open_data(digits, **MODEL).sha256 != before


# --- Arrays -------------------------------------------------------------------------------------------------


def save(path, compressed=False, **arrays):
    if path.suffix == ".npz":
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
    else:
        save_file({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}, path)
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)


LABELS = np.array([0, 1, 2, 2, 1, 0], dtype=np.int32)
COLOUR = {"size": (5, 7), "channels": 3, "classes": 3}


@pytest.mark.parametrize(
    "suffix, order, dtype",
    [
        *itertools.product(
            [".npz", "compressed"], ["hwc", "chw", "fortran"], [np.uint8, np.float32, np.float16, ">f8"]
        ),
        *itertools.product([".safetensors"], ["hwc", "chw"], [np.uint8, np.float32, np.float16]),
    ],
)
def test_arrays_of_images(tmp_path, pixels, suffix, order, dtype):
    expected = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float64) * 2 / 255 - 1)
    stored = pixels if dtype is np.uint8 else (pixels.astype(np.float64) * 2 / 255 - 1).astype(dtype)
    stored = stored.transpose(0, 3, 1, 2) if order == "chw" else stored
    stored = np.asfortranarray(stored) if order == "fortran" else np.ascontiguousarray(stored)
    file = tmp_path / ("data.npz" if suffix == "compressed" else f"data{suffix}")
    data = open_data(save(file, suffix == "compressed", images=stored, labels=LABELS), **COLOUR)
    assert data.kind == "pixel_values" and data.labels.tolist() == LABELS.tolist()
    assert data.counts == {0: 2, 1: 2, 2: 2} and len(data) == 6
    for i in (5, 0, 3):
        sample = data[i]["pixel_values"]
        assert sample.dtype == torch.float32 and sample.shape == (3, 5, 7)
        torch.testing.assert_close(sample.double(), expected[i], rtol=0, atol=2e-3 if dtype is np.float16 else 1e-6)
    assert data.verify([4, 4, 1]) == [4, 1]
    assert torch.equal(pickle.loads(pickle.dumps(data))[2]["pixel_values"], data[2]["pixel_values"])
    assert data.sha256_covers == "the whole file"


def test_an_uncompressed_npz_is_not_read_into_memory(tmp_path, pixels):
    stored = open_data(save(tmp_path / "a.npz", images=pixels, labels=LABELS), **COLOUR)
    assert isinstance(stored._source._array._array, np.memmap)


def test_grey_arrays_need_no_channel(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    data = open_data(save(tmp_path / "a.npz", images=images, labels=LABELS[:3]), size=4, channels=1, classes=3)
    assert data[2]["pixel_values"].shape == (1, 4, 4)
    assert float(data[2]["pixel_values"][0, 1, 3]) == pytest.approx(images[2, 1, 3] / 127.5 - 1, abs=1e-6)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_latents_and_their_moments(tmp_path, suffix):
    generator = np.random.default_rng(3)
    mean = generator.normal(size=(3, 2, 4, 4)).astype(np.float32)
    std = np.abs(generator.normal(size=(3, 2, 4, 4))).astype(np.float16)
    labels = LABELS[:3].astype(np.uint8)
    plain = open_data(save(tmp_path / f"a{suffix}", latents=mean, labels=labels), **LATENTS)
    assert plain.kind == "latents" and torch.equal(plain[1]["latents"], torch.from_numpy(mean[1]))
    both = open_data(save(tmp_path / f"b{suffix}", latent_mean=mean, latent_std=std, labels=labels), **LATENTS)
    assert both.kind == "latent_moments" and both[2].keys() == {"latent_mean", "latent_std", "labels"}
    assert torch.equal(both[2]["latent_std"], torch.from_numpy(std[2].astype(np.float32)))
    assert plain.sha256 != both.sha256


def test_arrays_that_are_refused(tmp_path, pixels):
    def bad(match, settings=COLOUR, **arrays):
        refused(match, save(tmp_path / "a.npz", **arrays), **settings)

    floats = (pixels / 127.5 - 1).astype(np.float32)
    bad("expected one of images, latents, or latent_mean with latent_std; it holds none", labels=LABELS)
    bad("it holds images and latents", images=pixels, latents=floats, labels=LABELS)
    bad("has no labels", images=pixels)
    bad("6 samples and 5 labels", images=pixels, labels=LABELS[:5])
    bad("labels: expected integers", images=pixels, labels=LABELS.astype(np.float32))
    bad(r"labels: expected integers of shape \[N\]", images=pixels, labels=LABELS[:, None])
    bad(r"has the label 3: the model has 3 classes \(0 to 2\)", images=pixels, labels=LABELS + 1)
    bad("has the label -1", images=pixels, labels=LABELS - 1)
    bad(r"images of shape \[5, 6, 3\], and the model takes \[3, 5, 7\]", images=pixels[:, :, :6], labels=LABELS)
    bad(r"images of shape \[5, 7, 1\]", images=pixels[..., :1], labels=LABELS)
    bad(r"expected uint8, or floats in \[-1, 1\], got torch.int64", images=pixels.astype(np.int64), labels=LABELS)
    bad("no pixel below 0: .* 2 x - 1", images=(floats + 1) / 2, labels=LABELS)
    bad("no byte above 1: black is 0 and white is 255", images=(pixels > 127).astype(np.uint8), labels=LABELS)
    bad("has pixels from .* to .*: floats must be in", images=floats * 127, labels=LABELS)
    bad("sample 0 of .* has pixels from nan", images=np.full_like(floats, np.nan), labels=LABELS)
    bad("has no samples", images=pixels[:0], labels=LABELS[:0])
    bad("the model takes latents only", LATENTS, images=pixels, labels=LABELS)
    latents = np.zeros((6, 2, 4, 4), np.float32)
    bad("the model takes images", COLOUR, latents=latents, labels=LABELS)
    bad("latent_mean needs latent_std", LATENTS, latent_mean=latents, labels=LABELS)
    bad(r"has latents of shape \[6, 2, 4, 3\]", LATENTS, latents=latents[..., :3], labels=LABELS)
    bad(r"expected floats", LATENTS, latents=latents.astype(np.uint8), labels=LABELS)
    bad("a class map is for folders", {**COLOUR, "class_map": {}}, images=pixels, labels=LABELS)


def test_bad_numbers_far_into_an_array_are_found_before_a_run(tmp_path):
    floats = np.random.default_rng(4).uniform(-1, 1, (500, 2, 2, 1)).astype(np.float32)
    floats[333] = 7
    labels = np.zeros(500, np.int64)
    data = open_data(save(tmp_path / "a.npz", images=floats, labels=labels), size=2, channels=1, classes=2)
    assert data.verify([1, 2]) == [1, 2]
    with pytest.raises(InputError, match=r"sample 333 of .* has pixels from 7 to 7"):
        data.verify(range(500))
    std = np.ones((2, 2, 4, 4), np.float32)
    std[1, 0] = -1
    file = save(tmp_path / "b.safetensors", latent_mean=std, latent_std=std.copy(), labels=labels[:2])
    data = open_data(file, **LATENTS)
    with pytest.raises(InputError, match="negative latent_std"):
        data.verify([0, 1])


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("key", ["images", "labels"])
def test_pickled_objects_are_refused_and_not_opened(tmp_path, pixels, key):
    arrays = {"images": pixels, "labels": LABELS, key: np.array([Bomb()] * 6, dtype=object)}
    np.savez(tmp_path / "a.npz", **arrays)
    refused(f"{key} holds pickled objects", tmp_path / "a.npz", **COLOUR)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files_are_refused(tmp_path, pixels, suffix):
    file = save(tmp_path / f"a{suffix}", images=pixels, labels=LABELS)
    for content in (b"", b"nonsense", file.read_bytes()[:200]):
        (tmp_path / f"b{suffix}").write_bytes(content)
        refused("is not a (whole .npz|safetensors) file", tmp_path / f"b{suffix}", **COLOUR)


# --- Label texts --------------------------------------------------------------------------------------------


def test_classes_by_index_and_by_text():
    names = label_names({0: "tench, Tinca tinca", 1: "crane", 2: "crane, machine", 3: "great white shark"})
    assert parse_classes("3, tench", 4, names) == [3, 0]
    assert parse_classes("Tinca Tinca,0, 3", 4, names) == [0, 3]
    assert parse_classes("tench, Tinca tinca", 4, names) == [0]
    assert parse_classes(2, 4, names) == [2] and parse_classes(["tench", 1], 4, names) == [0, 1]
    for text, match in [
        ("crane", "'crane' is the name of classes 1 and 2: give the index"),
        ("tensh", "no class 'tensh': did you mean 'tench'"),
        ("zzz", "it knows 'tench, tinca tinca', 'tench', 'tinca tinca', 'crane', 'crane, machine' and 2 more"),
        ("4", "class 4 is no class of images"),
        ("5", r"class 5 is outside the model's 4 classes, 0 to 3"),
        ("-1", "class -1 is outside"),
        ("", "no class to forget was named"),
        (" , ", "no class to forget was named"),
    ]:
        with pytest.raises(InputError, match=match):
            parse_classes(text, 4, names)
    with pytest.raises(InputError, match="'tench' is no index, and there are no label texts"):
        parse_classes("tench", 4, {})


def test_a_number_that_is_an_index_and_the_text_of_another_class_is_refused():
    names = label_names({0: "5", 1: "1", 2: "12", 3: "0"}, {"cat": 1, "2": 3})
    for text in ("0", "2", "1, 2"):
        with pytest.raises(InputError, match=r"say 'index (0|2)' or 'label (0|2)'"):
            parse_classes(text, 4, names)
    assert parse_classes("index 0, label 0", 4, names) == [0, 3]
    assert parse_classes("1, 3, 5, 12", 4, names) == [1, 3, 0, 2]  # one meaning each
    assert parse_classes([0, 2], 4, names) == [0, 2]  # no text
    assert parse_classes("label 3", 4, {"label 3": [1]}) == [1]
    with pytest.raises(InputError, match="class 5 is outside"):
        parse_classes("index 5", 4, names)
    with pytest.raises(InputError, match="no class '3'"):
        parse_classes("label 3", 4, names)


def test_texts_are_those_of_a_utf_8_locale():
    """As Python has them of a command line or a folder in an ASCII locale."""
    undecoded = "café".encode().decode("ascii", "surrogateescape")
    assert parse_classes(undecoded, 4, {"café": [2]}) == [2]
    assert label_names(None, {undecoded: 2}) == {"café": [2]}
    assert composed("caf\udce9") == "caf\udce9"  # Latin-1's


def test_folder_names_are_texts(kept, tmp_path):
    for digit in (0, 1):
        shutil.copytree(kept / str(digit), tmp_path / f"n0{digit}x")
    data = open_data(tmp_path, size=16, channels=1, classes=2, class_map="sorted")
    assert data.parse_classes("n01x") == [1]
    with pytest.raises(InputError, match=r"did you mean 'n0.x' or"):
        data.parse_classes("n02x")
    assert json.loads(json.dumps(data.preprocessing)) == data.preprocessing
