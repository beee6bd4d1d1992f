"""Workflows against what ComfyUI knows of its nodes: sockets, links, widgets; and the text that a picture carries."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.adapters.sampling import schedule_for
from library.config.prompts import SamplePrompt
from library.files import comfyui
from library.files.comfyui import Adapter, ModelNames, Scene
from library.files.picture_text import parameters, png_text

DATA = Path(__file__).parents[1] / "data" / "comfyui" / "nodes.json"
NODES: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))

DEV = Scene(
    models=ModelNames(
        transformer="flux1-dev.safetensors", clip_l="clip_l.safetensors", t5="t5xxl_fp16.safetensors",
        autoencoder="ae.safetensors", embeds_guidance=True,
    ),
    adapter=Adapter("cat-000002.safetensors", 0.8, False),
    prompt=SamplePrompt(
        index=0, prompt="ohwx cat (asleep)", width=832, height=1216, sample_steps=28, guidance_scale=2.5
    ),
    seed=2**32 - 1, keeps_seed=True, prefix="cat-000002", note="about",
)  # fmt: skip
SCENES = {
    "dev": DEV,
    "guided": replace(DEV, prompt=replace(DEV.prompt, scale=3.0, negative_prompt="dog"), keeps_seed=False),
    "with text encoders": replace(DEV, adapter=Adapter("cat.safetensors", 1.0, True)),
    "no adapter": replace(DEV, adapter=None),
    "schnell": replace(DEV, models=replace(DEV.models, embeds_guidance=False)),
}


def kinds(workflow: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Inputs of the nodes of a workflow of the API, by class."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in workflow.values():
        found.setdefault(node["class_type"], []).append(node["inputs"])
    return found


def check_widget(value: object, allowed: object) -> None:
    """A widget's value is one that ComfyUI takes."""
    if isinstance(allowed, list):
        assert value in allowed
    elif isinstance(allowed, dict):
        assert isinstance(value, int | float)
        assert allowed["min"] <= value <= allowed["max"]
        assert "step" not in allowed or (isinstance(value, int) and value % allowed["step"] == 0)
    else:
        assert isinstance(value, str)
        assert allowed == "text" or value.endswith(".safetensors")


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_the_graph_is_one_that_the_canvas_loads(scene: Scene):
    graph = json.loads(json.dumps(comfyui.graph(scene)))
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"])
    assert len(links) == len(graph["links"])
    assert graph["last_node_id"] == max(nodes)
    assert graph["last_link_id"] == max(links)
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for number, source, out_slot, target, in_slot, kind in links.values():
        output, input_ = nodes[source]["outputs"][out_slot], nodes[target]["inputs"][in_slot]
        assert output["type"] == input_["type"] == kind
        assert number in output["links"]
        assert number == input_["link"]
        assert nodes[source]["order"] < nodes[target]["order"]
    drawn = [node for node in nodes.values() if node["type"] != "Note"]
    for node in drawn:
        known = NODES[node["type"]]
        assert {socket["name"]: socket["type"] for socket in node["inputs"]} == known["inputs"]
        assert [socket["type"] for socket in node["outputs"]] == known["outputs"]
        assert all(links[socket["link"]][3] == node["id"] for socket in node["inputs"])
        for slot, socket in enumerate(node["outputs"]):
            assert all(tuple(links[link][1:3]) == (node["id"], slot) for link in socket["links"])
        assert any(socket["links"] for socket in node["outputs"]) or node["type"] == "SaveImage"
        for (_, allowed), value in zip(known["widgets"], node["widgets_values"], strict=True):
            check_widget(value, allowed)
    places = [tuple(node["pos"]) for node in nodes.values()]
    assert len(set(places)) == len(places), "nodes lie upon one another"


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_the_graph_and_the_prompt_are_the_same_workflow(scene: Scene):
    """The canvas makes the API's format of its graph by the widgets' order; so does this."""
    graph, made = comfyui.graph(scene), {}
    links = {link[0]: link for link in graph["links"]}
    for node in graph["nodes"]:
        if node["type"] == "Note":
            continue
        names = [name for name, _ in NODES[node["type"]]["widgets"]]
        values = dict(zip(names, node["widgets_values"], strict=True))
        values.pop("control_after_generate", None)
        for socket in node["inputs"]:
            _, source, slot, *_ = links[socket["link"]]
            values[socket["name"]] = [str(source), slot]
        made[str(node["id"])] = {
            "class_type": node["type"], "inputs": values, "_meta": {"title": node["title"]},
        }  # fmt: skip
    assert comfyui.prompt(scene) == made


def test_everything_that_makes_the_picture_is_filled_in():
    found = kinds(comfyui.prompt(DEV))
    assert found["UNETLoader"] == [{"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}]
    (clip,) = found["DualCLIPLoader"]
    assert clip == {
        "clip_name1": "t5xxl_fp16.safetensors",
        "clip_name2": "clip_l.safetensors",
        "type": "flux",
    }
    assert found["VAELoader"] == [{"vae_name": "ae.safetensors"}]
    (lora,) = found["LoraLoaderModelOnly"]
    assert (lora["lora_name"], lora["strength_model"]) == ("cat-000002.safetensors", 0.8)
    (sampler,) = found["KSampler"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (2**32 - 1, 28, 1.0)
    assert [one["guidance"] for one in found["FluxGuidance"]] == [2.5]
    for kind in ("EmptySD3LatentImage", "ModelSamplingFlux"):
        assert [(one["width"], one["height"]) for one in found[kind]] == [(832, 1216)]
    # Brackets would weigh the word there, which they do not here.
    assert [one["text"] for one in found["CLIPTextEncode"]] == ["ohwx cat \\(asleep\\)", ""]


def test_what_depends_on_the_scene():
    guided = kinds(comfyui.prompt(SCENES["guided"]))
    assert [one["text"] for one in guided["CLIPTextEncode"]][1] == "dog"
    assert [one["guidance"] for one in guided["FluxGuidance"]] == [2.5, 2.5]
    assert guided["KSampler"][0]["cfg"] == 3.0
    both = comfyui.prompt(SCENES["with text encoders"])
    (number,) = (key for key, node in both.items() if node["class_type"] == "LoraLoader")
    assert [one["clip"] for one in kinds(both)["CLIPTextEncode"]] == [[number, 1]] * 2
    assert kinds(both)["LoraLoader"][0]["strength_clip"] == 1.0
    assert not {"LoraLoader", "LoraLoaderModelOnly"} & kinds(comfyui.prompt(SCENES["no adapter"])).keys()
    assert not {"FluxGuidance", "ModelSamplingFlux"} & kinds(comfyui.prompt(SCENES["schnell"])).keys()


@pytest.mark.parametrize(("width", "height", "steps"), [(1024, 1024, 20), (512, 768, 28), (64, 64, 4)])
def test_the_nodes_times_are_those_of_our_sampler(width: int, height: int, steps: int):
    """ModelSamplingFlux shifts by a line through its two shifts; `simple` picks equal distances of 10,000 times."""
    scene = replace(
        DEV, prompt=SamplePrompt(index=0, prompt="a", width=width, height=height, sample_steps=steps)
    )
    (node,) = kinds(comfyui.prompt(scene))["ModelSamplingFlux"]
    slope = (node["max_shift"] - node["base_shift"]) / (4096 - 256)
    mu = node["base_shift"] + slope * (width * height / 16 / 16 - 256)
    stretch = 2.718281828459045**mu
    table = [stretch / (stretch + 10_000 / index - 1) for index in range(1, 10_001)]
    picked = [table[-(1 + int(step * len(table) / steps))] for step in range(steps)]
    assert picked == pytest.approx(schedule_for(scene.prompt)[:-1], abs=1e-3)


def test_the_text_of_parameters_is_that_of_the_web_uis():
    assert parameters(DEV).split("\n") == [
        "ohwx cat (asleep) <lora:cat-000002:0.8>",
        "Steps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 2.5, "
        "Seed: 4294967295, Size: 832x1216, Model: flux1-dev, Version: polyrank/0.1.0",
    ]
    guided = parameters(SCENES["guided"]).split("\n")
    assert guided[1] == "Negative prompt: dog"
    assert "CFG scale: 3, Distilled" in guided[2]
    assert "Distilled" not in parameters(SCENES["schnell"])
    assert "<lora" not in parameters(SCENES["no adapter"])


def test_a_png_gives_back_what_it_carries():
    scene = replace(DEV, prompt=replace(DEV.prompt, prompt="猫, café"))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png", pnginfo=png_text(scene))
    text = Image.open(io.BytesIO(file.getvalue())).text
    assert text.keys() == {"parameters", "prompt", "workflow"}
    assert text["parameters"].startswith("猫, café <lora:")
    assert json.loads(text["prompt"]) == comfyui.prompt(scene)
    assert json.loads(text["workflow"]) == comfyui.graph(scene)
    assert b"tEXtworkflow" in file.getvalue(), "ComfyUI reads the plain chunk"
