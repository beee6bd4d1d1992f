"""Write docs/options.md and docs/advice.md from their tables: `python -m tools.write_options` in the repository."""

from __future__ import annotations

from pathlib import Path

from library.config.advice import advice_markdown
from library.config.reference import options_markdown
from library.files.atomic import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Write the pages and say so."""
    for name, text in (("options.md", options_markdown()), ("advice.md", advice_markdown())):
        write_text(DOCS / name, text)
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
