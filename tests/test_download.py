"""Files by URL, from a real server on this machine: kept, held to their checksum, never half there."""

import hashlib
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
from server import serving

from scsae_utils import download
from scsae_utils.download import cache_folder, local_file

LONG = bytes(range(256)) * 100


def test_a_path_stays_what_it_is(tmp_path):
    (tmp_path / "a.gmt").write_text("x")
    assert local_file(tmp_path / "a.gmt") == tmp_path / "a.gmt"
    with pytest.raises(FileNotFoundError, match="no file 'nothing.gmt'"):
        local_file("nothing.gmt")


def test_a_download_is_made_once(tmp_path):
    with serving({"/sets.gmt": b"one"}) as (url, asked):
        paths = {local_file(f"{url}/sets.gmt", tmp_path) for _ in range(3)}
    assert len(paths) == 1 and paths.pop().read_bytes() == b"one"
    assert asked == ["/sets.gmt"]


def test_the_first_checksum_holds(tmp_path):
    pages = {"/sets.gmt": b"one"}
    with serving(pages) as (url, _):
        path = local_file(f"{url}/sets.gmt", tmp_path)
        path.write_bytes(b"damaged")
        assert local_file(f"{url}/sets.gmt", tmp_path).read_bytes() == b"one"  # downloaded again
        path.write_bytes(b"damaged")
        pages["/sets.gmt"] = b"another"
        with pytest.raises(ValueError, match=r"has changed, or the download is damaged.*delete .*\.sha256"):
            local_file(f"{url}/sets.gmt", tmp_path)
    assert path.read_bytes() == b"damaged"


def test_a_checksum_can_be_given(tmp_path):
    digest = hashlib.sha256(b"one").hexdigest()
    with serving({"/sets.gmt": b"one"}) as (url, _):
        assert local_file(f"{url}/sets.gmt#sha256={digest}", tmp_path).read_bytes() == b"one"
        with pytest.raises(ValueError, match="not the file with the checksum 0000"):
            local_file(f"{url}/sets.gmt#sha256={'0' * 64}", tmp_path)
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            local_file(f"{url}/sets.gmt#sha256=abc", tmp_path)


def test_what_fails_says_so_and_leaves_nothing(tmp_path):
    with serving({}) as (url, _), pytest.raises(ConnectionError, match="not download .*/sets.gmt.*404.*by its path"):
        local_file(f"{url}/sets.gmt", tmp_path)
    with pytest.raises(ConnectionError, match="could not download"):
        local_file(f"{url}/sets.gmt", tmp_path, timeout=2)  # nobody listens there any more
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("SCSAE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SCSAE_CACHE")
    assert cache_folder().name == "scsae-utils"


class TestInterrupted:
    def test_it_goes_on_from_there(self, tmp_path):
        with serving({"/a.h5ad": LONG}, stop_after=10_000) as (url, asked):
            assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG
        assert asked == ["/a.h5ad", "/a.h5ad@10000", "/a.h5ad@20000"]
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".h5ad", ".lock", ".sha256"]

    def test_also_in_a_later_call(self, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "TRIES", 1)
        with serving({"/a.h5ad": LONG}, stop_after=10_000, stops=1) as (url, asked):
            with pytest.raises(ConnectionError, match="broke off.*goes on from there.*by its path"):
                local_file(f"{url}/a.h5ad", tmp_path)
            assert not [path for path in tmp_path.iterdir() if path.suffix in (".h5ad", ".sha256")]
            assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG
        assert asked == ["/a.h5ad", "/a.h5ad@10000"]

    def test_not_with_a_file_that_has_changed_meanwhile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "TRIES", 1)
        pages = {"/a.h5ad": LONG}
        with serving(pages, stop_after=10_000, stops=1) as (url, asked):
            with pytest.raises(ConnectionError):
                local_file(f"{url}/a.h5ad", tmp_path)
            pages["/a.h5ad"] = LONG[::-1]
            assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG[::-1]
        assert asked == ["/a.h5ad"] * 2

    def test_from_the_start_where_the_server_cannot_go_on(self, tmp_path):
        with serving({"/a.h5ad": LONG}, stop_after=10_000, resumable=False, stops=2) as (url, asked):
            assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG
        assert asked == ["/a.h5ad"] * 3

    @pytest.mark.parametrize("length", [len(LONG), len(LONG) + 1])
    def test_from_the_start_if_there_is_no_rest(self, tmp_path, monkeypatch, length):
        monkeypatch.setattr(download, "TRIES", 2)
        with serving({"/a.h5ad": LONG}, stop_after=10_000, stops=2) as (url, asked):
            with pytest.raises(ConnectionError):
                local_file(f"{url}/a.h5ad", tmp_path)
            next(tmp_path.glob("*.part")).write_bytes(b"x" * length)
            assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG
        assert asked[2:] == [f"/a.h5ad@{length}", "/a.h5ad"]


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0 if folder.name == "full" else 10**9))
    with serving({"/a.h5ad": LONG}) as (url, _):
        assert local_file(f"{url}/a.h5ad", tmp_path).is_file()
        with pytest.raises(OSError, match=r"needs 0.0 GB more, and 0.0 GB are free in .*full.*SCSAE_CACHE"):
            local_file(f"{url}/a.h5ad", tmp_path / "full")
    assert [path.suffix for path in (tmp_path / "full").iterdir()] == [".lock"]


def test_one_of_several_processes_downloads(tmp_path):
    with serving({"/a.h5ad": LONG}) as (url, asked), ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: local_file(f"{url}/a.h5ad", tmp_path, progress=False), range(4)))
    assert len(paths) == 1 and paths.pop().read_bytes() == LONG and asked == ["/a.h5ad"]


def test_a_cache_that_cannot_be_written_can_be_read(tmp_path, monkeypatch):
    with serving({"/a.h5ad": LONG}) as (url, _):
        local_file(f"{url}/a.h5ad", tmp_path)
        monkeypatch.setattr(download, "FileLock", None)  # making one would fail there
        assert local_file(f"{url}/a.h5ad", tmp_path).read_bytes() == LONG
