"""Fetch what the pages of the book need to work without a network, and check it.

Run once by a maintainer, who then commits the result; a build never downloads anything.

    python tools/vendor_assets.py            # fetch through npm, check, write into book/_extra/vendor
    python tools/vendor_assets.py --check    # only check the files that are there

To move to another version, change ``PACKAGE`` and the digests below, and look at a page with equations.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parent.parent / "book" / "_extra" / "vendor" / "mathjax"
PACKAGE = "mathjax@3.2.2"
FILES = {  # member of the package: SHA-256; each is written under its own name
    "package/es5/tex-svg.js": "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882",
    "package/LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
}


def fetch() -> dict[str, bytes]:
    """The wanted files of the package, as bytes, by member name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            return {member: tar.extractfile(member).read() for member in FILES}


def check(contents: dict[str, bytes]) -> None:
    """Stop if a file is not byte for byte the one that was reviewed."""
    for member, wanted in FILES.items():
        found = hashlib.sha256(contents[member]).hexdigest()
        if found != wanted:
            sys.exit(f"{member} of {PACKAGE}: SHA-256 is {found}, expected {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only check the files in book/_extra/vendor")
    if parser.parse_args().check:
        missing = [Path(member).name for member in FILES if not (VENDOR / Path(member).name).is_file()]
        if missing:
            sys.exit(f"{VENDOR} lacks {', '.join(missing)}: run python tools/vendor_assets.py")
        check({member: (VENDOR / Path(member).name).read_bytes() for member in FILES})
    else:
        contents = fetch()
        check(contents)
        VENDOR.mkdir(parents=True, exist_ok=True)
        for member, content in contents.items():
            (VENDOR / Path(member).name).write_bytes(content)
    print(f"{VENDOR}: {len(FILES)} files of {PACKAGE} as expected")


if __name__ == "__main__":
    main()
