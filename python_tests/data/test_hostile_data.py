"""Data whose headers lie: refused in one sentence, with memory that does not depend on what a file says."""

import io
import json
import struct
import threading
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from unlearn_ext.data import _folders, open_data
from unlearn_ext.errors import InputError

MODEL = {"size": 2, "channels": 1, "classes": 3, "latent_size": 2, "latent_channels": 4}


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def pictures(root, **files: bytes):
    (root / "0").mkdir()
    for name, content in files.items():
        (root / "0" / f"{name}.png").write_bytes(content)
    return open_data(root, size=32, channels=1, classes=1)


# --- Pictures -----------------------------------------------------------------------------------------------


def test_a_link_to_itself_is_a_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "0").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "0" / "a.png")
    (tmp_path / "0" / "loop.png").symlink_to("loop.png")
    (tmp_path / "0" / "loop").symlink_to("loop")
    data = open_data(tmp_path, size=4, channels=1, classes=1)
    assert data.counts == {0: 2} and data.ignored == 1 and data.sha256


@pytest.mark.parametrize("width, height", [(9460, 9460), (60_000, 60_000), (89_000_000, 1), (1, 3_000_000)])
@pytest.mark.parametrize("pil_warns", [True, False])
def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch, width, height, pil_warns):
    data = pictures(tmp_path, a=png(width, height), b=png(2, 2))
    if not pil_warns:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert "pixels" in data.decode(0)


@pytest.mark.parametrize("kind", ["ICO", "ICNS", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "EPS", "PDF"])
def test_pictures_of_other_kinds_are_refused_whatever_their_names(tmp_path, kind):
    """An icon of 16 × 16 pixels may hold one of 13,300 × 13,300, which PIL would decode at once."""
    if kind == "ICO":
        inner = png(13_300, 13_300)
        content = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    else:
        Image.new("RGB", (16, 16)).save(stream := io.BytesIO(), kind)
        content = stream.getvalue()
    assert "it is damaged or no picture of PNG, JPEG, WEBP, BMP" in pictures(tmp_path, a=content).decode(0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "BMP"])  # MPO: a telephone's JPEG with a depth map
def test_pictures_are_known_by_what_they_hold(tmp_path, kind):
    Image.new("RGB", (32, 32), "white").save(stream := io.BytesIO(), kind)
    data = pictures(tmp_path, a=stream.getvalue())
    assert float(data.decode(0).min()) > 0.99


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(_folders, "_LARGE", 100)
    image = io.BytesIO()
    Image.new("L", (20, 20)).save(image, "PNG")
    data = pictures(tmp_path, **{f"a{i}": image.getvalue() for i in range(8)})
    cut, busy = _folders.Folders._cut, threading.Lock()

    def alone(self, index, image):
        assert busy.acquire(blocking=False)
        try:
            return cut(self, index, image)
        finally:
            busy.release()

    monkeypatch.setattr(_folders.Folders, "_cut", alone)
    assert data.verify(range(8), workers=8) == list(range(8))


def test_pictures_that_are_none(tmp_path):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    data = pictures(
        tmp_path,
        empty=b"",
        program=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\n",
        short=whole.getvalue()[:-900],
        text=b"no picture",
        wide=png(8, 8),
    )
    for i in range(len(data)):
        assert isinstance(data.decode(i), str) and "\n" not in data.decode(i), data._source.files[i]
    assert "no picture of PNG, JPEG, WEBP, BMP" in data.decode(1)
    with pytest.raises(InputError, match="none of 5 images can be read"):
        data.verify(range(5))


# --- Arrays -------------------------------------------------------------------------------------------------


def array(shape: str, descr: str = "'|u1'", content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + content


def npz(path, compression=zipfile.ZIP_DEFLATED, **members: bytes):
    labels = io.BytesIO()
    np.save(labels, np.arange(2))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in ({"labels": labels.getvalue()} | members).items():
            archive.writestr(f"{name}.npy", content)
    return path


def peak_of_refusal(path, match) -> int:
    """Bytes allocated while the file was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as caught:
            open_data(path, **MODEL)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = f"(2, {1 << 19}, {1 << 19})"
NPZ = {
    "huge": array(HUGE, content=bytes(100)),
    "beyond integers": array(f"({1 << 62}, {1 << 62})"),
    "wrapped around": array(f"({1 << 33}, {1 << 31}, 1)"),
    "negative": array("(2, -2, 2)", content=bytes(100)),
    "shape of text": array("('2', 2)"),
    "shape of floats": array("(2.0, 2)"),
    "deep": array("(" * 3000 + ")" * 3000),
    "digits": array("(" + "1" * 5000 + ",)"),
    "code": array("__import__('os').system('true')"),
    "no header": b"",
    "no magic": b"x" * 100,
    "version 9": array("(2, 2, 2)", version=b"\x09\x00"),
    "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b" " * (1 << 20),
    "long double": array("(2, 2, 2)", "'<f16'", bytes(128)),
    "half a row": array("(2, 2, 2)", content=bytes(7)),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", NPZ)
def test_arrays_whose_headers_lie(tmp_path, name, compression):
    path = npz(tmp_path / "a.npz", compression, images=NPZ[name])
    match = r"a.npz (is not a whole .npz file|.*dtype)|a.npz: images has the dtype"
    assert peak_of_refusal(path, match) < 8 << 20


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    for name, descr in {"objects": "'|O'", "records": "[('a', 'O')]", "texts": "'<U3'", "complex": "'<c8'"}.items():
        match = "pickled objects, which may run code" if "O" in descr else "has the dtype"
        peak_of_refusal(npz(tmp_path / f"{name}.npz", images=array("(2,)", descr, bytes(24))), match)


def test_a_stream_that_unpacks_to_more_than_a_file_can_hold(tmp_path):
    """The directory of the archive agrees with the header; both are wrong."""
    lying = array(f"(2, {1 << 15}, {1 << 15})")
    path = npz(tmp_path / "a.npz", images=lying + bytes(100))
    content = bytearray(path.read_bytes())
    size = len(lying) + (1 << 31)
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.rindex(signature)
        content[at + offset : at + offset + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    assert peak_of_refusal(path, "more than the file can hold") < 8 << 20


def test_broken_archives(tmp_path):
    good = tmp_path / "good.npz"
    np.savez_compressed(
        good, images=np.random.default_rng(0).integers(0, 256, (2, 2, 2), np.uint8), labels=np.arange(2)
    )
    assert len(open_data(good, **MODEL)) == 2
    content = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        info = archive.getinfo("images.npy")
    start = info.header_offset + 30 + len("images.npy") + 20
    encrypted = bytearray(content)
    encrypted[content.index(b"PK\x01\x02") + 8] |= 1
    broken = {
        "stream": content[:start] + b"\xff" * 40 + content[start + 40 :],
        "encrypted": bytes(encrypted),
        "half": content[: len(content) // 2],
        "empty": b"",
        "pickle": b"\x80\x04\x95",
    }
    for name, changed in broken.items():
        assert changed != content, name
        (tmp_path / "bad.npz").write_bytes(changed)
        peak_of_refusal(tmp_path / "bad.npz", "is not a whole .npz file")
    peak_of_refusal(npz(tmp_path / "lzma.npz", zipfile.ZIP_LZMA, images=array("(2, 2, 2)", content=bytes(8))), "numpy")


def safetensors(path, **tensors):
    header, data = {}, b""
    tensors = {"labels": ("I64", [2], struct.pack("<2q", 0, 1)), **tensors}
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({"images": ("F4", [2, 2, 2], bytes(4))}, "has the dtype F4"),
        ({"images": ("F6_E2M3", [2, 2, 2], bytes(6))}, "has the dtype F6|not a safetensors file"),
        ({"images": ("C64", [2, 2, 2], bytes(64))}, "has the dtype C64"),
        ({"images": ("U8", [0, 2, 2], b"")}, "has no samples"),
        ({"images": ("U8", [], b"\0")}, "has no samples"),
        ({"images": ("U8", [2, 0, 2], b"")}, r"images of shape \[0, 2\]"),
        ({"images": ("U8", [2, 2, 2], bytes(7))}, "not a safetensors file"),
        ({"labels": ("F32", [2], bytes(8)), "images": ("U8", [2, 2, 2], bytes(8))}, "expected integers"),
        ({"labels": ("I64", [], bytes(8)), "images": ("U8", [1, 2, 2], bytes(4))}, "expected integers of shape"),
        ({"images": ("U8", [1 << 62, 4], b"")}, "not a safetensors file"),
    ],
)
def test_tensors_that_cannot_be_samples(tmp_path, tensors, match):
    assert peak_of_refusal(safetensors(tmp_path / "a.safetensors", **tensors), match) < 8 << 20


def test_headers_that_are_none(tmp_path):
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 200_000) + b"[" * 200_000):
        (tmp_path / "a.safetensors").write_bytes(content)
        peak_of_refusal(tmp_path / "a.safetensors", "not a safetensors file")


@pytest.mark.parametrize("manifest", [b"", b"[" * 100_000, b'{"format": "unlearn_ext.latents.1", "indices": 3}', b"[]"])
def test_manifests_of_latents(tmp_path, manifest):
    from unlearn_ext.data.latents import _read_manifest

    (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(InputError, match="is no manifest of latents"):
        _read_manifest(tmp_path)


def test_shards_of_latents(tmp_path):
    from unlearn_ext.data.latents import _read_shards

    tensors = {"indices": ("I64", [2], bytes(16)), "latent_std": ("F32", [2], bytes(8))}
    safetensors(tmp_path / "latents-00000.safetensors", latent_mean=("F32", [], bytes(4)), **tensors)
    with pytest.raises(InputError, match="is damaged"):
        _read_shards(tmp_path)


# --- Anything -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npz", "safetensors", "png", "map"])
def test_mutated_files_are_read_or_refused(tmp_path, suffix):
    from unlearn_ext.data import read_class_map

    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (2, 2, 2), np.uint8)
    if suffix == "npz":
        np.savez_compressed(tmp_path / "a.npz", images=pixels, labels=np.arange(2))
    elif suffix == "safetensors":
        safetensors(tmp_path / "a.safetensors", images=("U8", [2, 2, 2], pixels.tobytes()))
    elif suffix == "png":
        (tmp_path / "data" / "0").mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    else:
        (tmp_path / "a.map").write_text(json.dumps({"cat": 0, "dog": "1", "é": 2}))
    file = tmp_path / f"a.{suffix}"
    content = file.read_bytes()
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(changed)))
            kind = rng.integers(4)
            if kind == 0:
                changed[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                changed[at : at + 1] = rng.bytes(int(rng.integers(1, 9)))
            elif kind == 2:
                del changed[at : at + int(rng.integers(1, 9))]
            else:
                changed[at:at] = changed[at : at + 20] * int(rng.integers(1, 5))
            if not changed:
                break
        try:
            if suffix == "png":
                (tmp_path / "data" / "0" / "x.png").write_bytes(changed)
                open_data(tmp_path / "data", size=4, channels=1, classes=1).decode(0)
            elif suffix == "map":
                file.write_bytes(changed)
                read_class_map(file, {"one": [1]})
            else:
                file.write_bytes(changed)
                data = open_data(file, **MODEL)
                for i in range(len(data)):
                    data[i]
        except InputError as error:
            assert "\n" not in str(error)
