"""The pages in a real browser: no console error, nothing asked of a network, fit for a phone, fast, and they work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from library.report.compare import write_comparison
from library.report.page import render
from tests.report.browser import CHROMIUM, Tab, browser
from tests.report.made import HOSTILE, content, draw_samples, log, sample_steps

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

STEPS, AT, PROMPTS = 2000, 25, 8
WIDTHS = (1440, 390)
PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 steps and 200 samples, each of 512 pixels."""
    folder = tmp_path_factory.mktemp("run")
    draw_samples(folder, STEPS, samples=2, prompts=PROMPTS, side=512)
    prompts = {number: {"text": f"{number}: {HOSTILE}", "details": "seed 7"} for number in range(PROMPTS)}
    shown = {"src": PICTURE, "width": 224, "height": 168, "name": "b.png", "caption": HOSTILE}
    bucket = {
        "dataset": 1, "size": [1024, 768], "images": 3, "samples": 30, "batches": 8, "last_batch": 2, "enlarged": 1,
        "cropped": 0.1, "pictures": [shown] * 12,
    }  # fmt: skip
    row = {
        "dataset": 1, "name": HOSTILE, "kind": "training", "images": 3, "repeats": 10, "validation": 1, "captions": 3,
        "empty": 0, "longest": 90, "example": HOSTILE,
    }  # fmt: skip
    option = {
        "section": "model",
        "name": "ae",
        "value": HOSTILE,
        "source": "train.toml line 3",
        "state": "used",
        "effect": "",
    }
    cell = {"src": PICTURE, "width": 384, "height": 384}
    sheet = {
        "title": HOSTILE, "details": "", "row_name": "Strength", "rows": ["0.6", "1"], "columns": ["a", "b"],
        "cells": [[cell, cell], [cell, cell]],
    }  # fmt: skip
    made = content(
        folder, log(STEPS, samples=AT, prompts=PROMPTS), prompts=prompts, notices=[HOSTILE], sheets=[sheet],
        data={"plan": [["images", HOSTILE]], "folders": [row], "buckets": [bucket, bucket]},
        options=[option, {**option, "name": "clip_l", "source": "default"}],
        memory=lambda: [{"name": "weights", "value": 24e9}, {"name": "activations", "value": 8e9}],
        outliers=lambda found: {"epoch": found.epoch, "images": [{**shown, **asdict(one)} for one in found.images]},
    )  # fmt: skip
    drawn = made["samples"]["pictures"]  # at two steps; the others are shown with the pictures of the first
    assert len(drawn) == 2 * PROMPTS
    made["samples"] |= {
        "steps": sample_steps(STEPS, AT),
        "pictures": [
            {**one, "step": step, "file": f"sample/{step}_{one['prompt']}.png"}
            for step in sample_steps(STEPS, AT)
            for one in (drawn[PROMPTS:] if step == STEPS else drawn[:PROMPTS])
        ],
    }
    path = folder / "run.report.html"
    path.write_text(render(made, kind="report", title=f"run {HOSTILE}"), encoding="utf-8")
    return path


def check(tab: Tab, page: Path) -> None:
    """What holds of every page at every width."""
    assert tab.problems == []
    assert [url for url in tab.requests if url != page.resolve().as_uri()] == []
    assert "owned" not in tab.evaluate("document.title.slice(0, 5)")
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert tab.evaluate("document.querySelectorAll('img[onerror]').length") == 0
    unnamed = "[...document.querySelectorAll('img')].filter((one) => one.getAttribute('alt') === null).length"
    assert tab.evaluate(unnamed) == 0


def press(tab: Tab, name: str) -> None:
    """Press the button of that name."""
    buttons = "[...document.querySelectorAll('button')]"
    tab.evaluate(f"{buttons}.find((one) => one.textContent === {json.dumps(name)}).click()")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_run_is_shown_whole_and_at_once(tab: Tab, report: Path, width: int):
    assert report.stat().st_size < 15e6
    tab.open(report, width=width)
    check(tab, report)
    assert tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 2000
    sections = tab.evaluate("[...document.querySelectorAll('section')].map((one) => one.id)")
    assert sections == [
        "notices", "samples", "curves", "sheets", "resources", "checkpoints", "outliers", "data", "options"
    ]  # fmt: skip
    assert tab.evaluate("document.querySelectorAll('.chart path').length") > 8


def test_the_slider_and_the_views_show_other_pictures(tab: Tab, report: Path):
    tab.open(report, width=1440)
    source = "document.querySelector('.gallery img').src"
    last = tab.evaluate(source)
    slide = """(() => { const slider = document.querySelector('.steps input'); slider.value = 0;
        slider.dispatchEvent(new Event('input')); return document.querySelector('.steps output').textContent; })()"""
    assert tab.evaluate(slide) == "step 80"
    assert tab.evaluate(source) != last
    press(tab, "All")
    assert tab.evaluate("document.querySelectorAll('#samples .grid img').length") == AT * PROMPTS
    tab.evaluate("document.querySelector('#samples .grid button').click()")
    assert tab.evaluate("document.querySelector('dialog').open")
    assert tab.evaluate("document.querySelector('dialog strong').textContent") == "step 80"
    tab.evaluate("document.querySelector('dialog [aria-label=after]').click()")
    assert tab.evaluate("document.querySelector('dialog strong').textContent") == "step 160"
    link = tab.evaluate("document.querySelector('dialog a').href")
    assert link == (report.parent / "sample" / "160_0.png").as_uri()
    tab.evaluate("document.querySelector('dialog').close()")
    press(tab, "Before / after")
    assert tab.evaluate("document.querySelectorAll('.split').length") == PROMPTS
    assert tab.problems == []


def test_curves_answer_to_pointer_smoothing_and_log_scale(tab: Tab, report: Path):
    tab.open(report, width=1440)
    curve = "document.querySelector('.chart path.smooth').getAttribute('d')"
    before = tab.evaluate(curve)
    tab.evaluate(
        """(() => { const box = document.querySelector('#curves .tools input[type=range]'); box.value = 0.5;
        box.dispatchEvent(new Event('input'));
        document.querySelector('.chart').scrollIntoView({ behavior: 'instant' }); })()"""
    )
    tab.evaluate("new Promise((done) => setTimeout(done, 100))")
    smoothed = tab.evaluate(curve)
    tab.evaluate("document.querySelector('#curves .tools input[type=checkbox]').click()")
    assert len({before, smoothed, tab.evaluate(curve)}) == 3
    middle = """(() => { const plot = document.querySelector('.chart svg'), box = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent('pointermove', { clientX: box.left + box.width / 2 }));
        return document.querySelector('.chart .at').textContent; })()"""
    assert tab.evaluate(middle) in [f"step {number:,}" for number in range(950, 1050)]
    assert tab.problems == []


def test_options_are_filtered(tab: Tab, report: Path):
    tab.open(report, width=390)
    rows = "[...document.querySelectorAll('#options td.name')].map((one) => one.textContent)"
    assert tab.evaluate(rows) == ["ae"]
    tab.evaluate("document.querySelectorAll('#options .segments button')[1].click()")
    assert tab.evaluate(rows) == ["ae", "clip_l"]
    tab.evaluate(
        """(() => { const box = document.querySelector('#options input'); box.value = 'clip';
        box.dispatchEvent(new Event('input')); })()"""
    )
    assert tab.evaluate(rows) == ["clip_l"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_is_shown(tab: Tab, report: Path, width: int, tmp_path: Path):
    page = tmp_path / "compare.html"
    write_comparison([report, report], page)
    tab.open(page, width=width)
    check(tab, page)
    assert tab.evaluate("document.querySelectorAll('.side img').length") == 2 * PROMPTS
    assert (
        tab.evaluate("document.querySelector('#options td').textContent") == "the runs have the same options"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_either_scheme(tab: Tab, report: Path, scheme: str):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.open(report, width=1440)
    ratios = tab.evaluate(
        """(() => {
          const style = getComputedStyle(document.documentElement);
          const probe = document.body.appendChild(document.createElement('i'));
          const light = (name) => {
            probe.style.color = style.getPropertyValue(name);
            const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map((part) => {
              const v = part / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ratio = (a, b) => {
            const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
          return ['--ink', '--soft', '--accent', '--good', '--warn', '--bad'].flatMap((ink) =>
            ['--paper', '--card', '--shade'].map((paper) => ratio(ink, paper)));
        })()"""
    )
    tab.call("Emulation.setEmulatedMedia", features=[])
    assert min(ratios) >= 4.5  # WCAG AA
