"""Fetch what the pages of the book, and their tests, need to work without a network, and check it.

Run once by a maintainer, who then commits the result; a build never downloads anything.

    python tools/vendor_assets.py            # fetch through npm what is missing, check, write
    python tools/vendor_assets.py --check    # only check the files that are there

To move to another version, change ``ASSETS``, and look at a page with equations and at the atlas.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = {  # package of npm: folder, and SHA-256 of each wanted member, which is written there under its own name
    "mathjax@3.2.2": (
        "book/_extra/vendor/mathjax",
        {
            "package/es5/tex-svg.js": "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882",
            "package/LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
        },
    ),
    "d3@7.9.2": (
        "book/_extra/vendor/d3",
        {
            "package/dist/d3.min.js": "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
            "package/LICENSE": "2a6d2d5f32ba0b755ddbc1c833f766e30cdbe6ebe9a6d4e3e24427721f0b63d3",
        },
    ),
    "@observablehq/plot@0.6.17": (
        "book/_extra/vendor/plot",
        {
            "package/dist/plot.umd.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
            "package/LICENSE": "4b295e011e0e046170041b5b46f1349393aeceb95797793a55bd21dbb543363a",
        },
    ),
    "axe-core@4.14.1": (
        "tests/assets/axe-core",
        {
            "package/axe.min.js": "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c",
            "package/LICENSE": "af175b9d96ee93c21a036152e1b905b0b95304d4ae8c2c921c7609100ba8df7e",
        },
    ),
}


def fetch(package: str, members) -> dict[str, bytes]:
    """The wanted files of a package, as bytes, by member name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            return {member: tar.extractfile(member).read() for member in members}


def check(package: str, contents: dict[str, bytes]) -> None:
    """Stop if a file is not byte for byte the one that was reviewed."""
    for member, wanted in ASSETS[package][1].items():
        found = hashlib.sha256(contents[member]).hexdigest()
        if found != wanted:
            sys.exit(f"{member} of {package}: SHA-256 is {found}, expected {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check the files that are there")
    only_check = parser.parse_args().check
    for package, (folder, members) in ASSETS.items():
        paths = {member: ROOT / folder / Path(member).name for member in members}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if only_check and missing:
            sys.exit(f"{folder} lacks {', '.join(missing)}: run python tools/vendor_assets.py")
        contents = {m: p.read_bytes() for m, p in paths.items()} if not missing else fetch(package, members)
        check(package, contents)
        for member in missing and members:
            paths[member].parent.mkdir(parents=True, exist_ok=True)
            paths[member].write_bytes(contents[member])
        print(f"{folder}: {len(members)} files of {package} as expected")


if __name__ == "__main__":
    main()
