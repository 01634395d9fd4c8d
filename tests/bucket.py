"""Object storage that lives as long as a test: as much of Google's JSON API, over HTTP, as gcsfs, tensorstore and orbax use.

https://cloud.google.com/storage/docs/json_api. With fake-gcs-server in its place the same commands do the same.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

PAGE = 7  # objects a page of a listing: few, so that there are several


class Bucket:
    """The bucket gs://bucket of a server of its own; all others do not exist."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  # by name: bytes, and the generation, which no two writes share
        self.uploads: dict[str, tuple[str, dict[str, str], bytes]] = {}  # resumable ones: name, query, bytes so far
        self.refusal: tuple[int, str] | None = None  # with which status and words everything is refused
        self.before_write: Callable[[str], None] = lambda name: None
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.server = Server(self)
        url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage, which orbax asks what kind of bucket it is
            "TENSORSTORE_GCS_HTTP_URL": url,
            # What asks by gRPC is not answered here, and nobody is to look for credentials on the way.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a token",
        }

    def write(self, name: str, data: bytes, query: dict[str, str]) -> tuple[int, Any]:
        """Store an object, where the generation that is there is the one expected; status and what to answer."""
        self.before_write(name)
        with self.lock:
            present = self.objects.get(name, (b"", 0))[1]
            if query.get("ifGenerationMatch", str(present)) != str(present):
                return 412, {"error": {"code": 412, "message": "conditionNotMet"}}
            self.objects[name] = data, next(self.numbers)
        return 200, self.resource(name)

    def resource(self, name: str) -> dict[str, Any]:
        """An object as the API describes it."""
        data, generation = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(data)), "generation": str(generation),
                "md5Hash": md5, "metageneration": "1", "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z"}  # fmt: skip

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        """A page of the objects, and of the prefixes that end in the delimiter, in their order."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: set[tuple[str, bool]] = set()  # name; whether it is a prefix
        for name in list(self.objects):
            if name.startswith(prefix) and name >= query.get("startOffset", ""):
                rest, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries.add((prefix + rest + delimiter, True) if found else (name, False))
        left = sorted(entry for entry in entries if entry[0] > query.get("pageToken", ""))
        page = left[: min(PAGE, int(query.get("maxResults", PAGE)))]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        answer["items"] = [self.resource(name) for name, is_prefix in page if not is_prefix and name in self.objects]
        answer["prefixes"] = [name for name, is_prefix in page if is_prefix]
        return answer | ({"nextPageToken": page[-1][0]} if len(left) > len(page) else {})


class Server(ThreadingHTTPServer):
    """Has a bucket, and takes no notice of those who were killed while they asked."""

    daemon_threads = True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: object) -> None:
        """Say nothing."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Send bytes, or an object as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked was killed
            self.wfile.write(data)

    def handle_request(self) -> None:
        """Whatever the method."""
        bucket = self.server.bucket
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
        if bucket.refusal is not None:
            status, words = bucket.refusal
            self.answer(status, {"error": {"code": status, "message": words, "errors": [{"message": words}]}})
        elif found is None:
            self.answer(501)
        elif found[2] != "bucket":
            self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        elif found[1] == "/upload":
            self.upload(bucket, query, data)
        elif found[3] is not None:
            self.one(bucket, unquote(found[3]), query)
        elif url.path.endswith("/o"):
            self.answer(200, bucket.list(query))
        else:
            self.answer(
                200, {"kind": "storage#bucket", "name": "bucket", "location": "HERE", "storageClass": "STANDARD"}
            )

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def one(self, bucket: Bucket, name: str, query: dict[str, str]) -> None:
        """Read, describe or delete an object."""
        data, generation = bucket.objects.get(name, (b"", 0))
        if not generation:
            self.answer(404, {"error": {"code": 404, "message": f"No such object: bucket/{name}"}})
        elif self.command == "DELETE":
            bucket.objects.pop(name, None)
            self.answer(204)
        elif query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        elif query.get("alt") != "media":
            self.answer(200, bucket.resource(name))
        else:
            headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(generation)}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked:
                start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                data = data[start:end]
            self.answer(206 if asked else 200, data, headers)

    def upload(self, bucket: Bucket, query: dict[str, str], data: bytes) -> None:
        """Write an object: at once, with its description before it, or in parts."""
        kind = query.get("uploadType")
        if kind == "media":
            self.answer(*bucket.write(query["name"], data, query))
        elif kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            described, content = message_from_bytes(head + data).get_payload()  # type: ignore[misc]
            name = json.loads(described.get_payload(decode=True))["name"]  # type: ignore[union-attr]
            self.answer(*bucket.write(name, content.get_payload(decode=True), query))  # type: ignore[union-attr, arg-type]
        elif "upload_id" not in query:
            upload = str(next(bucket.numbers))
            bucket.uploads[upload] = query.get("name") or json.loads(data)["name"], query, b""
            place = (
                f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={upload}"
            )
            self.answer(200, headers={"Location": place})
        else:
            name, first, before = bucket.uploads[query["upload_id"]]
            bucket.uploads[query["upload_id"]] = name, first, before + data
            if self.headers.get("Content-Range", "").endswith("/*"):
                self.answer(308, headers={"Range": f"bytes=0-{len(before + data) - 1}"})
            else:
                self.answer(*bucket.write(name, before + data, first))


@contextlib.contextmanager
def running() -> Iterator[Bucket]:
    """An empty bucket; commands find it by its ``environment``."""
    bucket = Bucket()
    thread = threading.Thread(target=bucket.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.server.shutdown()
        bucket.server.server_close()
