"""Get what a profile names and what is not there yet: cells, a model, gene summaries, gene sets.

What is there is held to the checksum that was recorded when it came. Run by ``make fetch``; by hand:
``python -m scsae_utils.fetch --help``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pooch.utils import unique_file_name

from .book import NAMED, ROOT, load_profile
from .download import cache_folder, local_file
from .files import checksum, files_of, whole
from .genesets import COLLECTIONS
from .words import GENE_INFO, REFSEQ

SOURCES = Path(__file__).parent / "data" / "sources.yaml"
DRIVE = "https://drive.google.com/drive/folders/"
NOTE = (
    "Tested against a server on the same machine only: neither the atlas' server nor Google Drive, NCBI or MSigDB "
    "could be reached when this was written. What cannot be downloaded can be put in its place by hand: see the list."
)


@dataclass(frozen=True)
class Item:
    """Something that a profile names.

    Parameters
    ----------
    paths
        The files that it consists of.
    name, what, url, by_hand
        For people.
    gigabytes
        About so large; 0 if not known.
    get
        Downloads it; None where that cannot be done.
    """

    name: str
    paths: list[Path]
    what: str = ""
    url: str = ""
    gigabytes: float = 0.0
    by_hand: str = ""
    get: Callable[[], None] | None = None

    @property
    def missing(self) -> list[Path]:
        return [path for path in self.paths if not path.exists()]


def items(profile: dict[str, dict], sources: dict[str, dict]) -> list[Item]:
    """All that the sections of a profile name by path, URL or short name, each once."""
    short = {"refseq": [REFSEQ, GENE_INFO], **{name: [url] for name, url in COLLECTIONS.items()}}
    named = [section.get(name) for section in profile.values() for name in NAMED]
    values = [value for text in named if isinstance(text, str) for value in short.get(text, [text])]
    found = []
    for value in dict.fromkeys(values):
        if "://" in value:
            url = value.partition("#")[0]
            path = cache_folder() / unique_file_name(url)
            found.append(Item(url, [path], url=url, get=lambda value=value: local_file(value) and None))
        elif value in sources:
            found.append(item_of(value, sources[value]))
        elif "/" in value or Path(value).suffix:
            path = ROOT / value
            found.append(Item(value, files_of(path), "your own"))
    return found


def item_of(name: str, source: dict) -> Item:
    """What an entry of ``sources.yaml`` says of a path."""
    path = ROOT / name
    url = source.get("url") or DRIVE + source["drive"]
    if "drive" in source:
        paths, get = (
            [path / file for file in source["files"]],
            lambda: from_drive(source["drive"], path, source["gigabytes"]),
        )
    else:
        paths, get = [path], lambda: from_url(url, path)
    return Item(name, paths, source["what"], url, source["gigabytes"], source["by_hand"], get)


def from_url(url: str, path: Path) -> None:
    """Download to ``path``, by way of its folder, so that the last step is a renaming; goes on where it broke off."""
    kept = local_file(url, path.parent)
    kept.with_name(kept.name + ".sha256").replace(path.with_name(path.name + ".sha256"))
    kept.replace(path)


def from_drive(folder: str, path: Path, gigabytes: float) -> None:
    """Download the files of a public folder of Google Drive.

    Raises
    ------
    ConnectionError
        If gdown is not there or cannot get them.
    OSError
        If the disk has no room for them; what came before counts.
    """
    path.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(path).free / 1e9 + size(list(path.iterdir()))
    if gigabytes > room:
        raise OSError(f"there is room for {room:.1f} GB only: make some, or link {path} to another disk")
    try:
        import gdown
    except ImportError as error:
        raise ConnectionError("the package gdown is missing: pip install gdown") from error
    try:
        gdown.download_folder(id=folder, output=str(path), resume=True)
    except Exception as error:  # gdown raises its own and those of requests
        raise ConnectionError(f"gdown: {error}") from error


def check(item: Item) -> None:
    """Hold the files of an item to their recorded checksums; those without one get it now.

    Raises
    ------
    ValueError
        If a file has changed since.
    """
    for path in item.paths:
        record, digest = path.with_name(path.name + ".sha256"), checksum(path)
        if not record.is_file():
            with whole(record) as part:
                part.write_text(digest + "\n")
        elif record.read_text().strip() != digest:
            raise ValueError(f"{path} is not the file that it was: damaged or changed. To accept it, delete {record}")


def size(paths: list[Path]) -> float:
    """Gigabytes of files and folders."""
    files = [p for path in paths for p in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e9


def fetch(wanted: list[Item], download: bool = True, say: Callable[[str], object] = sys.stdout.write) -> bool:
    """Tell of each item whether it is there; download what is not, and check what is. Returns whether all is well."""
    well = True
    for item in wanted:
        missing = item.missing
        if missing:
            say(f"{item.name}: missing, {f'{item.gigabytes:g} GB' if item.gigabytes else 'size not known'}\n")
        try:
            if missing and download and item.get:
                item.get()
                missing = item.missing
            if not missing:
                check(item)
                say(f"{item.name}: there, {size(item.paths):.3g} GB, checksum as recorded\n")
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            say(f"  {error}\n")
            well = False
        if missing:
            say("".join(f"  {line}\n" for line in how_by_hand(item, missing)))
            well = False
    return well


def how_by_hand(item: Item, missing: list[Path]) -> list[str]:
    """Lines that tell how a missing file is given by hand."""
    lines = [f"what: {item.what}"] if item.what else []
    lines += [f"from: {item.url}"] if item.url else []
    lines += [f"by hand: {item.by_hand}"] if item.by_hand else []
    return [*lines, f"put it here (a link will do): {', '.join(map(str, missing))}"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scsae_utils.fetch", description=__doc__.splitlines()[0], epilog=NOTE
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--list", action="store_true", help="download nothing, only tell what is there")
    args = parser.parse_args(arguments)
    try:
        wanted = items(load_profile(args.profile), yaml.safe_load(SOURCES.read_text()))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if not wanted:
        sys.stdout.write("This profile needs no files: its cells, model and texts travel in packages.\n")
    if not fetch(wanted, download=not args.list):
        sys.exit(f"Not all is there. {NOTE}")


if __name__ == "__main__":
    main()
