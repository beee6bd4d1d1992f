"""Write the tables of docs/migrating.md anew: `python -m tools.write_migrating` in the repository."""

from __future__ import annotations

from pathlib import Path

from library.config.importers.page import with_tables
from library.files.atomic import write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating.md"


def main() -> None:
    """Write the page and say so."""
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8")))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
