"""The average of weights: the formula over a run's own weights, every kind of network, exact resume, what uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_train_network import main
from library.config.load import load_config
from library.distributed.base import World
from library.distributed.single import SingleBackend
from library.errors import CheckpointError, ConfigError
from library.report.page import content_of
from library.train.ema import Ema
from library.train.run_log import Saved, Stepped, Validated, read_log
from tests.e2e.running import draw_pictures, write_config

CPU = torch.device("cpu")
STEPS = 4
NETWORKS: dict[str, dict[str, object]] = {
    "lora": {"network_dropout": 0.1},
    "lora of both": {"network_train_unet_only": None, "cache_text_encoder_outputs": None},
    "oft": {"network_module": "networks.oft_flux"},
    "dora": {"network_module": "lycoris.kohya", "network_args": ["algo=locon", "dora_wd=True"]},
    "lokr": {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4"]},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", [(64, 64)] * 8)
    return folder


def averaged(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average over `weights`, of which the first are those before training; in float64."""
    average = {name: tensor.double() for name, tensor in weights[0].items()}
    for number, now in enumerate(weights[1:], start=1):
        kept = min(decay, (1 + number) / (10 + number))
        average = {name: kept * tensor + (1 - kept) * now[name].double() for name, tensor in average.items()}
    return average


def backend() -> SingleBackend:
    return SingleBackend(World(0, 1, 0, CPU), dtype=torch.float32)


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_the_formula(on_cpu: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    module = nn.Linear(4, 3).to(dtype)
    module.bias.requires_grad_(False)
    ema = Ema(module, backend=backend(), decay=0.6, on_cpu=on_cpu)
    assert not ema.has_begun
    ema.start()
    weights = [{"weight": module.weight.detach().clone()}]
    for _ in range(20):  # the share reaches 0.6 at the 13th
        module.weight.data.add_(torch.randn(3, 4).to(dtype))
        ema.update()
        weights.append({"weight": module.weight.detach().clone()})
    state = ema.state()
    assert state.keys() == {"weight", "updates"}
    assert int(state["updates"]) == 20
    assert state["weight"].dtype == torch.float32
    expected = averaged(weights, 0.6)["weight"]
    assert torch.allclose(state["weight"].double(), expected, atol=1e-6)

    before = module.weight.detach().clone()
    with ema.in_use():
        assert torch.equal(module.weight, state["weight"].to(dtype))
    assert torch.equal(module.weight, before)
    again = Ema(module, backend=backend(), decay=0.6, on_cpu=on_cpu)
    again.load_state(state)
    for one in (ema, again):
        one.update()
    assert torch.equal(ema.state()["weight"], again.state()["weight"])
    for _ in range(2):  # steps that leave the weights as they are, and turn out not to be made
        again.update()
    assert not torch.allclose(ema.state()["weight"], again.state()["weight"], atol=1e-5)
    again.take_back(2)
    assert torch.allclose(ema.state()["weight"], again.state()["weight"], atol=1e-6)
    assert int(again.state()["updates"]) == 21
    with pytest.raises(CheckpointError, match="the saved average differs in 1 tensors, such as weight"):
        again.load_state({"updates": state["updates"]})


def test_the_weights_come_back_where_no_memory_is_left(monkeypatch: pytest.MonkeyPatch):
    """As after a sample image that ran out of it, which ends no run."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    module = nn.Linear(4, 3)
    ema = Ema(module, backend=backend(), decay=0.6, on_cpu=False)
    ema.start()
    module.weight.data.add_(1)
    before = module.weight.detach().clone()
    with ema.in_use():
        assert not torch.equal(module.weight, before)
        for name in ("clone", "to"):
            monkeypatch.setattr(Tensor, name, fail)
    monkeypatch.undo()
    assert torch.equal(module.weight, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_gpu_waits_for_no_average(on_cpu: bool):
    gpu = torch.device("cuda")
    module = nn.Linear(64, 64, device=gpu)
    one = SingleBackend(World(0, 1, 0, gpu), dtype=torch.float32)
    ema = Ema(module, backend=one, decay=0.5, on_cpu=on_cpu)
    ema.start()
    weights = [{"weight": module.weight.detach().cpu()}]
    for step in range(1, 6):
        module.weight.data.add_(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ema.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        weights.append({"weight": module.weight.detach().cpu()})
    state = ema.state()["weight"]
    assert state.is_cuda != on_cpu
    assert torch.allclose(state.cpu().double(), averaged(weights, 0.5)["weight"], atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_averaged_and_resumed(tmp_path: Path, pictures: Path, kind: str):
    output = tmp_path / "out"
    options = {
        "max_train_epochs": None, "max_train_steps": STEPS, "save_every_n_steps": 1, "save_state": True,
        "learning_rate": 1e-2, "ema_decay": 0.3, "t5xxl_max_token_length": 16, **NETWORKS[kind],
    }  # fmt: skip
    config = write_config(tmp_path / "c.toml", pictures, output, **options)
    assert main(["--config_file", str(config)]) == 0
    states = [output / f"out-step{step:08d}-state" for step in range(1, STEPS + 1)]
    weights = [load_file(state / "model.safetensors") for state in states]
    kept = [load_file(state / "extras.safetensors") for state in states]
    trained = {name.removeprefix("ema/") for name in kept[0] if name.startswith("ema/")} - {"updates"}
    assert trained
    assert trained <= weights[0].keys()
    assert [int(one["ema/updates"]) for one in kept] == list(range(1, STEPS + 1))
    for number in range(1, STEPS):
        share = min(0.3, (2 + number) / (11 + number))
        for name in trained:
            before, now = (one[f"ema/{name}"].double() for one in kept[number - 1 : number + 1])
            expected = share * before + (1 - share) * weights[number][name].double()
            assert torch.allclose(now, expected, atol=1e-6), name

    plain, average = (load_file(output / f"out{suffix}.safetensors") for suffix in ("", "-ema"))
    assert plain.keys() == average.keys()
    assert any(not torch.equal(plain[key], average[key]) for key in plain)
    named = [key for key in average if f"ema/{key}" in kept[-1]]
    assert all(torch.equal(average[key], kept[-1][f"ema/{key}"]) for key in named)
    assert named or kind == "oft"  # whose file has other names
    with (
        safe_open(output / "out.safetensors", "pt") as one,
        safe_open(output / "out-ema.safetensors", "pt") as two,
    ):
        told = [{k: v for k, v in file.metadata().items() if "hash" not in k} for file in (one, two)]
    told = [{k: v for k, v in each.items() if k != "ss_training_finished_at"} for each in told]
    assert told[0] == told[1]

    assert main(["--config_file", str(config), "--resume", str(states[1])]) == 0
    again = load_file(output / "out-ema.safetensors")
    assert all(torch.equal(again[key], average[key]) for key in average)
    state = load_file(output / "out-state" / "extras.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in kept[-1].items())
    log = [line.record for line in read_log(output / "out-log.jsonl")]
    assert [r.step for r in log if isinstance(r, Stepped)] == list(range(1, STEPS + 1))


def tell_which_file_is_which(folder: Path) -> None:
    """Workflows, card and report of the runs below name the average and the best as what they are."""
    for name, unseen in (("plain", "EMA"), ("average", "network")):
        rows = content_of(folder / name / "out.report.html")["checkpoints"]
        blank = {row["marks"][0] for row in rows if row["validation"] is None}
        assert blank == {unseen}, "a loss is shown with the weights that it was measured with"
    output = folder / "average"
    for path in output.glob("*.safetensors"):
        nodes = json.loads(path.with_suffix(".workflow.json").read_text(encoding="utf-8"))["nodes"]
        (lora,) = (node for node in nodes if node["type"] == "LoraLoaderModelOnly")
        assert lora["widgets_values"][0] == path.name
    card = (output / "out.md").read_text(encoding="utf-8")
    assert "`out-ema.safetensors` holds the average of the weights (EMA)" in card
    assert "`out-best.safetensors` holds the average of the weights of step" in card
    assert "with the average of the weights of that moment" in card


def test_samples_and_validation_take_the_average(tmp_path: Path, pictures: Path):
    """A run that validates with the average measures, step by step, what one measures whose files it averages."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("waves --w 32 --h 32 --s 1 --d 3\n", encoding="utf-8")
    options = {
        "max_train_epochs": None, "max_train_steps": 3, "learning_rate": 2e-2, "validation_split": 0.25,
        "validate_every_n_steps": 1, "t5xxl_max_token_length": 16, "ema_decay": 0.5, "save_last_n_steps": 1,
        "save_every_n_steps": 1, "sample_prompts": str(prompts), "sample_every_n_steps": 3,
    }  # fmt: skip
    runs: dict[str, list[Validated]] = {}
    pixels, said = {}, {}
    changes: dict[str, dict[str, object]] = {
        "plain": {}, "average": {"ema_for_samples": True, "keep_best": True}, "cpu": {"ema_on_cpu": True},
    }  # fmt: skip
    for name, more in changes.items():
        config = write_config(tmp_path / f"{name}.toml", pictures, tmp_path / name, **options, **more)
        assert main(["--config_file", str(config)]) == 0
        log = [line.record for line in read_log(tmp_path / name / "out-log.jsonl")]
        runs[name] = [r for r in log if isinstance(r, Validated)]
        (path,) = (tmp_path / name / "sample").glob("*.png")
        with Image.open(path) as picture:
            pixels[name] = picture.tobytes()
            said[name] = picture.text["parameters"]
    files = {name: load_file(tmp_path / name / "out-ema.safetensors") for name in runs}
    for name in ("average", "cpu"):  # neither looking nor where it is kept changes anything
        assert all(torch.equal(files["plain"][key], files[name][key]) for key in files["plain"])
    assert runs["plain"][0].loss == runs["average"][0].loss  # before training there is one set of weights
    assert runs["plain"][-1].loss != runs["average"][-1].loss
    assert pixels["plain"] == pixels["cpu"] != pixels["average"]
    assert "<lora:out:1>" in said["plain"]
    assert "<lora:out-ema:1>" in said["average"], "the file that a picture was drawn with is in it"
    tell_which_file_is_which(tmp_path)

    # The average's file as the weights of a run that has not begun: the same loss.
    config = write_config(
        tmp_path / "again.toml", pictures, tmp_path / "again", **{**options, "ema_decay": None},
        network_weights=str(tmp_path / "average" / "out-ema.safetensors"),
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 0
    first = read_log(tmp_path / "again" / "out-log.jsonl")
    measured = next(line.record for line in first if isinstance(line.record, Validated))
    assert measured.loss == pytest.approx(runs["average"][-1].loss, rel=1e-5)
    # Older ones are removed in pairs, the best stays, and it is the average.
    names = {path.name for path in (tmp_path / "average").glob("*.safetensors")}
    pair = {"out-step00000003.safetensors", "out-step00000003-ema.safetensors"}
    before = {name.replace("3", "2") for name in pair}
    assert names == pair | before | {"out.safetensors", "out-ema.safetensors", "out-best.safetensors"}
    saved = [line.record for line in read_log(tmp_path / "average" / "out-log.jsonl")]
    best = max(r.step for r in saved if isinstance(r, Saved) and r.what == "best")
    if best == 3:
        kept = load_file(tmp_path / "average" / "out-best.safetensors")
        assert all(torch.equal(kept[key], files["average"][key]) for key in kept)


@pytest.mark.parametrize(("options", "sentence"), [
    (["--ema_for_samples"], "needs ema_decay"),
    (["--ema_on_cpu"], "needs ema_decay"),
    (["--ema_decay", "0.99", "--optimizer_type", "AdamWScheduleFree"], "which averages the weights itself"),
    (["--ema_decay", "1"], "ema_decay"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path: Path, pictures: Path, options: list[str], sentence: str):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", optimizer_type=None)
    with pytest.raises(ConfigError, match=sentence):
        load_config(["--config_file", str(config), *options])
