"""A Hub on the loopback interface, of the endpoints that huggingface_hub's client uses, with faults to order.

Repositories live in memory. Files of *.safetensors go through LFS as on the real Hub, others are sent within commits.
"""
import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_loopback_token'


class Repo:
    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit({}, 'main')

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        files = {**self.commits.get(self.branches.get(branch, ''), {}), **files}
        oid = hashlib.sha1(repr((len(self.commits), branch, sorted(files))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server and its state.

    Attributes:
        repos: Repositories by 'org/name'.
        requests: (method, path) of every request so far.
        fault: Called as fault(method, path, count) before each request, `count` being how often the same was requested
            before. Returns None for none, a status to answer with, or a number of bytes (as a float, a fraction of the
            body) after which the connection is cut.
        slow: Seconds to wait in the middle of each file.
        bare: Leave hashes of contents out of the headers of downloads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.reset()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: list[str | None] = []
        self.counts: Counter = Counter()
        self.fault: Callable[[str, str, int], Any] = lambda method, path, count: None
        self.slow = 0.
        self.bare = False

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, branch: str = 'main') -> str:
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            return repo.commit(files, branch)

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def asked(self, method: str, pattern: str) -> int:
        return sum(m == method and bool(re.search(pattern, p)) for m, p in self.requests)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _is_lfs(name: str) -> bool:
    return name.endswith('.safetensors')


def _blob(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        hub = self.state
        with hub.lock:
            hub.requests.append((self.command, path))
            hub.tokens.append(self.headers.get('Authorization'))
            count = hub.counts[self.command, path]
            hub.counts[self.command, path] += 1
        self.fault = hub.fault(self.command, path, count)
        if isinstance(self.fault, int):
            return self._answer({'error': 'ordered'}, self.fault)
        for methods, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                return handle(self, **match.groupdict())
        self._answer({'error': f'no such endpoint: {self.command} {path}'}, 404)

    def _answer(self, content: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._answer({'error': code}, status, {'X-Error-Code': code, 'X-Error-Message': code})

    def _authorized(self) -> bool:
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def _repo(self, repo: str) -> Repo | None:
        """The repository; what may not be seen is answered like what is not there, as the real Hub does."""
        found = self.state.repos.get(repo)
        if found is None or (found.private and not self._authorized()):
            self._error(404 if self._authorized() else 401, 'RepoNotFound')
            return None
        return found

    def _oid(self, repo: Repo, revision: str) -> str | None:
        oid = repo.resolve(revision)
        if oid is None:
            self._error(404, 'RevisionNotFound')
        return oid

    def _json(self) -> dict[str, Any]:
        return json.loads(self.body or b'{}')

    # reading

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self._repo(repo)
        oid = found and self._oid(found, revision)
        if not oid:
            return
        data = found.commits[oid].get(name)
        if data is None:
            return self._error(404, 'EntryNotFound')
        digest = hashlib.sha256(data).hexdigest()
        headers = {'X-Repo-Commit': oid, 'ETag': f'"{_blob(data)}"', 'Accept-Ranges': 'bytes'}
        if _is_lfs(name) and not self.state.bare:
            headers.update({'X-Linked-Etag': f'"{digest}"', 'X-Linked-Size': str(len(data))})
        data = self.state.blobs.get(f'damaged {digest}', data)
        start = int((re.match(r'bytes=(\d+)-', self.headers.get('Range') or '') or [0, 0])[1])
        self.send_response(206 if start else 200)
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        data = data[start:]
        for k, v in {**headers, 'Content-Length': str(len(data))}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command == 'HEAD':
            return
        middle = int(self.fault * len(data)) if isinstance(self.fault, float) else len(data) // 2
        self.wfile.write(data[:middle])
        if isinstance(self.fault, float):
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        time.sleep(self.state.slow)
        self.wfile.write(data[middle:])

    def info(self, repo: str, revision: str = 'main') -> None:
        found = self._repo(repo)
        oid = found and self._oid(found, revision)
        if not oid:
            return
        siblings = []
        for name, data in found.commits[oid].items():
            entry = dict(rfilename=name, size=len(data), blobId=_blob(data))
            if _is_lfs(name):
                entry['lfs'] = dict(sha256=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=134)
            siblings.append(entry if 'blobs' in self.query else dict(rfilename=name))
        self._answer(dict(
            id=repo, modelId=repo, sha=oid, private=found.private, siblings=siblings, tags=[], downloads=0))

    # writing

    def _may_write(self) -> bool:
        if not self._authorized():
            self._error(401, 'Unauthorized')
        return self._authorized()

    def create(self) -> None:
        if not self._may_write():
            return
        told = self._json()
        repo = '/'.join(filter(None, (told.get('organization'), told['name'])))
        url = f'{self.state.url}/{repo}'
        with self.state.lock:
            if repo in self.state.repos:
                return self._answer(dict(error='exists', url=url), 409)
            self.state.repos[repo] = Repo(bool(told.get('private')) or told.get('visibility') == 'private')
        self._answer(dict(url=url))

    def branch(self, repo: str, branch: str) -> None:
        found = self._may_write() and self._repo(repo)
        if not found:
            return
        if branch in found.branches:
            return self._answer(dict(error='exists'), 409)
        found.branches[branch] = found.branches['main']
        self._answer({})

    def yaml(self) -> None:
        self._answer(dict(errors=[], warnings=[]))

    def preupload(self, repo: str, revision: str) -> None:
        found = self._may_write() and self._repo(repo)
        oid = found and self._oid(found, revision)
        if not oid:
            return
        there = found.commits[oid]
        self._answer(dict(commitOid=oid, files=[
            dict(
                path=f['path'],
                uploadMode='lfs' if _is_lfs(f['path']) else 'regular',
                shouldIgnore=False,
                oid=_blob(there[f['path']]) if f['path'] in there else None,
            ) for f in self._json()['files']]))

    def batch(self, repo: str) -> None:
        if not (self._may_write() and self._repo(repo)):
            return
        objects = []
        for entry in self._json()['objects']:
            entry = dict(oid=entry['oid'], size=entry['size'])
            if entry['oid'] not in self.state.blobs:
                entry['actions'] = dict(
                    upload=dict(href=f'{self.state.url}/lfs/{entry["oid"]}', header={}),
                    verify=dict(href=f'{self.state.url}/lfs-verify', header={}))
            objects.append(entry)
        self._answer(dict(transfer='basic', objects=objects))

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, 'WrongContent')
        self.state.blobs[oid] = self.body
        self._answer({})

    def verify(self) -> None:
        told = self._json()
        data = self.state.blobs.get(told['oid'])
        self._answer({}, 200 if data is not None and len(data) == told['size'] else 404)

    def commit(self, repo: str, revision: str) -> None:
        found = self._may_write() and self._repo(repo)
        if not found or not self._oid(found, revision):
            return
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry['key'] == 'file':
                files[entry['value']['path']] = base64.b64decode(entry['value']['content'])
            elif entry['key'] == 'lfsFile':
                files[entry['value']['path']] = self.state.blobs[entry['value']['oid']]
        with self.state.lock:
            oid = found.commit(files, revision)
        url = f'{self.state.url}/{repo}/commit/{oid}'
        self._answer(dict(success=True, commitOid=oid, commitUrl=url, hookOutput=''))


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_ROUTES = [
    ('HEAD GET', rf'/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)', _Handler.file),
    ('GET', rf'/api/models/{_REPO}', _Handler.info),
    ('GET', rf'/api/models/{_REPO}/revision/(?P<revision>.+)', _Handler.info),
    ('POST', r'/api/repos/create', _Handler.create),
    ('POST', rf'/api/models/{_REPO}/branch/(?P<branch>.+)', _Handler.branch),
    ('POST', r'/api/validate-yaml', _Handler.yaml),
    ('POST', rf'/api/models/{_REPO}/preupload/(?P<revision>.+)', _Handler.preupload),
    ('POST', rf'/{_REPO}\.git/info/lfs/objects/batch', _Handler.batch),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', _Handler.put),
    ('POST', r'/lfs-verify', _Handler.verify),
    ('POST', rf'/api/models/{_REPO}/commit/(?P<revision>.+)', _Handler.commit),
]
