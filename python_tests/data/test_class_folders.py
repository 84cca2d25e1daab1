"""Which folder is which class, and which files in it are its pictures."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from unlearn_ext.data import open_data, parse_classes, read_class_map
from unlearn_ext.data.labels import label_names
from unlearn_ext.errors import InputError

TEXTS = {0: "zebra", 1: "apple, Malus", 2: "Mango"}
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


def folders(root, names, shade=lambda i: 20 * i):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("L", (4, 4), shade(i)).save(root / name / "x.png")
    return root


def opened(root, classes=3, texts=None, class_map=None):
    return open_data(root, size=4, channels=1, classes=classes, id2label=texts, class_map=class_map)


def refused(match, *args, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        opened(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_folders_called_as_the_models_texts_are_those_classes(tmp_path):
    root = folders(tmp_path, ["Malus", "mango", "ZEBRA"])
    assert opened(root, texts=TEXTS).folders == {"Malus": 1, "mango": 2, "ZEBRA": 0}
    assert opened(root, classes=9, texts=TEXTS).counts == {0: 1, 1: 1, 2: 1}  # some classes have no data
    (root / "apple").mkdir()
    refused("'Malus' and 'apple' of .* are both class 1", root, texts=TEXTS)


@pytest.mark.parametrize("texts", [None, TEXTS])
def test_a_guess_from_sorted_order_is_to_be_confirmed(tmp_path, texts):
    root = folders(tmp_path, ["ant", "bee", "cow"])
    why = r"\('ant' as 0, 'bee' as 1\), for the model (has no label texts|calls no class 'ant')"
    refused(f"only be guessed from their sorted order {why}: confirm it with --class-map sorted", root, texts=texts)
    assert opened(root, texts=texts, class_map="sorted").folders == {"ant": 0, "bee": 1, "cow": 2}
    assert opened(root, classes=None).folders == {"ant": 0, "bee": 1, "cow": 2}  # no model's classes: nothing to guess
    refused("3 class folders and the model 4 classes", root, classes=4, class_map="sorted")


def test_the_synsets_of_imagenet_are_its_classes(tmp_path):
    names = [f"n{10_000_000 + 7 * i}" for i in range(1000)]
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    assert opened(tmp_path, 1000, {0: "tench"}).folders == {name: i for i, name in enumerate(names)}


def test_padded_numbers_are_numbers(tmp_path):
    root = folders(tmp_path, [f"{i:03}" for i in (0, 2, 1, 10, 3, 4, 5, 6, 7, 8, 9)])
    assert opened(root, 11).folders == {f"{i:03}": i for i in range(11)}
    refused("'000' would be class 0 .* and the model calls class 1 so", root, 11, {0: "001", 1: "000"})


@pytest.mark.parametrize("folder", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("written", [COMPOSED, DECOMPOSED])
def test_unicode_writes_a_name_in_two_ways(tmp_path, folder, written):
    root = folders(tmp_path / "data", [folder, "b"])
    (tmp_path / "map.json").write_text(json.dumps({written: 1, "b": 0}))
    data = opened(root, 2, class_map=tmp_path / "map.json")
    assert data.folders == {folder: 1, "b": 0} and data.parse_classes(written.upper()) == [1]
    assert opened(root, 2, {0: written.capitalize(), 1: "b"}).folders[folder] == 0
    assert parse_classes(written, 2, label_names({1: folder})) == [1]
    (tmp_path / "texts.json").write_text(json.dumps({folder: written, "b": 1}))
    assert read_class_map(tmp_path / "texts.json", label_names({0: folder})) == {folder: 0, "b": 1}


def test_two_folders_that_differ_in_their_normal_form_only(tmp_path):
    root = folders(tmp_path / "data", [COMPOSED, DECOMPOSED])
    assert opened(root, 2, class_map={COMPOSED: 1, DECOMPOSED: 0}).folders == {COMPOSED: 1, DECOMPOSED: 0}


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folders(tmp_path / "data", ["a", "b"])
    (tmp_path / "map.json").write_text('{"a": 1, "b": 0}')
    assert opened("~/data", 2, class_map="~/map.json").folders == {"a": 1, "b": 0}


def test_what_systems_put_beside_pictures_is_passed_over(tmp_path):
    root = folders(tmp_path, ["0", "1"])
    Image.new("L", (4, 4)).save(root / "0" / "PHOTO.JPEG", "JPEG")
    for name in ("__MACOSX", "@eaDir", "lost+found", ".cache"):
        folders(root, [name])
        folders(root / "1", [name])
    for name in ("Thumbs.db", ".DS_Store", "._x.png", "desktop.ini"):
        (root / "0" / name).write_bytes(b"")
    assert opened(root, 2).counts == {0: 2, 1: 1}


def test_links_to_pictures_and_folders(tmp_path):
    elsewhere = folders(tmp_path / "elsewhere", ["cats", "dogs"])
    root = tmp_path / "data"
    (root / "1").mkdir(parents=True)
    (root / "0").symlink_to(elsewhere / "cats")
    (root / "1" / "y.PNG").symlink_to(elsewhere / "dogs" / "x.png")
    (root / "1" / "gone.png").symlink_to(elsewhere / "absent.png")
    data = opened(root, 2)
    assert data.counts == {0: 1, 1: 2} and data.verify(range(3)) == [0, 2]
    assert "gone.png (there is no such file)" in data.unreadable[1]
    (root / "2").symlink_to(root / "1")
    refused("'1' and '2' of .* are links to the same images: keep one", root, 3)


def test_a_pipe_is_no_picture(tmp_path):
    root = folders(tmp_path, ["0"])
    os.mkfifo(root / "0" / "y.png")
    data = opened(root, 1)
    assert data.counts == {0: 1} and data.ignored == 1 and len(data.sha256) == 64


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = folders(tmp_path, ["0"])
    scan = os.scandir

    def denied(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    (root / "0" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", denied)
    refused("deep cannot be read .Permission denied.", root, 1)


def test_names_of_other_bytes_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    try:
        root = folders(tmp_path, [name, "b"])
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (root / name / "bad.png").write_bytes(b"no picture")
    data = opened(root, 2, class_map={name: 1, "b": 0})
    assert data.mapping[1].folder == "caf�"
    data.verify(range(3))
    json.dumps(data.unreadable, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"a": 1' + "0" * 5000 + "}", "an integer of 5001 digits"),
        ('{"a": "' + "1" * 5000 + '"}', "expected an index for the folder 'a'"),
        ("[" * 100_000, "nested too deeply|Expecting value"),
        ('{"a":' * 100_000 + "0" + "}" * 100_000, "nested too deeply"),
        ('{"a": {"b": 1}}', "expected an index"),
        ('{"a": NaN}', "expected an index"),
        ("a " + "1" * 5000, "expected an index for the folder 'a'"),
        ("a 1\n" + "x" * 10_000, "has no index"),
        ('{"a": 1}' + " " * (17 << 20), "more than 16,777,216 bytes"),
    ],
)
def test_class_maps_beyond_all_bounds(tmp_path, text, match):
    (tmp_path / "map").write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        read_class_map(tmp_path / "map")
    assert len(str(caught.value)) < 600


def test_a_class_of_many_digits_is_none():
    with pytest.raises(InputError, match=r"class 1{100}… is outside the model's 3 classes"):
        parse_classes("1" * 5000, 3, {})
    assert parse_classes("٣", 4, {}) == [3]  # decimal digits of any script


def test_pixels_of_every_common_mode_are_as_pil_converts_them(tmp_path):
    (tmp_path / "0").mkdir()
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    palette = colour.quantize(8)
    palette.save(tmp_path / "0" / "palette.png", transparency=b"\x00\x80\xff")
    colour.convert("CMYK").save(tmp_path / "0" / "cmyk.jpg")
    colour.convert("RGBA").save(tmp_path / "0" / "alpha.png")
    colour.convert("1").save(tmp_path / "0" / "bits.png")
    frames = [colour, Image.new("RGB", (4, 4))]
    frames[0].save(tmp_path / "0" / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    data = open_data(tmp_path, size=4, channels=3, classes=1)
    for i, file in enumerate(sorted((tmp_path / "0").iterdir())):
        with Image.open(file) as image:
            expected = np.asarray(image.convert("RGB"), dtype=np.float64)
        assert np.allclose(data[i]["pixel_values"].numpy().transpose(1, 2, 0), expected / 127.5 - 1, atol=1e-6), file
