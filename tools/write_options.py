"""Write docs/options.md, the reference of all options: `python -m tools.write_options` in the repository."""

from __future__ import annotations

from pathlib import Path

from library.config.reference import options_markdown
from library.files.atomic import write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"


def main() -> None:
    """Write the page and say so."""
    write_text(PAGE, options_markdown())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
