"""Trackers: the real TensorBoard writer, Weights & Biases offline where it is installed, and what fails in both."""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.config.prompts import SamplePrompt
from library.config.sections.logging import LoggingConfig
from library.config.train_config import TrainConfig
from library.errors import ConfigError, EnvironmentUnsupported
from library.train.metrics import MetricsListener, public_options
from library.train.run_log import Line, Saved, Validated
from library.train.spent import Spent
from library.train.trackers import (
    CarefulTracker,
    Moment,
    TensorBoardTracker,
    Tracker,
    check,
    start_trackers,
    tracker_settings,
    wanted,
)
from library.train.trainer import DATA, PASSES, StepReport
from networks.interface import NormReport
from tests.train.test_state import a_state

# TensorBoard's writer raises on a thread of its own, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
KEY = "local-" + "0123456789abcdef" * 3


def report() -> StepReport:
    return StepReport(
        loss=0.5, grad_norm=2.0, learning_rates={"unet": 1e-4, "d*lr/unet": 2e-4}, samples=4, seconds=2.0,
        skipped=False, max_norm=NormReport(scaled=3, mean=0.25, maximum=0.75),
        norms={"norm/avg_grad_norm": 0.125}, laps={DATA: 0.5, PASSES: 1.25},
    )  # fmt: skip


def tell_all(trackers: list[Tracker], *, failed: bool = False) -> None:
    """A step that ends an epoch and had a validation, and a picture."""
    spent = Spent([Line(100.0, Saved(step=4, what="model", file="a"))])
    listener = MetricsListener(trackers, spent)
    state = a_state(step=5, losses=(0.5,), validation_losses=((5, 0.75),))
    listener.on_start(a_state(step=0, losses=(), validation_losses=((0, 2.0),)))
    spent.add(Line(103.0, Validated(step=5, loss=0.75, by_timestep={}, best=False)))
    listener.on_step(state, report())
    spent.add(Line(104.5, Saved(step=5, what="model", file="b")))
    listener.on_epoch(state, 1)
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    listener.on_image(SamplePrompt(index=3, prompt="waves"), Path("picture.png"), picture, state)
    listener.close(failed=failed)


SCALARS = {
    "loss/current": (5, 0.5),
    "loss/average": (5, 0.5),
    "loss/epoch_average": (1, 0.5),
    "loss/validation/step_divergence": (0, 0.0),
    "loss/validation/epoch_average": (1, 0.75),
    "loss/validation/epoch_divergence": (1, 0.25),
    "norm/grad_norm": (5, 2.0),
    "norm/avg_grad_norm": (5, 0.125),
    "norm/avg_key_norm": (5, 0.25),
    "max_norm/keys_scaled": (5, 3.0),
    "max_norm/max_key_norm": (5, 0.75),
    "lr/unet": (5, 1e-4),
    "lr/d*lr/unet": (5, 2e-4),
    "speed/images_per_second": (5, 2.0),
    "speed/data_seconds": (5, 0.5),
    "speed/forward_backward_seconds": (5, 1.25),
    "speed/validation_seconds": (5, 3.0),
    "speed/saving_seconds": (5, 1.5),  # after the step was told of
}


def test_tensorboard_gets_kohyas_tags_at_kohyas_x(tmp_path: Path):
    config = LoggingConfig(logging_dir=tmp_path, log_prefix="pre-", log_tracker_name="mine")
    (tracker,) = start_trackers(config, secrets=())
    tracker.options(public_options(TrainConfig()))
    tell_all([tracker])
    (folder,) = tmp_path.glob("pre-" + "[0-9]" * 14 + "/mine")
    events = EventAccumulator(str(folder)).Reload()
    for tag, (x, value) in SCALARS.items():
        if tag != "loss/validation/step_divergence":
            assert [(e.step, e.value) for e in events.Scalars(tag)] == [(x, pytest.approx(value))], tag
    # Before the first step there is nothing to diverge from.
    assert [(e.step, e.value) for e in events.Scalars("loss/validation/step_average")] == [(0, 2.0)]
    assert "loss/validation/step_divergence" not in events.Tags()["scalars"]
    assert [e.step for e in events.Images("sample_3")] == [5]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| network_alpha | 1.0 |" in text
    assert "train_data_dir" not in text
    assert "huggingface_token" not in text


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file of this process grows beyond `bytes_left`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_one_warning(tmp_path: Path, our_warnings: list[str]):
    tracker = CarefulTracker(
        "TensorBoard", lambda: TensorBoardTracker(tmp_path, {"max_queue": 1, "flush_secs": 0})
    )
    with full_disk(2000):
        for step in range(300):
            tracker.scalars({f"tag/{step}": 1.0}, Moment(step, step, 1))
        tracker.close(failed=False)
    (said,) = our_warnings
    assert said.startswith("TensorBoard failed and gets nothing more, training goes on: ")


def test_a_tracker_that_cannot_start_costs_one_warning(tmp_path: Path, our_warnings: list[str]):
    (tmp_path / "file").write_text("not a folder")
    (tracker,) = start_trackers(LoggingConfig(logging_dir=tmp_path / "file"), secrets=())
    tell_all([tracker])
    assert len(our_warnings) == 1


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LoggingConfig(), ()),
        (LoggingConfig(logging_dir=Path("logs")), ("tensorboard",)),
        (LoggingConfig(log_with="wandb", logging_dir=Path("logs")), ("wandb",)),
        (LoggingConfig(log_with="all", logging_dir=Path("logs")), ("tensorboard", "wandb")),
    ],
)
def test_which_trackers_are_wanted(config: LoggingConfig, names: tuple[str, ...]):
    assert wanted(config) == names


def test_tracker_settings_come_by_tracker(tmp_path: Path):
    path = tmp_path / "trackers.toml"
    path.write_text("[wandb]\nentity = 'me'\n[tensorboard]\nflush_secs = 1\n")
    config = LoggingConfig(log_tracker_config=path)
    assert tracker_settings(config) == {"wandb": {"entity": "me"}, "tensorboard": {"flush_secs": 1}}
    path.write_text("[wandbb]\nentity = 'me'\n")
    with pytest.raises(ConfigError, match="'wandbb' is no tracker's table"):
        check(config)
    path.write_text("[wandb\n")
    with pytest.raises(ConfigError, match="this is not TOML"):
        check(config)


def test_a_missing_package_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks a module that cannot be imported
    with pytest.raises(EnvironmentUnsupported, match="needs the package wandb: pip install wandb"):
        check(LoggingConfig(log_with="wandb"))


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_login")
def test_a_missing_login_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    config = LoggingConfig(log_with="wandb")
    with pytest.raises(ConfigError, match="needs a login to Weights & Biases"):
        check(config)
    check(LoggingConfig(log_with="wandb", wandb_api_key=KEY))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check(config)
    wandb.teardown()  # it read the environment when it was first used


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes LevelDB's log, blocks of 32 KiB, each part with 7 bytes before it."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@pytest.mark.usefixtures("no_login")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, our_warnings: list[str]):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "restored afterwards")
    monkeypatch.setattr(sys, "argv", ["train.py", "--wandb_api_key", KEY, f"--huggingface_token={KEY}"])
    settings = tmp_path / "trackers.toml"
    settings.write_text("[wandb]\ntags = ['a tag']\n")
    config = LoggingConfig(
        log_with="wandb", logging_dir=tmp_path / "logs", log_tracker_name="project", wandb_run_name="my run",
        log_tracker_config=settings, wandb_api_key=KEY,
    )  # fmt: skip
    (tracker,) = start_trackers(config, secrets=(KEY,))
    tracker.options({"network_args": ("a=1",), "network_dim": 4})
    tell_all([tracker], failed=True)
    wandb.teardown()
    assert not our_warnings
    (run,) = (tmp_path / "logs").glob("*/wandb/offline-run-*/run-*.wandb")
    records = [Record.FromString(data) for data in log_records(run.read_bytes())]
    started = next(record.run for record in records if record.HasField("run"))
    assert (started.project, started.display_name, list(started.tags)) == ("project", "my run", ["a tag"])
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    hidden = {r.metric.name for r in records if r.HasField("metric") and r.metric.options.hidden}
    assert hidden == {"epoch", "global_step"}
    rows = [
        {item.key or item.nested_key[0]: item.value_json for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    (row,) = [row for row in rows if "loss/current" in row]
    assert {key: float(row[key]) for key in ("loss/current", "global_step", "epoch")} == {
        "loss/current": 0.5, "global_step": 5, "epoch": 1,
    }  # fmt: skip
    assert any("sample_3" in row for row in rows)
    stored = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert not [path for path in stored if KEY.encode() in path.read_bytes()]
    assert not (tmp_path / "netrc").exists()
