"""Transient errors of a storage are retried; permanent ones become one line."""

import http.server
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.data.shards import ShardError, read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.storage import reading
from prioritycut_ray.storage.reading import fetched


class FailingHandler(http.server.BaseHTTPRequestHandler):
    """Serves a folder with byte ranges; fails as often as its server says."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.failures > 0:
            self.server.failures -= 1
            if self.server.status == 0:
                self.close_connection = True  # Hang up without an answer.
                return
            self.send_error(self.server.status)
            return
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    failures, status, asked, ranges = 0, 503, 0, True
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A data set of one clip behind a server on loopback, with short waits between attempts."""
    monkeypatch.setattr(reading, "FIRST_WAIT", 0.01)
    with ShardWriter(str(tmp_path)) as writer:
        writer.add(Member("clip", b"x" * 5000, 5, 25.0, 64, 64, "ann", "clip.mp4", False))
        writer.finish({"clip": "train"})
    with Server(("127.0.0.1", 0), FailingHandler) as server:
        server.folder = tmp_path
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_transient_errors_are_retried(server: Server, status: int, caplog: Any) -> None:
    index = read_index(server.url)
    server.failures, server.status, server.asked = 2, status, 0
    with caplog.at_level(logging.WARNING):
        assert read_clip(server.url, index.clips[0]) == b"x" * 5000
    assert server.asked >= 3
    logged = [record.getMessage() for record in caplog.records]
    assert logged
    assert f"{server.url}/shard-000000.tar: attempt 1 of 6 failed" in logged[0]


def test_errors_that_last_become_one_line(server: Server) -> None:
    server.failures, server.asked = 10**6, 0
    with pytest.raises(UserError, match=r"index\.arrow: cannot be read, tried 6 times") as caught:
        read_index(server.url)
    assert server.asked == reading.ATTEMPTS
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_not_retried(server: Server, status: int) -> None:
    server.failures, server.status, server.asked = 10**6, status, 0
    with pytest.raises(UserError, match=r"access denied .* credentials"):
        read_index(server.url)
    assert server.asked == 1


def test_a_server_without_range_requests_is_recognised(server: Server) -> None:
    index = read_index(server.url)
    server.ranges, server.asked = False, 0
    with pytest.raises(UserError, match=r"not support range requests.*use a server that does"):
        read_clip(server.url, index.clips[0])
    assert server.asked == 1


def test_a_remote_file_is_copied_while_it_is_needed(server: Server) -> None:
    with fetched(f"{server.url}/index.arrow?token=1") as copy:
        assert copy.name == "index.arrow"
        assert copy.read_bytes() == (server.folder / "index.arrow").read_bytes()
    assert not copy.exists()
    with fetched(str(server.folder / "index.arrow")) as same:
        assert same == server.folder / "index.arrow"
    with (
        pytest.raises(UserError, match="nowhere: there is no such file"),
        fetched(f"{server.url}/nowhere"),
    ):
        pass
    url = f"{server.url}/index.arrow"
    with pytest.raises(UserError, match=f"^{url}: is not a picture$"), fetched(url) as copy:
        raise UserError(f"{copy}: is not a picture")


def test_a_missing_file_is_not_retried(server: Server) -> None:
    clip = read_index(server.url).clips[0]
    (server.folder / clip.shard).unlink()
    server.asked = 0
    with pytest.raises(ShardError, match="the shard is missing"):
        read_clip(server.url, clip)
    assert server.asked == 1
    with pytest.raises(UserError, match="there is no index"):
        read_index(f"{server.url}/nowhere")


def test_an_unreachable_server_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "ATTEMPTS", 2)
    server.server_close()
    with pytest.raises(UserError, match="tried 2 times"):
        read_index("http://127.0.0.1:9/data")
