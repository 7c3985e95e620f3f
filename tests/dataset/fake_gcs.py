"""A fake of Google Cloud Storage's XML API, as far as obstore speaks it. Not for production.

    python tests/dataset/fake_gcs.py PORT BUCKET

What it does not check: credentials, checksums, and how often one name is written.
"""

import hashlib
import http.server
import itertools
import re
import sys
import threading
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
CHANGED = "2026-11-29T00:00:00.000Z"  # nobody here asks when


@dataclass(frozen=True)
class Object:
    content: bytes
    generation: int

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.md5(self.content).hexdigest()}"',
            "Last-Modified": formatdate(0, usegmt=True),
            "x-goog-generation": str(self.generation),
        }


class Service:
    """The objects of one bucket, and the uploads in parts that are not complete."""

    def __init__(self, bucket: str):
        self.bucket = bucket
        self.lock = threading.Lock()
        self.objects: dict[str, Object] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.numbers = itertools.count(1)

    def put(self, name: str, content: bytes, expected: str | None = None) -> Object | None:
        """Returns the new object, or None if the old one's generation is not the expected one."""
        with self.lock:
            old = self.objects.get(name)
            if expected is not None and int(expected) != (old.generation if old else 0):
                return None
            self.objects[name] = Object(content, next(self.numbers))
            return self.objects[name]

    def listed(self, prefix: str, delimiter: str, after: str) -> tuple[list[str], bool]:
        """Returns a page of the sorted names, folders with "/" at their ends."""
        with self.lock:
            names = [name for name in self.objects if name.startswith(prefix)]
        if delimiter:
            cut = ((name, name.find(delimiter, len(prefix)) + 1) for name in names)
            names = [name[:end] if end else name for name, end in cut]
        left = sorted(name for name in {*names} if name > after)
        return left[:PAGE], len(left) > PAGE


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: Service

    def do_GET(self) -> None:
        name, asked = self._target()
        if name == "":
            self._list(asked)
        elif (found := self.service.objects.get(name)) is None:
            self._refuse(404, "NoSuchKey")
        elif part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), int(part[2] or len(found.content) - 1)
            body, size = found.content[start : end + 1], len(found.content)
            where = {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{size}"}
            self._answer(206, body, found.headers | where)
        else:
            self._answer(200, found.content, found.headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body, (name, asked) = self._body(), self._target()
        expected = self.headers.get("x-goog-if-generation-match")
        if name is None:
            self._refuse(404, "NoSuchBucket")
        elif "uploadId" in asked and asked["uploadId"] not in self.service.parts:
            self._refuse(404, "NoSuchUpload")
        elif "uploadId" in asked:
            self.service.parts[asked["uploadId"]][int(asked["partNumber"])] = body
            self._answer(200, headers=Object(body, 0).headers)
        elif stored := self.service.put(name, body, expected):
            self._answer(200, headers=stored.headers)
        else:
            self._refuse(412, "PreconditionFailed")

    def do_POST(self) -> None:
        body, (name, asked) = self._body(), self._target()
        if name is None:
            self._refuse(404, "NoSuchBucket")
        elif "x-goog-if-generation-match" in self.headers:
            self._refuse(400, "InvalidArgument")  # uploads in parts have no conditions
        elif "uploads" in asked:
            upload = f"upload-{next(self.service.numbers)}"
            self.service.parts[upload] = {}
            said = f"<UploadId>{upload}</UploadId>"
            self._xml(f"<InitiateMultipartUploadResult>{said}</InitiateMultipartUploadResult>")
        elif (parts := self.service.parts.pop(asked.get("uploadId"), None)) is None:
            self._refuse(404, "NoSuchUpload")
        else:
            order = map(int, re.findall(r"<PartNumber>(\d+)<", body.decode()))
            stored = self.service.put(name, b"".join(parts[number] for number in order))
            said = f"<ETag>{escape(stored.headers['ETag'])}</ETag>"
            said = f"<CompleteMultipartUploadResult>{said}</CompleteMultipartUploadResult>"
            self._xml(said, stored.headers)

    def do_DELETE(self) -> None:
        name, asked = self._target()
        if "uploadId" in asked:
            found = self.service.parts.pop(asked["uploadId"], None)
        else:
            with self.service.lock:
                found = self.service.objects.pop(name, None)
        if found is None:
            self._refuse(404, "NoSuchKey")
        else:
            self._answer(204)

    def _list(self, asked: dict[str, str]) -> None:
        delimiter = asked.get("delimiter", "")
        after = asked.get("continuation-token", asked.get("start-after", ""))
        page, has_more = self.service.listed(asked.get("prefix", ""), delimiter, after)
        said = [f"<IsTruncated>{str(has_more).lower()}</IsTruncated>"]
        if has_more:
            said.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for name in page:
            if delimiter and name.endswith(delimiter):
                said.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
            elif found := self.service.objects.get(name):
                said.append(
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(found.content)}</Size>"
                    f"<ETag>{escape(found.headers['ETag'])}</ETag>"
                    f"<LastModified>{CHANGED}</LastModified></Contents>"
                )
        self._xml(f"<ListBucketResult>{''.join(said)}</ListBucketResult>")

    def _target(self) -> tuple[str | None, dict[str, str]]:
        """Returns the object's name, "" for the bucket, None for another bucket; and the query."""
        url = urlsplit(self.path)
        bucket, _, name = unquote(url.path).lstrip("/").partition("/")
        asked = {key: values[0] for key, values in parse_qs(url.query, True).items()}
        return name if bucket == self.service.bucket else None, asked

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _xml(self, text: str, headers: dict[str, str] | None = None) -> None:
        self._answer(200, text.encode(), {"Content-Type": "application/xml", **(headers or {})})

    def _answer(self, status: int, body: bytes = b"", headers=None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def serve(port: int, bucket: str) -> None:
    Handler.service = Service(bucket)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
