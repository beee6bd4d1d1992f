"""Workflows for ComfyUI: the graph that draws a picture as this trainer does, with every name filled in.

`graph` is what ComfyUI's canvas loads, `prompt` what its API runs; both are made of the same nodes. Facts about nodes
(inputs, outputs, order of widgets) are those of ComfyUI's own nodes. The sampler there does the same arithmetic: Euler
steps, the times of `library.adapters.sampling` (ModelSamplingFlux with the scheduler `simple`), the seed's noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.config.prompts import SamplePrompt

BASE_SHIFT, MAX_SHIFT = 0.5, 1.15  # of FLUX.1 dev's times, for 256 and 4096 tokens
SEED_CONTROL = "control_after_generate"  # a widget of the canvas, which its server knows nothing of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """File names as ComfyUI lists them: in its folders diffusion_models, text_encoders and vae."""

    transformer: str
    clip_l: str
    t5: str
    autoencoder: str
    embeds_guidance: bool  # dev does, schnell does not


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter file in ComfyUI's folder loras."""

    file: str
    strength: float
    changes_text: bool  # it adds to a text encoder as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All that a picture is made of."""

    models: ModelNames
    adapter: Adapter | None
    prompt: SamplePrompt
    seed: int
    keeps_seed: bool  # or else ComfyUI takes another one for each picture
    prefix: str  # of the files that ComfyUI saves
    note: str  # for the reader of the graph


def prompt(scene: Scene) -> dict[str, Any]:
    """The workflow in the format of ComfyUI's API, as its server runs it."""
    return {
        str(number): {
            "class_type": node.kind,
            "inputs": {
                name: [str(value.node), value.slot] if isinstance(value, _Output) else value
                for name, value in node.values.items()
                if name != SEED_CONTROL
            },
            "_meta": {"title": node.title},
        }
        for number, node in enumerate(_nodes(scene), start=1)
    }


def graph(scene: Scene) -> dict[str, Any]:
    """The workflow in the format of ComfyUI's canvas, as it saves and loads it (version 0.4)."""
    nodes = _nodes(scene)
    links = list(_links(nodes))
    drawn = [_drawn(number, node, links) for number, node in enumerate(nodes, start=1)]
    drawn.append(
        {
            "id": len(nodes) + 1, "type": "Note", "title": "About", "pos": [-420, 0], "size": [380, 220],
            "flags": {}, "order": len(nodes), "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [scene.note],
        }
    )  # fmt: skip
    return {
        "last_node_id": len(drawn), "last_link_id": len(links), "nodes": drawn, "links": [list(link) for link in links],
        "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kind:
    """A class of nodes: sockets by name and type, widgets in the order in which the canvas keeps their values."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    widgets: tuple[str, ...] = ()


_MODEL, _CLIP, _COND = {"model": "MODEL"}, {"clip": "CLIP"}, {"CONDITIONING": "CONDITIONING"}
_KINDS: Mapping[str, _Kind] = {
    "UNETLoader": _Kind({}, {"MODEL": "MODEL"}, ("unet_name", "weight_dtype")),
    "DualCLIPLoader": _Kind({}, {"CLIP": "CLIP"}, ("clip_name1", "clip_name2", "type")),
    "VAELoader": _Kind({}, {"VAE": "VAE"}, ("vae_name",)),
    "LoraLoaderModelOnly": _Kind(_MODEL, {"MODEL": "MODEL"}, ("lora_name", "strength_model")),
    "LoraLoader": _Kind(
        {**_MODEL, **_CLIP}, {"MODEL": "MODEL", "CLIP": "CLIP"}, ("lora_name", "strength_model", "strength_clip")
    ),
    "CLIPTextEncode": _Kind(_CLIP, _COND, ("text",)),
    "FluxGuidance": _Kind({"conditioning": "CONDITIONING"}, _COND, ("guidance",)),
    "ModelSamplingFlux": _Kind(_MODEL, {"MODEL": "MODEL"}, ("max_shift", "base_shift", "width", "height")),
    "EmptySD3LatentImage": _Kind({}, {"LATENT": "LATENT"}, ("width", "height", "batch_size")),
    "KSampler": _Kind(
        {**_MODEL, "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"LATENT": "LATENT"},
        ("seed", SEED_CONTROL, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    ),
    "VAEDecode": _Kind({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
    "SaveImage": _Kind({"images": "IMAGE"}, {}, ("filename_prefix",)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Output:
    """An output of a node, by the node's number (from 1)."""

    node: int
    slot: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One node: values of its widgets and what its inputs are linked to, by name."""

    kind: str
    values: Mapping[str, object]
    title: str
    place: tuple[int, int]  # column and row on the canvas


# id, from node, from slot, to node, to slot, type
_Link = tuple[int, int, int, int, int, str]


def _nodes(scene: Scene) -> Sequence[_Node]:
    """The nodes in an order in which each comes after those it reads from; the n-th has number n, from 1."""
    nodes: list[_Node] = []
    wanted, names, adapter = scene.prompt, scene.models, scene.adapter

    def add(kind: str, place: tuple[int, int], title: str, **values: object) -> _Output:
        nodes.append(_Node(kind=kind, values=values, title=title, place=place))
        return _Output(len(nodes))

    model = add("UNETLoader", (0, 0), "FLUX.1", unet_name=names.transformer, weight_dtype="default")
    clip = add(
        "DualCLIPLoader", (0, 1), "Text encoders", clip_name1=names.t5, clip_name2=names.clip_l, type="flux"
    )
    vae = add("VAELoader", (0, 2), "Autoencoder", vae_name=names.autoencoder)
    if adapter is not None:
        values: dict[str, object] = {"lora_name": adapter.file, "strength_model": adapter.strength}
        if adapter.changes_text:
            values |= {"clip": clip, "strength_clip": adapter.strength}
            model = add("LoraLoader", (1, 0), "LoRA", model=model, **values)
            clip = _Output(model.node, 1)
        else:
            model = add("LoraLoaderModelOnly", (1, 0), "LoRA", model=model, **values)
    size: dict[str, object] = {"width": wanted.width, "height": wanted.height}
    if names.embeds_guidance:  # schnell's times are not shifted
        shifts: dict[str, object] = {"max_shift": MAX_SHIFT, "base_shift": BASE_SHIFT}
        model = add("ModelSamplingFlux", (2, 0), "Times by size", model=model, **shifts, **size)
    unwanted = wanted.negative_prompt if wanted.is_guided else ""
    texts = []
    for row, title, text in ((1, "Prompt", wanted.prompt), (2, "Negative prompt", unwanted)):
        cond = add("CLIPTextEncode", (2, row), title, clip=clip, text=_unweighted(text))
        if names.embeds_guidance and (row == 1 or wanted.is_guided):
            cond = add(
                "FluxGuidance", (3, row), "Guidance", conditioning=cond, guidance=wanted.guidance_scale
            )
        texts.append(cond)
    latents = add(
        "KSampler", (4, 0), "Sampler", model=model, positive=texts[0], negative=texts[1],
        latent_image=add("EmptySD3LatentImage", (3, 0), "Size", batch_size=1, **size),
        seed=scene.seed, control_after_generate="fixed" if scene.keeps_seed else "randomize",
        steps=wanted.sample_steps, cfg=wanted.scale, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    image = add("VAEDecode", (5, 0), "Decode", samples=latents, vae=vae)
    add("SaveImage", (5, 1), "Save", images=image, filename_prefix=scene.prefix)
    return nodes


def _unweighted(text: str) -> str:
    """`text` such that ComfyUI takes its brackets as letters: here they give no word more weight."""
    return text.replace("(", "\\(").replace(")", "\\)")


def _links(nodes: Sequence[_Node]) -> Iterator[_Link]:
    number = 0
    for target, node in enumerate(nodes, start=1):
        for slot, (name, kind) in enumerate(_KINDS[node.kind].inputs.items()):
            source = node.values[name]
            assert isinstance(source, _Output), f"{node.kind}.{name} is linked to nothing"
            number += 1
            yield number, source.node, source.slot, target, slot, kind


def _drawn(number: int, node: _Node, links: Sequence[_Link]) -> dict[str, Any]:
    """One node as the canvas has it."""
    kind, (column, row) = _KINDS[node.kind], node.place
    into = {link[4]: link[0] for link in links if link[3] == number}
    inputs = [{"name": n, "type": t, "link": into[slot]} for slot, (n, t) in enumerate(kind.inputs.items())]
    outputs = [
        {
            "name": n, "type": t, "slot_index": slot,
            "links": [link[0] for link in links if link[1:3] == (number, slot)],
        }
        for slot, (n, t) in enumerate(kind.outputs.items())
    ]  # fmt: skip
    return {
        "id": number, "type": node.kind, "title": node.title, "pos": [column * 380, row * 300], "size": [340, 240],
        "flags": {}, "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
        "properties": {"Node name for S&R": node.kind}, "widgets_values": [node.values[name] for name in kind.widgets],
    }  # fmt: skip
