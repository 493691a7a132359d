"""Files by URL, from a real server on this machine: kept, held to their checksum, never half there."""

import hashlib

import pytest
from server import serving

from scsae_utils.download import cache_folder, local_file


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
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("SCSAE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SCSAE_CACHE")
    assert cache_folder().name == "scsae-utils"
