"""The shipped quickstart, as it is but for its folders: it trains, the loss on the fixed draw falls, it says so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.e2e.running import ROOT, run


def test_the_quickstart_learns(tmp_path: Path):
    pictures = tmp_path / "train"
    shutil.copytree(
        ROOT / "configs" / "quickstart" / "train", pictures, ignore=shutil.ignore_patterns("*.npz")
    )
    said = run(
        ROOT / "configs" / "quickstart.toml", "--train_data_dir", str(pictures), "--output_dir",
        str(tmp_path / "out"), "--logging_dir", str(tmp_path / "logs"),
    ).stderr  # fmt: skip
    (ratio,) = re.findall(r"mean of the last 20 % / mean of the first 20 % = ([\d.]+)", said)
    assert float(ratio) < 0.9
    names = {path.name for path in (tmp_path / "out").iterdir()}
    stems = ["quickstart", *(f"quickstart-{epoch:06d}" for epoch in range(1, 10))]
    files = {f"{stem}.{kind}" for stem in stems for kind in ("safetensors", "workflow.json")}
    assert names == {"quickstart.md", "quickstart-log.jsonl", "quickstart.report.html", "sample", *files}
    assert "wrote" in said
    assert "open quickstart.workflow.json" in said
