"""What is opened is what it is: models that need more than a run gives them are named and refused."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pipelines
from helpers.opening import edit, refused
from safetensors.torch import load_file, save_file

import unlearn_ext
from unlearn_ext.models.conditioning import check_denoiser, check_scheduler
from unlearn_ext.models.judge import Judge
from unlearn_ext.models.pretrained import open_pretrained
from unlearn_ext.models.written import write_result

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WEIGHTS = "diffusion_pytorch_model.safetensors"


# --- Conditions ---------------------------------------------------------------------------------------------


def latent_pipeline(folder: Path) -> Path:
    """An LDMPipeline: its UNet2DModel takes the three channels of a VQ-VAE's latents."""
    vae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    unet = pipelines.small_unet(channels=3)
    diffusers.LDMPipeline(vae, unet, diffusers.DDIMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


def test_latents_of_a_vq_vae_are_not_taken_for_pictures(tmp_path):
    folder = latent_pipeline(tmp_path / "ldm")
    match = (
        r"is a LDMPipeline with a vqvae \(VQModel\), which is not supported: its denoiser works on the VQ-VAE's latents"
    )
    refused(match, open_pretrained, folder)
    refused(match, open_pretrained, folder / "unet")  # the part by itself
    (folder / "model_index.json").unlink()
    refused(r"with a vqvae \(VQModel\)", open_pretrained, folder)


@pytest.mark.parametrize(
    "part", [{"controlnet": "ControlNetModel"}, {"adapter": "T2IAdapter"}, {"text_encoder_2": "CLIPTextModel"},
             {"movq": "VQModel"}, {"prior": "PriorTransformer"}]
)  # fmt: skip
def test_parts_that_would_not_be_used(copy, part):
    source = copy("text")
    ((name, kind),) = part.items()
    edit(source / "model_index.json", **{name: ["diffusers", kind]})
    refused(f"with a {name} .{kind}., which is not supported|is not supported", open_pretrained, source)
    edit(source / "model_index.json", **{name: [None, None]})
    assert open_pretrained(source).kind == "text"


PIPELINES = {  # of the parts -> pipelines of diffusers that are made of other ones
    "text": ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "StableDiffusionUpscalePipeline", "DDPMPipeline",
             "StableDiffusionDepth2ImgPipeline", "LatentConsistencyModelPipeline", "DiTPipeline"],
    "ddpm": ["StableDiffusionPipeline", "KarrasVePipeline", "UNet2DModel"],
    "dit": ["PixArtAlphaPipeline", "FluxPipeline", "DDPMPipeline"],
}  # fmt: skip


@pytest.mark.parametrize("kind, pipeline", [(kind, name) for kind, names in PIPELINES.items() for name in names])
def test_pipelines_of_other_parts(copy, kind, pipeline):
    source = copy(kind)
    edit(source / "model_index.json", _class_name=pipeline)
    for folder in (source, source / ("transformer" if kind == "dit" else "unet")):  # and the part by itself
        refused(f"is a {pipeline} by its model_index.json, which is not supported with a .*; correct", open_pretrained,
                folder)  # fmt: skip


@pytest.mark.parametrize(
    "name, told",
    [
        ("StableDiffusionImg2ImgPipeline", None),
        ("MyPipeline", "names the pipeline MyPipeline, which diffusers does not have: its parts are taken for those"),
        (["my_pipeline", "StableDiffusionPipeline"], "names the pipeline StableDiffusionPipeline, which"),
        (None, "model_index.json names no pipeline: its parts are taken for those of a StableDiffusionPipeline"),
        ({"a": 1}, "names no pipeline"),
    ],
)
def test_pipelines_that_are_opened(copy, name, told):
    source = copy("text")
    edit(source / "model_index.json", _class_name=name)
    notes = open_pretrained(source).notes
    assert notes == () if told is None else len(notes) == 1 and told in notes[0]


@pytest.mark.parametrize(
    "part, library, name",
    [
        ("vae", "diffusers", "AutoencoderTiny"),
        ("vae", "my_code", "AutoencoderKL"),
        ("text_encoder", "transformers", "CLIPTextModelWithProjection"),
        ("text_encoder", "transformers", "T5EncoderModel"),
        ("scheduler", "my_code", "DDIMScheduler"),
        ("tokenizer", "my_code", "CLIPTokenizer"),
    ],
)
def test_parts_of_other_classes(copy, part, library, name):
    source = copy("text")
    edit(source / "model_index.json", **{part: [library, name]})
    refused(f"has a {part} that is a {name} of {library} by its model_index.json", open_pretrained, source)


@pytest.mark.parametrize("place, name, what", [("unet", WEIGHTS, "denoiser"), ("vae", WEIGHTS, "VAE"),
                                               ("text_encoder", "model.safetensors", "text encoder")])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(copy, place, name, what, value):
    source = copy("text")
    state = load_file(source / place / name)
    key = max(state)
    state[key].view(-1)[-1] = value
    save_file(state, source / place / name, {"format": "pt"})
    refused(f"the weights of the {what} in .* hold NaN or inf .*{key.split('.')[-2]}", open_pretrained, source)


def test_prompts_of_a_transformer_are_not_dropped(copy):
    source = copy("dit")
    edit(source / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    refused(r"with a text_encoder .T5EncoderModel.", open_pretrained, source)


CONDITIONS = {
    "UNet2DConditionModel": [
        ({"time_cond_proj_dim": 4}, r"a guidance scale .* \(time_cond_proj_dim = 4\)"),
        ({"addition_embed_type": "text_time"}, r"more than one prompt embedding \(SDXL"),
        ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 4}, "pictures beside"),
        ({"class_embed_type": "projection"}, "class embeddings"),
        ({"class_embed_type": "timestep"}, "class embeddings"),
        ({"num_class_embeds": 7}, "classes beside prompts"),
        ({"attention_type": "gated"}, "GLIGEN"),
        ({"dual_cross_attention": True}, "two kinds of embeddings"),
        ({"in_channels": 9}, "takes 9 channels and predicts 4: models for inpainting"),
        ({"in_channels": 7}, "takes 7 channels"),
    ],
    "UNet2DModel": [
        ({"class_embed_type": "timestep"}, "by a table of embeddings"),
        ({"in_channels": 6, "out_channels": 3}, "takes 6 channels and predicts 3"),
    ],
    "DiTTransformer2DModel": [
        ({"cross_attention_dim": 8}, "prompts"),
        ({"caption_channels": 8}, "PixArt"),
        ({"num_vector_embeds": 8}, "discrete latents"),
    ],
}
PLACES = {"UNet2DConditionModel": ("text", "unet"), "UNet2DModel": ("ddpm", "unet"),
          "DiTTransformer2DModel": ("dit", "transformer")}  # fmt: skip


@pytest.mark.parametrize("name, changes, match", [(n, *case) for n, cases in CONDITIONS.items() for case in cases])
def test_conditions_that_a_run_does_not_give(copy, name, changes, match):
    kind, place = PLACES[name]
    source = copy(kind)
    edit(source / place / "config.json", **changes)
    refused(match, open_pretrained, source)


@pytest.mark.parametrize("name", PLACES)
def test_configurations_as_the_classes_make_them(name):
    model = getattr(diffusers, name)
    small = {"UNet2DModel": pipelines.small_unet, "DiTTransformer2DModel": pipelines.small_dit}
    model = small.get(name, pipelines.small_text_unet)()
    check_denoiser(Path("x"), name, model.config)
    check_denoiser(Path("x"), name, {})


@pytest.mark.parametrize("size", ["8", 0, -8, 8.5, [8], [8, 8, 8], True, {"a": 1}])
def test_sizes_that_are_none(size):
    refused("sample_size", check_denoiser, Path("x"), "UNet2DModel", {"sample_size": size})


def test_the_sample_size_of_a_dit_is_one_number():
    refused("a DiT's is one whole number", check_denoiser, Path("x"), "DiTTransformer2DModel", {"sample_size": [8, 8]})
    check_denoiser(Path("x"), "UNet2DModel", {"sample_size": [8, 16]})


@pytest.mark.parametrize("place", ["unet", "vae", "text_encoder"])
def test_quantised_weights(copy, place):
    source = copy("text")
    edit(source / place / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(f"{place}/config.json is of quantised weights .quantization_config.", open_pretrained, source)


@pytest.mark.parametrize("key, value", [("shift_factor", 0.1), ("latents_mean", [0.5] * 4), ("scaling_factor", "1")])
def test_vaes_whose_latents_are_moved(copy, key, value):
    source = copy("dit")
    edit(source / "vae" / "config.json", **{key: value})
    refused(f"the VAE in .* has (a|the) {key}", open_pretrained, source)


def scheduler(name, **settings):
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
                                  "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}])
def test_schedulers_that_are_sampled_as_they_are(name, settings):
    check_scheduler(Path("x"), scheduler(name, **settings))


@pytest.mark.parametrize(
    "name, settings, match",
    [
        ("LCMScheduler", {}, "of a consistency model"),
        ("FlowMatchEulerDiscreteScheduler", {}, "of a flow-matching model"),
        (
            "DPMSolverMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "flow-matching",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            "the prediction_type 'flow_prediction'",
        ),
        ("UnCLIPScheduler", {}, "adds noise in another way than DDIM"),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}, "adds noise in another way than DDIM"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "leaves no signal at its last step"),
        ("EDMEulerScheduler", {}, "has no alphas_cumprod"),
    ],
)
def test_schedulers_of_other_models(name, settings, match):
    refused(match, check_scheduler, Path("x"), scheduler(name, **settings))


def test_a_rescaled_scheduler_of_a_model_that_predicts_v(copy):
    source = copy("ddpm")
    scheduler("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction").save_pretrained(
        source / "scheduler"
    )
    assert float(open_pretrained(source).scheduler.alphas_cumprod[-1]) == 0


# --- Adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json",
             "adapter_model.safetensors"]
)  # fmt: skip
@pytest.mark.parametrize("place", ["", "unet", "text_encoder"])
def test_adapters_beside_a_model(copy, name, place):
    source = copy("text")
    (source / place / name).write_bytes(b"{}")
    refused(f"holds {name}, an adapter, without which .* fuse_lora .* merge_and_unload", open_pretrained, source)


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    refused("holds adapter_config.json, an adapter", open_pretrained, tmp_path)


def test_a_classifier_with_an_adapter(tmp_path):
    pipelines.save_classifier(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("--classifier: .* an adapter", Judge, tmp_path, {0: "zero"}, (3, 16, 16))


def unmerged(state):
    name = next(name for name in state if name.endswith(("to_q.weight", "q_proj.weight")))
    base, value = name.removesuffix(".weight"), state.pop(name)
    state[f"{base}.base_layer.weight"] = value
    state[f"{base}.lora_A.default.weight"] = torch.zeros(2, value.shape[1])
    state[f"{base}.lora_B.default.weight"] = torch.zeros(value.shape[0], 2)


def older(state):
    state["mid_block.attentions.0.processor.to_q_lora.down.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("place, file, change, match", [
    ("unet", WEIGHTS, unmerged, "hold an adapter that is not merged .*to_q"),
    ("unet", WEIGHTS, older, "hold an adapter that is not merged .*to_q_lora"),
    ("text_encoder", "model.safetensors", unmerged, "hold an adapter that is not merged .*q_proj"),
    ("unet", WEIGHTS, lambda s: s.update(extra=torch.zeros(2)), "hold extra, which the model .* does not have"),
])  # fmt: skip
def test_adapters_within_the_weights(copy, place, file, change, match):
    source = copy("text")
    state = load_file(source / place / file)
    change(state)
    save_file(state, source / place / file, {"format": "pt"})
    refused(match, open_pretrained, source)


# --- Links --------------------------------------------------------------------------------------------------


def test_links_that_leave_the_folder_are_not_followed(copy, tmp_path):
    source, secret = copy("dit"), tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (source / "README.md").symlink_to(secret / "key")
    (source / "notes").symlink_to(secret)
    (source / "gone").symlink_to(tmp_path / "absent")
    (source / "inside").symlink_to(source / "vae" / "config.json")
    (source / "all").mkdir()
    (source / "all" / "deep").symlink_to(secret / "key")
    opened = open_pretrained(source)
    plan = write_result(source, opened, tmp_path / "output")
    left = {name for name, why in plan.left_out.items() if "link" in why}
    assert left == {"README.md", "notes", "gone", "all/deep"}
    assert (tmp_path / "output" / "inside").read_bytes() == (source / "vae" / "config.json").read_bytes()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["vae", "vae/config.json", "transformer/" + WEIGHTS, "model_index.json"])
def test_a_part_that_is_a_link_out_of_the_folder(copy, tmp_path, name):
    source = copy("dit")
    shutil.move(source / name, tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    refused("is a link that leaves the model's folder", open_pretrained, source)


def test_weights_are_left_out_under_every_name(copy, tmp_path):
    source = copy("bare")
    (source / "blobs").mkdir()
    shutil.move(source / WEIGHTS, source / "blobs" / "0")
    (source / WEIGHTS).symlink_to(Path("blobs", "0"))
    (source / "blobs" / "hard").hardlink_to(source / "blobs" / "0")
    (tmp_path / "link").symlink_to(source)  # the folder itself may be one
    opened = open_pretrained(tmp_path / "link")
    plan = write_result(tmp_path / "link", opened, tmp_path / "output")
    assert {"blobs/0", "blobs/hard", WEIGHTS} == plan.left_out.keys()
    assert (tmp_path / "output" / WEIGHTS).is_file() and not (tmp_path / "output" / "blobs").exists()


def test_home_is_found(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(built["bare"].parent))
    assert open_pretrained("~/bare").kind == "class"


# --- Advice -------------------------------------------------------------------------------------------------


def test_single_files_are_told_how_to_become_folders(tmp_path):
    for name in ("DiT-XL-2-256x256.pt", "old.ckpt"):
        torch.save({"x_embedder.proj.weight": torch.zeros(1)}, tmp_path / name)
        refused("may run code, and a folder .*/convert_dit_to_diffusers.py", open_pretrained, tmp_path / name)
    for name in ("v1-5.ckpt", "v1-5.safetensors"):
        state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
        (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
        refused(r"StableDiffusionPipeline.from_single_file\(", open_pretrained, tmp_path / name)
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 damaged")
    refused("convert it", open_pretrained, tmp_path / "x.ckpt")


# Functions of other libraries that messages may name -> what has them.
FUNCTIONS = {
    "from_single_file": lambda: diffusers.StableDiffusionPipeline,
    "save_pretrained": lambda: diffusers.StableDiffusionPipeline,
    "from_pretrained": lambda: diffusers.StableDiffusionPipeline,
    "load_lora_weights": lambda: diffusers.StableDiffusionPipeline,
    "fuse_lora": lambda: diffusers.StableDiffusionPipeline,
    "unload_lora_weights": lambda: diffusers.StableDiffusionPipeline,
}


def messages():
    """Every text in the package that is no docstring."""
    for path in sorted(Path(unlearn_ext.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                yield path, node.value


@pytest.mark.slow
def test_no_message_names_a_function_that_does_not_exist():
    known = set(FUNCTIONS)
    modules = {"torch": torch, "diffusers": diffusers, "transformers": transformers, "unlearn_ext": unlearn_ext}
    seen = set()
    for path, text in messages():
        for name in re.findall(r"\b\w*(?:from_|save_|load_|fuse_|unload_)(?:pretrained|single|lora)\w*", text):
            seen.add(name)
            assert name in known and hasattr(FUNCTIONS[name](), name), f"{path}: {name}"
        for module, rest in re.findall(r"\b(torch|diffusers|transformers)\.((?:\w+\.)*\w+)\(", text):
            place = modules[module]
            for part in rest.split("."):
                assert hasattr(place, part), f"{path}: {module}.{rest}"
                place = getattr(place, part)
        for kind, name in re.findall(r"\b([A-Z]\w*(?:Pipeline|Model|Scheduler))\.(\w+)\(", text):
            assert hasattr(getattr(diffusers, kind), name), f"{path}: {kind}.{name}"
    assert {"from_single_file", "fuse_lora", "save_pretrained"} <= seen
