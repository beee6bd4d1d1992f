"""Prompt files: reference lines, forms seen in real runs, and what is reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.config.prompts import SamplePrompt, load_prompts
from library.errors import ConfigError

LINES = json.loads((Path(__file__).parent / "data/prompts/lines.json").read_text())
# In the reference's dictionary, but of no effect on FLUX and so not kept
DROPPED = {"sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"}


@pytest.mark.parametrize("case", LINES, ids=lambda case: case["line"][:20])
def test_lines_equal_the_reference(case):
    (prompt,) = load_prompts([case["line"]]).prompts
    kept = {key: value for key, value in case["parsed"].items() if key not in DROPPED}
    assert prompt == SamplePrompt(index=0, **kept)


def test_defaults_are_kohyas():
    assert load_prompts("a cat").prompts == (
        SamplePrompt(
            index=0,
            prompt="a cat",
            negative_prompt="",
            width=512,
            height=512,
            seed=None,
            sample_steps=20,
            scale=1.0,
            guidance_scale=3.5,
            strength=1.0,
        ),
    )


def test_txt_skips_blank_lines_and_comments_even_indented_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# first\n\n  a cat --w 832 --h 1216  \n   # second\nein Käfer --S 8\r\n".encode())
    first, second = load_prompts(str(file)).prompts
    assert (first.prompt, first.width, first.height, first.index) == ("a cat", 832, 1216, 0)
    assert (second.prompt, second.sample_steps, second.index) == ("ein Käfer", 8, 1)


def test_toml_subsets_share_and_override(tmp_path):
    file = tmp_path / "prompts.toml"
    file.write_text(
        '[prompt]\nwidth = 640\nscale = 2\nguidance_scale = 1.0\nnegative_prompt = "bad"\n'
        '[[prompt.subset]]\nprompt = "a"\nseed = 3\n[[prompt.subset]]\nprompt = "b"\nwidth = 320\n'
    )
    assert load_prompts(file).prompts == (
        SamplePrompt(
            index=0, prompt="a", seed=3, width=640, scale=2.0, guidance_scale=1.0, negative_prompt="bad"
        ),
        SamplePrompt(index=1, prompt="b", width=320, scale=2.0, guidance_scale=1.0, negative_prompt="bad"),
    )
    file.write_text('[prompt]\nprompt = "alone"\n')
    assert load_prompts(file).prompts == (SamplePrompt(index=0, prompt="alone"),)


def test_json_takes_texts_and_objects(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps(["a --d 1", {"prompt": "b --d 1", "sample_steps": 5000, "sample_sampler": "euler"}])
    )
    loaded = load_prompts(file)
    assert loaded.prompts == (
        SamplePrompt(index=0, prompt="a", seed=1),
        SamplePrompt(index=1, prompt="b --d 1", sample_steps=1000),
    )
    assert [notice.split(": ", 1)[1] for notice in loaded.notices] == ["sample_sampler has no effect on FLUX"]


def test_keys_of_other_programs_are_named_with_what_they_may_mean(tmp_path):
    file = tmp_path / "prompts.json"
    entry = {"prompt": "a", "cfg": 3, "steps": 4, "widht": 64, "lora": "x", "scale": 2}
    file.write_text(json.dumps([entry]))
    notices = [notice.split(": ", 1)[1] for notice in load_prompts(file).notices]
    assert notices[0].endswith(
        "did you mean scale (classifier-free guidance) or guidance_scale (FLUX dev's distilled guidance)?"
    )
    assert notices[1].endswith("did you mean sample_steps?")
    assert notices[2].endswith("did you mean 'width'?")
    assert notices[3].startswith("lora is not a known key and is ignored; keys are prompt, negative_prompt")
    assert notices[4].startswith("--l 2 (scale) is true classifier-free guidance")


def test_a_list_of_lines_and_a_literal_text_of_several():
    assert [one.prompt for one in load_prompts(("a --d 1", "# no", "b")).prompts] == ["a", "b"]
    assert [one.prompt for one in load_prompts("a\nb").prompts] == ["a", "b"]
    assert load_prompts("x" * 5000).prompts[0].prompt == "x" * 5000


@pytest.mark.parametrize(("given", "used"), [(512, 512), (1023, 1008), (70, 64), (16, 64), (0, 64)])
def test_sides_are_multiples_of_sixteen_of_at_least_sixty_four(given, used):
    (prompt,) = load_prompts(f"a --w {given} --h {given}").prompts
    assert (prompt.width, prompt.height) == (used, used)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("a --cfg 3.5", r'"--cfg 3.5" is not a known flag and is ignored; did you mean --l .* or --g'),
        ("a --steps 20", "did you mean --s"),
        ("a --xyz 20", r"flags are --w, --h"),
        ("a --w x", r'"--w x" is ignored: "x" is not a value of --w'),
        ("a --d -1", r'"--d -1" is ignored'),
        ("a --ss euler", "--ss has no effect on FLUX"),
        ("a --l 3.5", r"two passes a step.*--g \(guidance_scale\), 3.5 if not given"),
        ("d 20 dice", "begins with .* read as the flag --d"),
    ],
)
def test_what_is_not_meant_so_is_reported(line, sentence):
    (notice,) = load_prompts(["fine", line]).notices
    assert notice.startswith("sample_prompts, prompt 2: ")
    import re

    assert re.search(sentence, notice)


def test_the_strength_of_the_network_is_a_flag_and_a_key_of_ours(tmp_path):
    loaded = load_prompts(["a --m 0.5 --g 2", "b --M 0", "c --m -.5", "m 3 things"])
    assert [one.strength for one in loaded.prompts] == [0.5, 0.0, -0.5, 1.0]
    assert loaded.prompts[3].prompt == "m 3 things", "Kohya knows no such flag, so nothing may change there"
    assert loaded.notices == ()
    (tmp_path / "p.json").write_text(
        '[{"prompt": "a", "strength": 0.8}, {"prompt": "b", "network_multiplier": 1}]'
    )
    first, second = load_prompts(tmp_path / "p.json").prompts
    assert (first.strength, second.strength) == (0.8, 1.0)
    (said,) = load_prompts(tmp_path / "p.json").notices
    assert said.endswith("did you mean strength?")
    (tmp_path / "p.toml").write_text('[prompt]\nprompt = "a"\nstrength = 0\n')
    assert load_prompts(tmp_path / "p.toml").prompts[0].strength == 0


def test_a_good_line_is_not_commented():
    assert load_prompts("a --w 64 --h 64 --s 4 --d 7 --l 1 --g 1.5 --n no").notices == ()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.txt", None, "there is no such file"),
        ("empty.txt", "# nothing\n", "there is no prompt in it"),
        ("bad.json", "[", "this is not JSON"),
        ("object.json", '{"prompt": "a"}', "list of texts or objects"),
        ("type.json", '[{"prompt": "a", "seed": "42"}]', "type.json: seed = '42' is not a whole number"),
        ("bool.json", '[{"prompt": "a", "width": true}]', "bool.json: width = True is not a whole number"),
        ("none.json", '[{"seed": 1}]', 'entry 1 has no "prompt"'),
        ("bad.toml", "[prompt", "line 1, column 8: this is not TOML"),
        ("table.toml", 'prompt = "a"\n', r"needs a \[prompt\] table"),
        ("subset.toml", '[prompt]\n[prompt.subset]\nprompt = "a"\n', r"\[\[prompt.subset\]\] entries"),
        ("seed.txt", "a --d 99999999999999999999", "seed of entry 1 is not in 0..9223372036854775807"),
        ("prompts.yaml", "a\n", "ends in .txt, .toml, .json"),
    ],
)
def test_unusable_files_are_refused_in_a_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=sentence):
        load_prompts(str(tmp_path / name))


def test_unreadable_bytes_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 1 is not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


def test_imports_neither_torch_nor_numpy():
    code = "import sys, library.config.prompts; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
