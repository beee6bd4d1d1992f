"""Dry runs for tests: the trainer's own main, its JSON report read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flux_train_network import main


def dry_run(config: Path, *arguments: str) -> dict[str, Any]:
    """The report of a dry run of `config`, which must succeed."""
    target = config.with_suffix(".json")
    assert main(["--config_file", str(config), "--dry_run_json", str(target), *arguments]) == 0
    return json.loads(target.read_text(encoding="utf-8"))


def advice(report: dict[str, Any]) -> dict[str, str]:
    """Advice of a report by its code."""
    return {notice["code"]: notice["text"] for notice in report["notices"] if notice["code"]}
