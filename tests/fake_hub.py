"""A Hugging Face hub on this machine: the few endpoints that a download needs."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

import huggingface_hub
import pytest

_LARGE = ('.safetensors', '.parquet')  # kept by their SHA-256, as the hub keeps large files


class FakeHub:
  """Repositories by (kind, 'owner/name'), each a list of commits: {path: content}.

  `requests` are the paths that were asked for.
  """

  def __init__(self):
    self.repositories: dict[tuple[str, str], list[dict[str, bytes]]] = {}
    self.requests: list[str] = []
    self.url = ''

  def push(self, kind: str, name: str, files: dict[str, bytes]) -> str:
    """Adds a commit, which `main` then is, and returns its name."""
    self.repositories.setdefault((kind, name), []).append(files)
    return commit_name(files)

  def find(self, kind: str, name: str, revision: str) -> dict[str, bytes] | None:
    """Returns the files of a revision, None where there are none."""
    commits = self.repositories.get((kind, name), [])
    if revision == 'main':
      return commits[-1] if commits else None
    for files in commits:
      if commit_name(files) == revision:
        return files
    return None


def commit_name(files: dict[str, bytes]) -> str:
  """Returns forty hex digits that depend on the files."""
  return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _record(path: str, content: bytes) -> dict:
  git = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
  record = {'type': 'file', 'path': path, 'size': len(content), 'oid': git}
  if path.endswith(_LARGE):
    digest = hashlib.sha256(content).hexdigest()
    record['lfs'] = {'oid': digest, 'size': len(content), 'pointerSize': 134}
  return record


def _told(files: dict[str, bytes] | None, name: str, what: str) -> tuple[bytes, dict] | None:
  """Answers what is in a revision."""
  if files is None:
    return None
  if what == 'tree':
    listed = [_record(path, content) for path, content in sorted(files.items())]
    return json.dumps(listed).encode(), {}
  siblings = [{'rfilename': path} for path in files]
  return json.dumps({'id': name, 'sha': commit_name(files), 'siblings': siblings}).encode(), {}


def _file(files: dict[str, bytes] | None, path: str) -> tuple[bytes, dict] | None:
  """Answers a file."""
  if files is None or path not in files:
    return None
  record = _record(path, files[path])
  etag = record.get('lfs', record)['oid']
  return files[path], {'ETag': f'"{etag}"', 'X-Repo-Commit': commit_name(files)}


def _handler(hub: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
      self._answer(body=False)

    def do_GET(self):
      self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
      path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
      hub.requests.append(path)
      api = re.fullmatch(r'/api/(model|dataset)s/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?', path)
      file = re.fullmatch(r'(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
      answer = None
      if api:
        answer = _told(hub.find(api[1], api[2], api[4]), api[2], api[3])
      elif file:
        answer = _file(hub.find('dataset' if file[1] else 'model', file[2], file[3]), file[4])
      status = 200 if answer else 404
      data, headers = answer or (b'{}', {'X-Error-Code': 'RepoNotFound'})
      self._send(status, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
      self.send_response(status)
      self.send_header('Content-Length', str(len(data)))
      self.send_header('Content-Type', 'application/json')
      for name, value in headers.items():
        self.send_header(name, value)
      self.end_headers()
      if body:
        self.wfile.write(data)

    def log_message(self, *values):
      """Says nothing."""

  return Handler


@contextlib.contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache) -> Iterator[FakeHub]:
  """Serves a hub, and makes huggingface_hub ask it and keep its files in `cache`."""
  hub = FakeHub()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _handler(hub))
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  hub.url = f'http://127.0.0.1:{server.server_address[1]}'
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
  template = hub.url + '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  try:
    yield hub
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
