"""`python -m gratis.zoo.sprites page.html` writes a page of samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from gratis.contract.files import write_text
from gratis.zoo.sprites.page import page

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m gratis.zoo.sprites", description=__doc__)
    parser.add_argument("page", type=Path, help="HTML file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the worlds shown")
    parser.add_argument("--size", type=int, default=64, help="pixels of a picture's side")
    parser.add_argument("--models", action="store_true", help="show what the zoo's models make of the world")
    arguments = parser.parse_args()
    write_text(arguments.page, page(arguments.seed, arguments.size, arguments.models))
    print(arguments.page)
