"""The README's promises that can be checked without running them: its layout, its files, its two lines."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_layout_names_what_is_there(repository: Path):
    text = (repository / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^    (\S+) {2,}\S.*$", text[text.index("## Layout") :], flags=re.M)
    assert "library/train" in rows
    assert not [row for row in rows if not (repository / row).exists()]
    folders = {path.name for path in (repository / "library").iterdir() if (path / "__init__.py").is_file()}
    assert {row.split("/")[1] for row in rows if row.startswith("library/")} == folders


def test_links_lead_somewhere(repository: Path):
    for page in (repository / "README.md", repository / "docs" / "architecture.md"):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_two_lines(repository: Path):
    lines = re.findall(
        r"^    (python3 -m venv .*)$", (repository / "README.md").read_text(encoding="utf-8"), flags=re.M
    )
    train, check = lines
    assert train.endswith("accelerate launch flux_train_network.py --config_file configs/quickstart.toml")
    assert check.endswith("pip install -e '.[test]' && python -m pytest")


def test_architecture_names_the_files_of_one_step(repository: Path):
    text = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `([\w/]+\.py)` \|", text[: text.index("## Layers")], flags=re.M)
    assert len(files) == 6
    assert all((repository / file).is_file() for file in files)
