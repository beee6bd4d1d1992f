"""What a sample picture says of itself, in the PNG chunks that other programs read.

`parameters` is the text that AUTOMATIC1111's and Forge's web UI write and that Civitai and ComfyUI read; `prompt` and
`workflow` are ComfyUI's, which loads the workflow of a picture that is dropped on its canvas.
"""

from __future__ import annotations

import json
from pathlib import PurePath

from PIL.PngImagePlugin import PngInfo

import library
from library.files import comfyui
from library.files.comfyui import Scene


def png_text(scene: Scene) -> PngInfo:
    """The chunks of a picture drawn as `scene` says."""
    chunks = PngInfo()
    chunks.add_text("parameters", parameters(scene))
    chunks.add_text("prompt", json.dumps(comfyui.prompt(scene)))
    chunks.add_text("workflow", json.dumps(comfyui.graph(scene)))
    return chunks


def parameters(scene: Scene) -> str:
    """Prompt, negative prompt and settings as text."""
    wanted, adapter = scene.prompt, scene.adapter
    network = f" <lora:{PurePath(adapter.file).stem}:{adapter.strength:g}>" if adapter else ""
    settings: dict[str, object] = {
        "Steps": wanted.sample_steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{wanted.scale:g}",
    }
    if scene.models.embeds_guidance:
        settings["Distilled CFG Scale"] = f"{wanted.guidance_scale:g}"
    settings |= {
        "Seed": scene.seed,
        "Size": f"{wanted.width}x{wanted.height}",
        "Model": PurePath(scene.models.transformer).stem,
        "Version": f"polyrank/{library.__version__}",
    }
    unwanted = (
        [f"Negative prompt: {wanted.negative_prompt}"] if wanted.is_guided and wanted.negative_prompt else []
    )
    last = ", ".join(f"{name}: {value}" for name, value in settings.items())
    return "\n".join([wanted.prompt + network, *unwanted, last])
