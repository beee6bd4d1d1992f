"""Write the embedded tiny FLUX.1 (transformer, autoencoder, text encoders, tokenizers) into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.models.tiny import write_tiny_flux


def main() -> None:
    """Command line: one folder, made if it is not there; files already in it stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where to write flux.safetensors, ae.safetensors and the others"
    )
    folder = parser.parse_args().folder
    write_tiny_flux(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>10}  {file.relative_to(folder)}")


if __name__ == "__main__":
    main()
