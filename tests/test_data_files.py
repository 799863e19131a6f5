"""Files that are read back: regular ones alone, of a bounded size, and one line over what is damaged."""

import os
import socket

import pytest

from d2it.errors import UserError
from d2it.files import open_regular, read_bytes, read_json, sha256_of


def make(kind, path):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a fifo":
        os.mkfifo(path.with_name("fifo"))
        path.symlink_to(path.with_name("fifo"))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link that ends nowhere":
        path.symlink_to("nowhere")
    return path


KINDS = ("fifo", "socket", "folder", "link to a fifo", "device", "link that ends nowhere")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [open_regular, lambda path: read_bytes(path, 100), sha256_of])
def test_what_is_no_regular_file_is_an_error_and_no_wait(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)  # a socket's path is at most 108 bytes
    with pytest.raises(OSError, match="x") as caught:
        read(make(kind, (tmp_path / "x").relative_to(tmp_path)))
    assert caught.value.strerror


def test_bytes_up_to_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "x", 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"3",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1}x',
        b"\0" * 64,
    ],
)
def test_damaged_json_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is damaged") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_json_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "x.json") == {"a": [1, None]}
