"""Write docs/options.md, the reference of all options, from the table in library/config."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"


def main() -> int:
    """Write the page and say so."""
    # The tool is started as a file, so the repository is not on the path yet.
    sys.path.insert(0, str(ROOT))
    from library.config.reference import options_markdown  # noqa: PLC0415  found only now
    from library.files.atomic import write_text  # noqa: PLC0415  found only now

    write_text(PAGE, options_markdown())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
