"""What a model file is, from its header alone: kind, layout, sizes.

Mixing up the four files of FLUX.1 is the most common mistake with them, and it otherwise shows as missing
keys minutes later. A kind is known by tensors that only it has; a table lists them. A checkpoint may hold
several models; then each part is found by its prefix. Nothing but headers and config.json files is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import CheckpointError
from library.files.safetensors import Header, TensorInfo, read_header, similar_name
from library.models import key_maps
from library.models.key_maps import Recipe
from library.models.params import AutoEncoderParams, ClipParams, FluxParams, Shapes, T5Params

Params = FluxParams | AutoEncoderParams | ClipParams | T5Params

# In words: what a file of the kind is, and the option it belongs to if there is one.
KINDS: Mapping[str, tuple[str, str | None]] = {
    "flux": ("a FLUX.1 transformer", "pretrained_model_name_or_path"),
    "ae": ("a FLUX.1 autoencoder", "ae"),
    "clip_l": ("a CLIP-L text encoder", "clip_l"),
    "t5xxl": ("a T5 text encoder", "t5xxl"),
    "clip_g": ("a CLIP-G text encoder, which FLUX.1 does not use", None),
    "lora": ("a LoRA or LyCORIS adapter", "network_weights"),
    "chroma": ("a Chroma transformer", "pretrained_model_name_or_path with model_type = chroma"),
    "flux2": ("a FLUX.2 transformer, which is not supported", None),
    "sd_vae": ("the autoencoder of Stable Diffusion, with 4 latent channels instead of 16", None),
    "sd15": ("a Stable Diffusion 1 or 2 model, which this trainer does not train", None),
    "sdxl": ("an SDXL model, which this trainer does not train", None),
    "sd3": ("a Stable Diffusion 3 model, which this trainer does not train", None),
    "nf4": ("a 4-bit quantised model; use the bf16 or fp8 version", None),
    "unknown": ("of a kind that is not known here", None),
}

_SUBFOLDERS: Mapping[str, str] = {
    "flux": "transformer",
    "ae": "vae",
    "clip_l": "text_encoder",
    "t5xxl": "text_encoder_2",
}
_SHARD = re.compile(r"^(?P<stem>.*-)(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.safetensors)$")
_ADAPTER = re.compile(r".*(lora_(up|down|A|B)\b|lokr_w|hada_w|\.oft_|dora_scale|lora_unet_|\.diff(_b)?$)")

# Signatures, tried in order: (kind, layout, what must be true of the names and shapes).
Test = Callable[[Shapes], bool]


def _has(*names: str) -> Test:
    return lambda shapes: all(name in shapes for name in names)


def _wide(name: str, axis: int, size: int) -> Test:
    return lambda shapes: name in shapes and len(shapes[name]) > axis and shapes[name][axis] == size


_CLIP = "encoder.layers.0.self_attn.k_proj.weight"
_SIGNATURES: tuple[tuple[str, str, Test], ...] = (
    ("lora", "adapter", lambda shapes: any(_ADAPTER.match(name) for name in shapes)),
    ("nf4", "bitsandbytes", lambda shapes: any("bitsandbytes__" in name for name in shapes)),
    ("chroma", "bfl", lambda shapes: any(name.startswith("distilled_guidance_layer.") for name in shapes)),
    ("flux2", "bfl", _has("double_stream_modulation_img.lin.weight")),
    (
        "flux",
        "bfl",
        _has("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight", "img_in.weight"),
    ),
    ("sd3", "mmdit", _has("joint_blocks.0.x_block.attn.qkv.weight")),
    ("sd3", "diffusers", _has("transformer_blocks.0.attn.add_k_proj.weight", "pos_embed.proj.weight")),
    (
        "flux",
        "diffusers",
        _has("transformer_blocks.0.attn.add_k_proj.weight", "time_text_embed.text_embedder.linear_1.weight"),
    ),
    ("sdxl", "ldm", _has("input_blocks.0.0.weight", "label_emb.0.0.weight")),
    ("sd15", "ldm", _has("input_blocks.0.0.weight")),
    ("sdxl", "diffusers", _has("down_blocks.1.attentions.0.proj_in.weight", "add_embedding.linear_1.weight")),
    ("sd15", "diffusers", _has("down_blocks.0.attentions.0.proj_in.weight", "conv_in.weight")),
    ("sd_vae", "ldm", _wide("decoder.conv_in.weight", 1, 4)),
    ("ae", "bfl", _has("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight")),
    ("ae", "diffusers", _has("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight")),
    ("clip_g", "transformers", _wide(f"text_model.{_CLIP}", 0, 1280)),
    ("clip_g", "transformers", _wide(_CLIP, 0, 1280)),
    ("clip_g", "open_clip", _has("transformer.resblocks.0.attn.in_proj_weight")),
    ("clip_l", "transformers", _has(f"text_model.{_CLIP}")),
    ("clip_l", "transformers 5", _has(_CLIP, "embeddings.token_embedding.weight")),
    ("t5xxl", "transformers", _has("encoder.block.0.layer.0.SelfAttention.q.weight")),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One model inside a file or folder."""

    kind: str
    layout: str
    headers: tuple[Header, ...]  # the files it lies in
    tensors: Mapping[str, tuple[int, str]]  # name without prefix: (index into headers, stored name)
    settings: Mapping[str, object]  # config.json or the metadata entry `config`, or empty

    def info(self, name: str) -> TensorInfo:
        """What the header says of the tensor `name`."""
        index, stored = self.tensors[name]
        return self.headers[index].tensors[stored]

    def recipes(self) -> dict[str, Recipe]:
        """Our tensor names, each with what it is made of: in our own layout, of itself."""
        if self.layout == "diffusers" and self.kind == "flux":
            return key_maps.flux_recipes(self.tensors)
        if self.layout == "diffusers" and self.kind == "ae":
            return key_maps.autoencoder_recipes_for(self.tensors)
        needed = [name for name in self.tensors if not key_maps.is_unused(self.kind, name)]
        if self.kind in ("clip_l", "t5xxl"):
            return {key_maps.text_encoder_name(self.kind, name): Recipe((name,)) for name in needed}
        return {name: Recipe((name,)) for name in needed}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes under our names, of the tensors whose sources are all there."""
        result = {}
        for ours, recipe in self.recipes().items():
            if all(source in self.tensors for source in recipe.sources):
                parts = [self.info(source).shape for source in recipe.sources]
                result[ours] = (sum(part[0] for part in parts), *parts[0][1:]) if parts[0] else ()
        return result

    def params(self) -> Params:
        """Sizes of the model.

        Raises:
            CheckpointError: a tensor that tells a size is missing.
        """
        make = _PARAMS[self.kind]
        try:
            return make(self.shapes(), self.settings)
        except KeyError as error:
            raise CheckpointError(
                f"{self.headers[0].path} looks like {KINDS[self.kind][0]} but lacks {error}."
            ) from None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What lies at a path. `kind` is a key of `KINDS`; a checkpoint of several models has several parts."""

    path: Path
    kind: str
    parts: Mapping[str, Part]  # by kind

    @property
    def layout(self) -> str:
        """Naming of the main part's tensors: bfl, diffusers, transformers, ..."""
        return self.parts[self.kind].layout

    @property
    def variant(self) -> str:
        """ "schnell" for a transformer without guidance embedding, "dev" for one with; "" for other kinds."""
        if self.kind != "flux":
            return ""
        names = self.parts["flux"].tensors
        return "dev" if any("guidance_in." in n or "guidance_embedder." in n for n in names) else "schnell"

    @property
    def dtypes(self) -> frozenset[str]:
        """Number formats of the main part's tensors, as the format names them: BF16, F8_E4M3, ..."""
        part = self.parts[self.kind]
        return frozenset(part.info(name).dtype for name in part.tensors)


_PARAMS: Mapping[str, Callable[[Shapes, Mapping[str, object]], Params]] = {
    "flux": FluxParams.from_shapes,
    "ae": AutoEncoderParams.from_shapes,
    "clip_l": ClipParams.from_shapes,
    "t5xxl": T5Params.from_shapes,
}


def inspect(path: Path, *, component: str = "flux") -> CheckpointInfo:
    """Say what lies at `path`: a file, one shard of several, or a folder (then its `component` is looked at).

    Raises:
        CheckpointError: nothing there, or something that is no safetensors file.
    """
    headers = tuple(read_header(file) for file in model_files(path, component=component))
    places = {name: index for index, header in enumerate(headers) for name in header.tensors}
    settings = _settings(headers[0])
    parts: dict[str, Part] = {}
    for part_name, names in key_maps.split_parts(places).items():
        tensors = {bare: (places[stored], stored) for bare, stored in names.items()}
        shapes = {bare: headers[index].tensors[stored].shape for bare, (index, stored) in tensors.items()}
        kind, layout = next(((k, layout) for k, layout, test in _SIGNATURES if test(shapes)), ("unknown", ""))
        if kind not in parts:
            parts[kind] = Part(kind, layout, headers, tensors, settings if part_name == "main" else {})
    order = [kind for kind in KINDS if kind in parts]
    return CheckpointInfo(path=path, kind=order[0] if order else "unknown", parts=parts)


def require(path: Path, kind: str, option: str) -> Part:
    """The model of `kind` at `path`, which `option` names.

    Raises:
        CheckpointError: something else lies there; one sentence says what it looks like and where it belongs.
    """
    info = inspect(path, component=kind)
    if kind in info.parts:
        return info.parts[kind]
    what, home = KINDS[info.kind]
    advice = f"; give it as --{home}" if home else f"; --{option} needs {KINDS[kind][0]}"
    raise CheckpointError(f"--{option} {path} is {what}{advice}.")


def model_files(path: Path, *, component: str = "flux") -> list[Path]:
    """The safetensors files that make up the model at `path`, in order.

    A folder is a diffusers repository, one of its subfolders, or any folder with the shards of one model. A
    shard stands for all its siblings.
    """
    if path.is_dir():
        return _folder_files(path, component)
    match = _SHARD.match(path.name)
    if match is None:
        return [path]
    total = int(match["total"])
    shards = [
        path.with_name(f"{match['stem']}{number:05d}-of-{match['total']}{match['suffix']}")
        for number in range(1, total + 1)
    ]
    return _all_there(shards, path)


def _folder_files(folder: Path, component: str) -> list[Path]:
    inner = folder / _SUBFOLDERS.get(component, ".")
    place = inner if inner.is_dir() else folder
    for index in sorted(place.glob("*.safetensors.index.json")):
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        return _all_there([place / name for name in names], index)
    files = sorted(file for file in place.glob("*.safetensors") if file.is_file())
    whole = [
        file for file in files if file.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")
    ]
    if whole:
        return whole[:1]
    shards = [file for file in files if _SHARD.match(file.name)]
    if shards:
        return model_files(shards[0])
    if len(files) == 1:
        return files
    problem = "several .safetensors files; name the one to use" if files else "no .safetensors file"
    raise CheckpointError(f"The folder {place} has {problem}.")


def _all_there(files: list[Path], named: Path) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing and not named.exists():
        raise CheckpointError(f"{named} does not exist.{similar_name(named)}")
    if missing or not files:
        lacking = ", ".join(missing[:3]) or "every file"
        raise CheckpointError(
            f"{named} belongs to a model of {len(files)} files, of which {len(missing)} are missing "
            f"({lacking}); download them as well."
        )
    return files


def _settings(header: Header) -> Mapping[str, object]:
    """config.json beside the file, or the JSON in the metadata entry `config`, which wins."""
    if "config" in header.metadata:
        try:
            content = json.loads(header.metadata["config"])
        except ValueError:
            content = None
        if isinstance(content, dict):
            return content
    beside = header.path.with_name("config.json")
    return _json(beside) if beside.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from None
    return content if isinstance(content, dict) else {}
