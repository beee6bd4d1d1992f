"""A model card: what an adapter is, how it was made and how it is used, as Markdown with the Hub's front matter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from huggingface_hub import ModelCardData

from library.config.prompts import SamplePrompt

MARK = "<!-- Polyrank writes this file anew with every save; remove this line to keep it as it is. -->"
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """A sample picture; `path` is relative to the card."""

    path: str
    prompt: SamplePrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card tells."""

    title: str
    file: str  # the adapter file that was saved last
    workflow: str | None  # its ComfyUI workflow
    repository: str | None  # where it is uploaded to: user/name
    folder: str | None  # of that repository
    base_model: str  # name on the Hub
    embeds_guidance: bool
    readers: str  # the programs that load the file
    trigger_words: tuple[str, ...]
    example: SamplePrompt
    strength: float  # to begin with
    settings: Mapping[str, str]
    pictures: Sequence[ShownPicture]
    drawn_with: str  # which weights the pictures show
    # Other adapter files of the run, and what is in them
    others: Mapping[str, str] = field(default_factory=dict)
    on_the_hub: bool = True  # whether the base model is: the embedded one is not
    description: str | None = None
    usage: str | None = None
    author: str | None = None
    license: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def suits_diffusers(self) -> bool:
        """Whether diffusers loads the file."""
        return "diffusers" in self.readers


def card(facts: CardFacts) -> str:
    """The whole card."""
    parts = [
        f"---\n{_front_matter(facts)}\n---",
        MARK,
        f"# {escaped(facts.title)}",
        *_about(facts),
        *_pictures(facts.pictures, facts.drawn_with),
        "## In ComfyUI",
        _in_comfyui(facts),
        "## In diffusers",
        _in_diffusers(facts),
        "## Training",
        _table(facts.settings),
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` in one line, with nothing in it that Markdown or HTML would take as theirs."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def _front_matter(facts: CardFacts) -> str:
    """The fields by which the Hub finds, files and shows a model, as YAML."""
    widget = [
        {"text": picture.prompt.prompt or "-", "output": {"url": quote(picture.path)}}
        for picture in facts.pictures
    ]
    tags = ["text-to-image", "flux", "lora", "template:sd-lora", "polyrank"]
    if facts.suits_diffusers:
        tags.insert(1, "diffusers")
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="diffusers" if facts.suits_diffusers else None,
        pipeline_tag="text-to-image",
        license=facts.license,
        tags=list(dict.fromkeys([*tags, *facts.tags])),
        instance_prompt=", ".join(facts.trigger_words) or None,
        widget=widget or None,
    )
    text: str = data.to_yaml()
    return text


def _about(facts: CardFacts) -> list[str]:
    kind = f"An adapter for [{facts.base_model}](https://huggingface.co/{facts.base_model})"
    if not facts.on_the_hub:
        kind = f"An adapter for {facts.base_model}, the little model that Polyrank brings along to try things out"
    parts = [f"{kind}{f' by {escaped(facts.author)}' if facts.author else ''}: `{facts.file}`."]
    if facts.description:
        parts.append(escaped(facts.description))
    if facts.trigger_words:
        words = ", ".join(f"**{escaped(word)}**" for word in facts.trigger_words)
        parts.append(f"Trigger: {words}. Write it into the prompt.")
    if facts.usage:
        parts.append(escaped(facts.usage))
    if facts.others:
        listed = "; ".join(f"`{file}` holds {what}" for file, what in facts.others.items())
        parts.append(f"Used the same way: {listed}.")
    return parts


def _pictures(pictures: Sequence[ShownPicture], drawn_with: str) -> list[str]:
    if not pictures:
        return []
    parts = ["## Pictures", f"Drawn while training, with {drawn_with} of that moment."]
    for number, picture in enumerate(pictures, start=1):
        prompt = picture.prompt
        settings = (
            f"{prompt.width}x{prompt.height}, {prompt.sample_steps} steps, guidance {prompt.guidance_scale:g}"
        )
        if prompt.is_guided:
            settings += f", CFG {prompt.scale:g} against: {escaped(prompt.negative_prompt) or 'nothing'}"
        if prompt.strength != 1:
            settings += f", strength {prompt.strength:g}"
        text = escaped(prompt.prompt) or "(no prompt)"
        parts.append(f"![picture {number}]({quote(picture.path)})\n\n> {text}\n>\n> {settings}")
    return parts


def _in_comfyui(facts: CardFacts) -> str:
    text = f"Put `{facts.file}` into `models/loras`"
    if facts.workflow is not None:
        return f"{text} and open `{facts.workflow}` in ComfyUI. It begins with strength {facts.strength:g}."
    return f"{text} and add a Load LoRA node to a FLUX workflow; begin with strength {facts.strength:g}."


def _in_diffusers(facts: CardFacts) -> str:
    if not facts.suits_diffusers:
        return f"diffusers does not load this kind of adapter; {facts.readers} do."
    if not facts.on_the_hub:
        return f"{facts.base_model} is no model of the Hub. Of an adapter trained on FLUX.1, the code stands here."
    example = facts.example
    where = f'"{facts.repository}"' if facts.repository else '"."'
    if facts.repository and facts.folder:
        where += f', subfolder="{facts.folder}"'
    arguments = [
        repr(example.prompt),
        f"width={example.width}, height={example.height}, num_inference_steps={example.sample_steps}",
        f"guidance_scale={example.guidance_scale if facts.embeds_guidance else 0:g}",
    ]
    if example.is_guided:
        arguments.append(f"true_cfg_scale={example.scale:g}, negative_prompt={example.negative_prompt!r}")
    if example.seed is not None:
        arguments.append(f'generator=torch.Generator("cpu").manual_seed({example.seed})')
    listed = "\n".join(f"    {argument}," for argument in arguments)
    return f"""\
```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("{facts.base_model}", torch_dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights({where}, weight_name="{facts.file}")
image = pipeline(
{listed}
).images[0]
```"""


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {escaped(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
