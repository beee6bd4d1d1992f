"""What a report says of a run: the page as a file, curves, times, checkpoints, samples. No browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from library.errors import ConfigError
from library.report.compare import find_run, write_comparison
from library.report.content import Composer, Known
from library.report.curves import MOST_POINTS, series
from library.report.history import standing, time_split
from library.report.live import LiveReport
from library.report.page import content_of, render
from library.report.pictures import Shelf, sample_files
from library.train.run_log import Ended, Line, RunLog, Saved, Validated
from library.train.spent import Spent
from tests.report.made import HOSTILE, START, content, draw_samples, log, started, stepped


class Elements(HTMLParser):
    """Counts elements and keeps what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href") and value != "data:,"]


def test_untrusted_text_stays_text_and_comes_back_as_it_was(tmp_path: Path):
    shown = content(tmp_path, log(20), notices=[HOSTILE])
    html = render(shown, kind="report", title=HOSTILE)
    (tmp_path / "x.report.html").write_text(html, encoding="utf-8")
    elements = Elements()
    elements.feed(html)
    assert elements.tags.count("script") == 2
    assert "img" not in elements.tags
    assert elements.fetched == []
    assert re.search(r"""(src|href)=["']https?:|url\(|@import|\bfetch\(""", html) is None
    back = content_of(tmp_path / "x.report.html")
    assert [one["text"] for one in back["notices"]] == [HOSTILE, f"a warning {HOSTILE}"]


def test_only_the_scripts_of_the_page_may_run(tmp_path: Path):
    html = render(content(tmp_path, log(5)), kind="report", title="x")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    script = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert policy is not None
    assert len(script) == 1
    digest = re.search(r"script-src 'sha256-([^']+)'", policy[1])
    assert digest is not None
    assert digest[1] == base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()


def test_a_page_that_is_no_report_is_refused(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("<html></html>", encoding="utf-8")
    with pytest.raises(ConfigError, match="no report of a run"):
        content_of(page)


def test_long_curves_keep_every_peak():
    ys = [1.0] * 10_000
    ys[7_123] = 50.0
    ys[42] = -3.0
    made = series("loss", range(1, 10_001), ys)
    low, high = made["low"], made["high"]
    assert isinstance(low, list)
    assert isinstance(high, list)
    assert (min(low), max(high)) == (-3.0, 50.0)
    assert len(low) <= MOST_POINTS
    assert abs(sum(made["y"]) / len(low) - sum(ys) / len(ys)) < 1e-3  # type: ignore[arg-type]


def test_short_curves_are_left_as_they_are_without_what_was_not_measured():
    made = series("norm", [1, 2, 3], [0.123456789, None, float("nan")])
    assert made == {"name": "norm", "x": [1], "y": [0.12346]}


def test_time_goes_where_it_went():
    split = {row["name"]: row["value"] for row in time_split(Spent(log(20, samples=2, prompts=3)))}
    assert split == {
        "forward and backward": 30.0, "waiting for data": 2.5, "optimizer and the rest of a step": 7.5,
        "validation": 20.0, "saving": 12.0, "sample images": 6.0, "caching": 16.0, "starting": 14.0,
    }  # fmt: skip


def test_time_between_two_processes_counts_nowhere():
    lines = [
        Line(START, started(total=10)), Line(START + 2, stepped(1, total=10)),
        Line(START + 2, Ended(step=1, why="stopped", message="")),
        Line(START + 9000, started(1, total=10, resumed=True)), Line(START + 9003, stepped(2, total=10)),
    ]  # fmt: skip
    now = standing(lines)
    assert now["seconds"] == 5.0 + 2 * 20.0  # what comes before the log of each
    assert now["status"] == "running"
    assert standing(lines[:3])["status"] == "stopped"


@pytest.mark.parametrize(
    ("why", "status"), [("done", "finished"), ("early stop", "finished"), ("error", "failed")]
)
def test_the_end_is_told(why: str, status: str):
    assert standing(log(4, why=why))["status"] == status


def test_checkpoints_have_sizes_hashes_and_marks(tmp_path: Path):
    (tmp_path / "run-step00000010.safetensors").write_bytes(b"weights")
    rows = {row["step"]: row for row in content(tmp_path, log(20))["checkpoints"]}
    assert rows[10]["bytes"] == 7
    assert rows[10]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert rows[10]["marks"] == ["network", "best step"]
    assert not rows[20]["exists"]
    assert rows[20]["marks"] == ["network"]


def test_the_loss_before_training_is_no_checkpoints_and_one_that_is_no_number_is_not_shown(tmp_path: Path):
    def measured(step: int, loss: float | None) -> Validated:
        return Validated(step=step, loss=loss, by_timestep={}, best=False)  # type: ignore[arg-type]

    lines = [Line(START, started(total=3)), *(Line(START, stepped(step, total=3)) for step in (1, 2, 3))]
    lines += [Line(START, measured(*one)) for one in ((0, 0.1), (1, math.nan), (2, 0.7), (3, None))]
    lines += [Line(START, Saved(step=step, what="model", file=f"{step}")) for step in (1, 2, 3)]
    shown = content(tmp_path, lines)
    assert shown["run"]["best"] == {"step": 2, "loss": 0.7}
    assert [row["validation"] for row in shown["checkpoints"]] == [None, 0.7, None]
    assert [row["marks"] for row in shown["checkpoints"]] == [
        ["network"],
        ["network", "best step"],
        ["network"],
    ]
    assert (
        "NaN" not in render(shown, kind="report", title="t").split('id="content">')[1].split("</script>")[0]
    )


def test_secrets_are_masked_in_what_was_said(tmp_path: Path):
    lines = [*log(4)[:-1]]
    shown = content(tmp_path, lines, notices=["the key hf_abcdef was refused"], secrets=["hf_abcdef"])
    assert "hf_abcdef" not in json.dumps(shown)
    assert shown["notices"][0]["text"] == "the key *** was refused"


def test_samples_are_found_by_name_the_newest_of_each(tmp_path: Path):
    folder = tmp_path / "sample"
    folder.mkdir()
    names = (
        "run_000010_00_20240101000000_7.png", "run_000010_00_20240102000000.png",  # drawn again after a resume
        "run_e000002_01_20240102000000.png",  # at the end of an epoch
        "run_000010_00_20200101000000.png",  # of an older run
        "run-v2_000010_00_20240101000000.png", "other.png",
    )  # fmt: skip
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    since = time.mktime((2023, 1, 1, 0, 0, 0, 0, 0, -1))
    found = sample_files(folder, "run", steps_per_epoch=30, total_steps=50, since=since)
    assert [(one.path.name, one.prompt, one.step) for one in found] == [
        ("run_000010_00_20240102000000.png", 0, 10), ("run_e000002_01_20240102000000.png", 1, 50)
    ]  # fmt: skip


def test_too_many_samples_become_smaller_and_then_fewer(tmp_path: Path):
    draw_samples(tmp_path, 100, samples=10, prompts=2, side=96)
    (tmp_path / "sample" / "run_000100_02_20991231235959.png").write_bytes(b"no picture")
    files = sample_files(tmp_path / "sample", "run", steps_per_epoch=10, total_steps=100, since=0)
    assert len(files) == 21
    assert len(Shelf().fill(files)) == 20
    kept = Shelf(budget=12_000).fill(files)
    steps = sorted({one.step for one in kept})
    assert (steps[0], steps[-1]) == (10, 100)
    assert len(kept) < 20
    assert sum(len(made.src) for made in kept.values()) <= 12_000


def test_a_report_is_written_while_the_run_goes_on_and_at_its_end(tmp_path: Path):
    path = tmp_path / "run.report.html"
    report = LiveReport(path, lambda: Known(name="run", folder=tmp_path, output_name="run"), every=2)
    for line in log(4, why="done")[:-1]:
        report.write(line.record)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert content_of(path)["run"]["status"] == "running"
    report.write(Ended(step=4, why="done", message=""))
    report.close()
    report.close()
    run = content_of(path)["run"]
    assert (run["status"], run["step"]) == ("finished", 4)
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


def test_a_report_that_fails_is_one_warning(tmp_path: Path, our_warnings: list[str]):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    report = LiveReport(
        blocked / "run.report.html", lambda: Known(name="run", folder=tmp_path, output_name="run"), every=1
    )
    for step in range(1, 30):
        report.write(stepped(step, total=30))
    report.close()
    assert len(our_warnings) == 1
    assert "is written no more, training goes on" in our_warnings[0]


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[float] = []
    begun = threading.Event()

    def slow(path: Path, composer: Composer, lines: list[Line]) -> None:
        begun.set()
        written.append(time.monotonic())
        time.sleep(0.02)

    monkeypatch.setattr("library.report.live.write_report", slow)
    report = LiveReport(
        tmp_path / "x.html", lambda: Known(name="run", folder=tmp_path, output_name="run"), every=1
    )
    report.write(stepped(1, total=9))
    assert begun.wait(10)
    for step in range(2, 20):
        report.write(stepped(step, total=20))
        time.sleep(0.01)
    assert len(written) == 1  # the next is due after 100 times what the first took
    report.close()
    assert len(written) == 2


def test_runs_are_compared_by_report_or_by_log(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, total in ((first, 20), (second, 30)):
        draw_samples(folder, total, samples=2, prompts=1, side=32)
    html = render(content(first, log(20)), kind="report", title="run")
    (first / "run.report.html").write_text(html, encoding="utf-8")
    written = RunLog(second / "run-log.jsonl", after_step=None)
    for line in log(30):
        written.write(line.record)
    written.close()
    write_comparison([first, second], tmp_path / "compare.html")
    runs = content_of(tmp_path / "compare.html")["runs"]
    assert [run["name"] for run in runs] == ["a/run", "b/run"]
    assert [run["run"]["step"] for run in runs] == [20, 30]
    assert all(len(run["samples"]["pictures"]) == 2 for run in runs)
    assert [option["name"] for option in runs[1]["options"]] == ["learning_rate"]


def test_a_folder_with_no_run_or_several_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="neither a report"):
        find_run(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        find_run(tmp_path / "nowhere")
    for name in ("a", "b"):
        (tmp_path / f"{name}.report.html").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds several runs"):
        find_run(tmp_path)


def test_the_log_of_a_run_without_a_step_makes_a_report(tmp_path: Path):
    shown = content(tmp_path, [Line(START, started(total=5))])
    assert shown["run"]["step"] == 0
    assert shown["charts"] == []


def test_a_resumed_run_goes_on_in_its_report(tmp_path: Path):
    path = tmp_path / "run.report.html"
    known = Known(name="run", folder=tmp_path, output_name="run")
    report = LiveReport(path, lambda: known, every=50, earlier=log(4, why="stopped"))
    report.write(started(4, total=8, resumed=True))
    report.write(stepped(5, total=8))
    report.close()
    shown = content_of(path)
    assert shown["charts"][0]["series"][0]["x"] == [1, 2, 3, 4, 5]
    assert (shown["run"]["status"], shown["run"]["started_at"]) == ("running", START)
