"""Model cards: front matter that the Hub reads, and text that stays text."""

from __future__ import annotations

from dataclasses import replace

import yaml

from library.config.prompts import SamplePrompt
from library.files.model_card import DEV, SCHNELL, CardFacts, ShownPicture, card, escaped

PROMPT = SamplePrompt(
    index=0,
    prompt='a "cat" <script>',
    negative_prompt="dog's",
    width=832,
    height=1216,
    seed=5,
    scale=2.0,
    strength=0.5,
)
FACTS = CardFacts(
    title="My *cat*", file="my cat.safetensors", workflow="my cat.workflow.json", repository=None, folder=None,
    base_model=DEV, embeds_guidance=True, readers="ComfyUI, Forge and diffusers", trigger_words=("ohwx", "cat: a"),
    example=PROMPT, strength=0.8, settings={"rank": "16", "network arguments": "a|b"},
    pictures=(ShownPicture("sample/my cat (1).png", PROMPT),), drawn_with="the weights",
)  # fmt: skip


def front_matter(text: str) -> dict[str, object]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    facts = yaml.safe_load(front)
    assert isinstance(facts, dict)
    return facts


def test_the_hub_finds_base_trigger_and_pictures():
    facts = front_matter(card(FACTS))
    assert facts["base_model"] == DEV
    assert facts["library_name"] == "diffusers"
    assert facts["pipeline_tag"] == "text-to-image"
    assert facts["instance_prompt"] == "ohwx, cat: a"
    assert facts["widget"] == [{"text": PROMPT.prompt, "output": {"url": "sample/my%20cat%20%281%29.png"}}]
    assert "license" not in facts


def test_what_users_wrote_is_shown_as_they_wrote_it():
    text = card(FACTS)
    assert "# My \\*cat\\*" in text
    assert '> a "cat" \\<script\\>' in text
    assert "<script>" not in text.split("---\n", 2)[2].replace("'a \"cat\" <script>'", "")
    assert "| network arguments | a\\|b |" in text
    assert "CFG 2 against: dog's, strength 0.5" in text
    assert escaped("two\nlines #1") == "two lines \\#1"


def test_the_code_for_diffusers_is_python_that_says_what_was_drawn():
    code = card(FACTS).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'true_cfg_scale=2, negative_prompt="dog\'s"' in code
    assert "manual_seed(5)" in code
    assert 'load_lora_weights(".", weight_name="my cat.safetensors")' in code
    schnell = card(replace(FACTS, base_model=SCHNELL, embeds_guidance=False, repository="me/cat"))
    assert "guidance_scale=0," in schnell
    assert 'load_lora_weights("me/cat", weight_name=' in schnell
    inside = card(replace(FACTS, repository="me/cat", folder="runs"))
    assert 'load_lora_weights("me/cat", subfolder="runs", weight_name="my cat.safetensors")' in inside


def test_a_file_that_diffusers_does_not_load_is_not_called_one():
    text = card(replace(FACTS, readers="ComfyUI and Forge", pictures=(), workflow=None, trigger_words=()))
    facts = front_matter(text)
    assert not {"library_name", "widget", "instance_prompt"} & facts.keys()
    assert "diffusers" not in facts["tags"]
    assert "diffusers does not load this kind of adapter; ComfyUI and Forge do." in text
    assert "add a Load LoRA node" in text
    assert "## Pictures" not in text


def test_the_embedded_model_is_not_looked_for_on_the_hub():
    text = card(replace(FACTS, base_model="polyrank/tiny-flux", on_the_hub=False))
    assert "huggingface.co/polyrank" not in text
    assert "from_pretrained" not in text
    assert "is no model of the Hub" in text
