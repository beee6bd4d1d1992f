"""Write what docs take from tables in code: `python -m tools.write_options` in the repository.

That is docs/options.md, docs/advice.md, and the table of what ZeRO cannot do in docs/distributed.md.
"""

from __future__ import annotations

from pathlib import Path

from library.config.advice import advice_markdown
from library.config.reference import options_markdown
from library.config.zero_limits import with_limits
from library.files.atomic import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Write the pages and say so."""
    limits = with_limits((DOCS / "distributed.md").read_text(encoding="utf-8"))
    pages = {"options.md": options_markdown(), "advice.md": advice_markdown(), "distributed.md": limits}
    for name, text in pages.items():
        write_text(DOCS / name, text)
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
