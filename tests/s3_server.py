"""A real S3 API that fails on request; as a script, it takes an address and prints its port.

``POST /fail?count=3&status=503&code=SlowDown`` makes the next three requests fail.
"""

import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class FailingOnRequest:
    """Middleware that fails requests before they reach the application."""

    def __init__(self, application: Wsgi) -> None:
        self.application = application
        self.count, self.status, self.code = 0, "503", "SlowDown"

    def __call__(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if request["PATH_INFO"] == "/fail":
            query = dict(urllib.parse.parse_qsl(request["QUERY_STRING"]))
            self.count, self.status, self.code = int(query["count"]), query["status"], query["code"]
            start("200 OK", [("Content-Length", "0")])
            return []
        if self.count > 0:
            self.count -= 1
            message = "failed on request"
            body = f"<Error><Code>{self.code}</Code><Message>{message}</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start(f"{self.status} Failed", headers)
            return [body if request["REQUEST_METHOD"] != "HEAD" else b""]
        return self.application(request, start)


class S3(NamedTuple):
    """A running server.

    Attributes:
        url: its address.
        variables: environment variables for its clients.
    """

    url: str
    variables: dict[str, str]

    def fail_next(self, count: int, status: int, code: str) -> None:
        """Make the next requests fail."""
        query = f"count={count}&status={status}&code={code}"
        urllib.request.urlopen(f"{self.url}/fail?{query}", data=b"", timeout=30).close()


@contextmanager
def s3_server(address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Iterator[S3]:
    """Run the server in its own process, so that tests may fork.

    Args:
        address: the address that it listens on.
        prefix: a command that runs it elsewhere, such as `ip netns exec NAME`.
    """
    process = subprocess.Popen(
        [*prefix, sys.executable, __file__, address],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        url = f"http://{address}:{int(process.stdout.readline())}"
        variables = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield S3(url, variables)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = FailingOnRequest(DomainDispatcherApplication(create_backend_app))
    server = make_server(sys.argv[1], 0, application, threaded=True)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
