"""A page as one file: template, style, scripts and its content as JSON. Nothing in it asks a network for anything.

Content is untrusted text (captions, prompts, file names): in the file it is JSON that cannot end its element, and the
scripts make text nodes of it. The policy lets only the scripts of the page run, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

import library
from library.errors import ConfigError

Kind = Literal["report", "compare", "grid"]
_SHARED = ("elements.js", "charts.js", "samples.js")
_CONTENT = re.compile(r'<script type="application/json" id="content">(.*?)</script>', re.DOTALL)
_ESCAPED = "<>&\u2028\u2029"


def render(content: Mapping[str, object], *, kind: Kind, title: str) -> str:
    """The whole page; `content` is what its scripts show."""
    style = _file("style.css")
    script = "\n".join(_file(name) for name in (*_SHARED, f"{kind}.js"))
    signed = {"kind": kind, "trainer": f"polyrank {library.__version__}", **content}
    data = json.dumps(signed, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in _ESCAPED:
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_file("page.html")).substitute(
        policy=policy, title=html.escape(title), style=style, script=script, content=data
    )


def content_of(path: Path) -> dict[str, Any]:
    """The content of a page written by `render`. ConfigError when the file is none."""
    try:
        found = _CONTENT.search(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = json.loads(found[1]) if found else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a report: {error}") from error
    if "kind" not in content:
        raise ConfigError(f"{path} is no report of a run; name a *.report.html or a run's output_dir")
    return content


def _file(name: str) -> str:
    return resources.files("library.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
