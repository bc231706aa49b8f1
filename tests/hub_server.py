"""A small Hugging Face Hub on loopback, for the unmodified client: repositories, commits, LFS, tokens, and faults.

    with HubServer() as hub:
        hub.tokens['hf_secret'] = 'somebody'
        HF_ENDPOINT = hub.url

It serves what publishing and loading weights ask for: whoami-v2, repos/create, model info by revision, paths-info,
validate-yaml, preupload, LFS batch and PUT, commits as NDJSON with a parent, and resolve with the headers and redirects
that the client builds its cache on. A fault is a function of the request handler; if it returns True it has answered in
place of the server.
"""
import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


def blob_id(content: bytes) -> str:
    """As git has it."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Repo:
    def __init__(self, owner, private=False):
        self.owner, self.private = owner, private
        self.generation = len(REPOS_EVER)  # part of commit ids: a repository made again has others
        REPOS_EVER.append(self)
        self.commits = []  # (id, {path: (content, is_lfs)})
        self.add({'.gitattributes': (b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n', False)}, 'initial commit')

    def add(self, files, message):
        everything = {**(self.commits[-1][1] if self.commits else {}), **files}
        parts = [self.generation, message, len(self.commits)]
        parts += sorted((path, blob_id(content)) for path, (content, _) in everything.items())
        self.commits.append((hashlib.sha1(repr(parts).encode()).hexdigest(), everything))
        return self.head

    @property
    def head(self):
        return self.commits[-1][0]

    def at(self, revision):
        """The commit of a revision, None if there is none."""
        if revision == 'main':
            return self.commits[-1]
        return next((c for c in self.commits if c[0] == revision), None)


REPOS_EVER = []


class HubServer:
    def __init__(self):
        self.repos, self.lfs, self.tokens = {}, {}, {}
        self.faults = []
        self.requests = []  # (method, path, Authorization header), in order
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                pass

            def handle_any(self):
                self.route = unquote(urlsplit(self.path).path)
                length = int(self.headers.get('Content-Length') or 0)
                if self.headers.get('Transfer-Encoding') == 'chunked':
                    self.body = b''
                    while size := int(self.rfile.readline(), 16):
                        self.body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    self.body = self.rfile.read(length)
                token = (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None
                self.user = hub.tokens.get(token)
                self.bad_token = token is not None and self.user is None
                hub.requests.append((self.command, self.route, token))
                for fault in list(hub.faults):
                    if fault(self):
                        return
                hub.answer(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            # --- Answers

            def send(self, status, body=b'', **headers):
                if isinstance(body, (dict, list)):
                    body, headers['Content-Type'] = json.dumps(body).encode(), 'application/json'
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace('_', '-'), str(value))
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(body)

            def fail(self, status, code, message):
                self.send(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

            def cut(self):
                """End the connection as a broken network does."""
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def send_file(self, content, etag, commit):
                self.send(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def reset(self):
        for state in (self.repos, self.lfs, self.tokens, self.faults, self.requests):
            state.clear()

    # --- Routes

    def answer(self, request):
        method, path = request.command, request.route
        parts = path.strip('/').split('/')
        if request.bad_token:
            request.fail(401, 'InvalidToken', 'Invalid credentials in Authorization header')
        elif parts[:2] == ['api', 'whoami-v2']:
            if request.user is None:
                request.fail(401, 'InvalidToken', 'Invalid username or password.')
            else:
                request.send(200, {'type': 'user', 'name': request.user, 'fullname': request.user, 'orgs': [],
                                   'auth': {'type': 'access_token', 'accessToken': {'role': 'write'}}})
        elif parts == ['api', 'validate-yaml']:
            request.send(200, {'errors': [], 'warnings': []})
        elif parts == ['api', 'repos', 'create']:
            self.create(request)
        elif parts[:2] == ['api', 'models']:
            self.model(request, '/'.join(parts[2:4]), parts[4:])
        elif path.endswith('.git/info/lfs/objects/batch'):
            self.lfs_batch(request, '/'.join(parts[:2]).removesuffix('.git'))
        elif parts[0] == 'lfs' and method == 'PUT':
            self.lfs[parts[1]] = request.body
            request.send(200)
        elif parts[0] == 'cdn':
            content = self.lfs[parts[1]]
            request.send_file(content, parts[1], parts[2])
        elif len(parts) > 4 and parts[2] == 'resolve':
            self.resolve(request, '/'.join(parts[:2]), parts[3], '/'.join(parts[4:]))
        else:
            request.fail(404, 'NotFound', f'no such route: {method} {path}')

    def repo(self, request, name, write=False):
        """The repository, or None after an answer that says why not."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.user != repo.owner):
            request.fail(404 if request.user else 401, 'RepoNotFound', 'Repository not found')
            return None
        if write and request.user is None:
            request.fail(401, 'Unauthorized', 'Invalid username or password.')
            return None
        if write and request.user != repo.owner:
            request.fail(403, 'Forbidden', f'Forbidden: {request.user} may not write to {name}')
            return None
        return repo

    def create(self, request):
        wanted = json.loads(request.body)
        owner = wanted.get('organization') or request.user
        name = f'{owner}/{wanted["name"]}'
        if request.user is None:
            request.fail(401, 'Unauthorized', 'Invalid username or password.')
        elif name in self.repos:
            request.send(409, {'error': 'You already created this model repo', 'url': f'{self.url}/{name}'})
        elif owner != request.user:
            request.fail(403, 'Forbidden', f'You may not create a model under the namespace "{owner}"')
        else:
            self.repos[name] = Repo(owner, wanted.get('private') or wanted.get('visibility') == 'private')
            request.send(200, {'url': f'{self.url}/{name}', 'name': name, 'id': name})

    def model(self, request, name, rest):
        action = rest[0] if rest else 'info'
        repo = self.repo(request, name, write=action in ('preupload', 'commit'))
        if repo is None:
            return
        commit = repo.at(rest[1] if len(rest) > 1 else 'main')
        if commit is None:
            request.fail(404, 'RevisionNotFound', f'Invalid rev id: {rest[1]}')
        elif action in ('info', 'revision'):
            request.send(200, {
                '_id': name, 'id': name, 'modelId': name, 'sha': commit[0], 'private': repo.private, 'tags': [],
                'downloads': 0, 'likes': 0, 'siblings': [{'rfilename': path} for path in sorted(commit[1])]})
        elif action == 'paths-info':
            try:
                paths = json.loads(request.body)['paths']
            except ValueError:
                paths = parse_qs(request.body.decode())['paths']
            request.send(200, [self.entry(path, *commit[1][path]) for path in paths if path in commit[1]])
        elif action == 'preupload':
            request.send(200, {'files': [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular',
                 'shouldIgnore': False, 'oid': self.oid(commit, f['path'])}
                for f in json.loads(request.body)['files']]})
        elif action == 'commit':
            self.commit(request, name, repo)
        else:
            request.fail(404, 'NotFound', f'no such action: {action}')

    @staticmethod
    def oid(commit, path):
        return blob_id(commit[1][path][0]) if path in commit[1] else None

    @staticmethod
    def entry(path, content, is_lfs):
        entry = {'type': 'file', 'path': path, 'size': len(content), 'oid': blob_id(content)}
        if is_lfs:
            entry['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 134}
        return entry

    def lfs_batch(self, request, name):
        if self.repo(request, name, write=True) is None:
            return
        objects = []
        for wanted in json.loads(request.body)['objects']:
            known = {} if wanted['oid'] in self.lfs else {
                'actions': {'upload': {'href': f'{self.url}/lfs/{wanted["oid"]}', 'header': {}}}}
            objects.append({**wanted, **known})
        request.send(200, {'transfer': 'basic', 'objects': objects})

    def commit(self, request, name, repo):
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        parent = header['value'].get('parentCommit')
        if parent is not None and parent != repo.head:
            request.fail(412, 'PreconditionFailed', 'A commit has happened since. Please refresh and try again.')
            return
        files = {}
        for operation in operations:
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = (base64.b64decode(value['content']), False)
            elif operation['key'] == 'lfsFile':
                content = self.lfs.get(value['oid'])
                if content is None or hashlib.sha256(content).hexdigest() != value['oid']:
                    request.fail(400, 'LfsMissing', f'LFS pointer to a file that is not there: {value["path"]}')
                    return
                files[value['path']] = (content, True)
            else:
                request.fail(400, 'BadRequest', f'no such operation: {operation["key"]}')
                return
        head = repo.add(files, header['value']['summary'])
        request.send(200, {
            'success': True, 'commitOid': head, 'commitUrl': f'{self.url}/{name}/commit/{head}', 'hookOutput': ''})

    def resolve(self, request, name, revision, path):
        repo = self.repo(request, name)
        if repo is None:
            return
        commit = repo.at(revision)
        if commit is None:
            request.fail(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        elif path not in commit[1]:
            request.send(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound',
                         X_Error_Message='Entry not found', X_Repo_Commit=commit[0])
        else:
            content, is_lfs = commit[1][path]
            if is_lfs:
                etag = hashlib.sha256(content).hexdigest()
                self.lfs[etag] = self.lfs.get(etag, content)
                request.send(302, b'', Location=f'{self.url}/cdn/{etag}/{commit[0]}', X_Repo_Commit=commit[0],
                             X_Linked_Size=len(content), X_Linked_Etag=f'"{etag}"')
            else:
                request.send_file(content, blob_id(content), commit[0])
