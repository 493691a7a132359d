"""Files by path or by URL; what is downloaded is kept, with a checksum that later uses are held to."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pooch
import requests
from filelock import FileLock
from pooch.utils import unique_file_name
from tqdm.auto import tqdm
from urllib3.exceptions import HTTPError

from .files import whole

TRIES = 3  # of a download that breaks off on the way


def cache_folder() -> Path:
    """Where downloads are kept: the environment's ``SCSAE_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("SCSAE_CACHE") or pooch.os_cache("scsae-utils"))


def local_file(source: str | Path, folder: Path | None = None, timeout: float = 60, progress: bool = True) -> Path:
    """The local path of a file, downloaded on first use.

    A download that broke off goes on from there, also in a later call, if the server has the same file still and can
    give the rest of it. Several processes can ask for one file at the same time: one of them downloads it.

    Parameters
    ----------
    source
        A path, or a URL (http or https). A URL can end in ``#sha256=`` and the checksum that its file must have;
        without one, that of the first download is kept beside the file and holds from then on.
    folder
        Where downloads are kept; :func:`cache_folder` by default.
    timeout
        Seconds without an answer after which a download fails.
    progress
        Show a progress bar while a file is downloaded.

    Raises
    ------
    FileNotFoundError
        If a path is no file.
    ConnectionError
        If the download fails or breaks off.
    OSError
        If the disk has no room for the file; this is known before the download starts where the server gives its size.
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
    path = folder / unique_file_name(url)
    record = path.with_name(path.name + ".sha256")
    if is_kept(path, given, record):  # without the lock: a cache can be read-only
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if is_kept(path, given, record):
            return path
        known = given or (record.read_text().strip() if record.is_file() else None)
        new = path if path.is_file() and known is None else download(url, path, timeout, progress)
        digest = pooch.file_hash(str(new))
        if known not in (None, digest):  # what was there before stays
            new.unlink()
            raise ValueError(
                f"{url} is not the file with the checksum {known}: it has changed, or the download is damaged. "
                f"To accept the file as it is now, delete {record if not given else 'the checksum'}"
            )
        new.replace(path)
        if known is None:
            with whole(record) as part:
                part.write_text(digest + "\n")
    return path


def is_kept(path: Path, given: str, record: Path) -> bool:
    """Is the file there, with the checksum that was given or recorded?"""
    if not path.is_file() or not (given or record.is_file()):
        return False
    return pooch.file_hash(str(path)) == (given or record.read_text().strip())


def download(url: str, path: Path, timeout: float, progress: bool) -> Path:
    """Download to ``path.part``, or go on with it; the part, whole. Raises as :func:`local_file`."""
    part = path.with_name(path.name + ".part")
    for left in reversed(range(TRIES)):
        try:
            if fetch(url, part, timeout, progress):
                return part
        except requests.RequestException as error:
            raise ConnectionError(f"could not download {url}: {error}; give the file by its path instead") from error
        except HTTPError as error:
            if not left:
                raise ConnectionError(
                    f"the download of {url} broke off ({error}): try again, it goes on from there if the server can; "
                    "or give the file by its path"
                ) from error
    raise ConnectionError(f"the server of {url} gives other parts than it was asked for; give the file by its path")


def fetch(url: str, part: Path, timeout: float, progress: bool) -> bool:
    """One request for what ``part`` lacks; False if the answer could not be used, and there is no part any more.

    ``part.version`` holds what the server called the version that the part is of (ETag or Last-Modified). The server
    sends the rest only of that one, else all (If-Range of RFC 9110).
    """
    version = part.with_name(part.name + ".version")
    have = part.stat().st_size if part.is_file() and version.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # the file as it is kept there: sizes and checksums are of that
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.read_text()}
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as response:
        rest = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 416 or (response.status_code == 206 and not rest):
            part.unlink(missing_ok=True)
            return False
        response.raise_for_status()
        if response.status_code != 206:
            have = 0
            part.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        size = int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if size and size > free:
            raise OSError(
                errno.ENOSPC,
                f"{url} needs {size / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free in {part.parent}: "
                "make room, or set SCSAE_CACHE to another folder",
            )
        tag = response.headers.get("ETag", "W/")
        now = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag  # weak ones are no promise
        if now:
            version.write_text(now)
        with (
            part.open("ab") as file,
            tqdm(
                desc=f"downloading {url.rsplit('/', 1)[-1]}", initial=have, total=size and have + size,
                unit="B", unit_scale=True, disable=not progress,
            ) as bar,
        ):  # fmt: skip
            for chunk in response.raw.stream(1 << 20, decode_content=False):
                file.write(chunk)
                bar.update(len(chunk))
    version.unlink(missing_ok=True)
    return True
