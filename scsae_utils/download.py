"""Files by path or by URL; what is downloaded is kept, with a checksum that later uses are held to."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pooch
import requests
from pooch.utils import unique_file_name


def cache_folder() -> Path:
    """Where downloads are kept: the environment's ``SCSAE_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("SCSAE_CACHE") or pooch.os_cache("scsae-utils"))


def local_file(source: str | Path, folder: Path | None = None, timeout: float = 60) -> Path:
    """The local path of a file, downloaded on first use.

    Parameters
    ----------
    source
        A path, or a URL (http or https). A URL can end in ``#sha256=`` and the checksum that its file must have;
        without one, that of the first download is kept beside the file and holds from then on.
    folder
        Where downloads are kept; :func:`cache_folder` by default.
    timeout
        Seconds without an answer after which a download fails.

    Raises
    ------
    FileNotFoundError
        If a path is no file.
    ConnectionError
        If the download fails.
    ValueError
        If the file is not the one of the checksum.
    """
    source = str(source)
    if not re.match(r"https?://", source):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no file {source!r}")
        return Path(source)
    url, _, given = source.partition("#sha256=")
    if given and not re.fullmatch(r"[0-9a-f]{64}", given):
        raise ValueError(f"a sha256 checksum has 64 hexadecimal digits in lower case, not {given!r}")
    folder = folder or cache_folder()
    name = unique_file_name(url)
    record = folder / f"{name}.sha256"
    known = given or (record.read_text().strip() if record.is_file() else None)
    downloader = pooch.HTTPDownloader(timeout=timeout)
    try:
        path = Path(pooch.retrieve(url, known and f"sha256:{known}", name, folder, downloader=downloader))
    except requests.RequestException as error:
        raise ConnectionError(f"could not download {url}: {error}; give the file by its path instead") from error
    except ValueError as error:  # pooch: the new download has another checksum; what was there before stays
        raise ValueError(
            f"{url} is not the file with the checksum {known}: it has changed, or the download is damaged. "
            f"To accept the file as it is now, delete {record if not given else 'the checksum'}"
        ) from error
    if known is None:
        part = record.with_name(record.name + ".part")
        part.write_text(pooch.file_hash(str(path)) + "\n")
        part.replace(record)
    return path
