"""Publishing weights, loading and verifying them: the unmodified Hub client and timm against a Hub on loopback."""
import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from common import read_csv
from hub_server import HubServer, Repo
from huggingface_hub import ModelCard
from images import image_folder
from PIL import Image

from timm_gunn import verify
from timm_gunn.verify import known_weights

ROOT = Path(__file__).parent.parent
MODEL, REPO = 'gunn15.c10', 'me/gunn15.c10'
CLASSES = 10

CHILD = '''
import contextlib, io, json, sys, time, traceback
sleep, sys.argv = time.sleep, ['-c']
time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # the client waits for seconds before each new attempt
out = sys.stdout
for line in sys.stdin:
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(json.loads(line), {'__name__': 'test'})
        except BaseException as e:
            error = f'{type(e).__name__}: {e}'
            traceback.print_exc()
    print(json.dumps([printed.getvalue(), error]), file=out, flush=True)
'''


class Client:
    """A Python process whose Hub is the given one from its start on."""

    def __init__(self, hub, home, **env):
        self.cache = home / 'hub'
        home.mkdir(exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
        self.process = subprocess.Popen(
            [sys.executable, '-c', CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home, env={
                **clean, 'PYTHONPATH': str(ROOT), 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home),
                'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_ETAG_TIMEOUT': '5', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
                **env})

    def __call__(self, code, token='hf_good'):
        """What the code prints, and its exception in a line, or None."""
        setup = 'import os; os.environ.pop("HF_TOKEN", None)\n'
        if token is not None:
            setup += f'os.environ["HF_TOKEN"] = {token!r}\n'
        print(json.dumps(setup + textwrap.dedent(code)), file=self.process.stdin, flush=True)
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        result = json.loads(self.process.stdout.readline())
        timer.cancel()
        if token is not None:
            assert token not in str(result)
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope='module')
def hub_of_all():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope='module')
def client_of_all(hub_of_all, tmp_path_factory):
    client = Client(hub_of_all, tmp_path_factory.mktemp('home'))
    yield client
    client.close()


@pytest.fixture
def hub(hub_of_all):
    hub_of_all.reset()
    hub_of_all.tokens.update(hf_good='me', hf_other='somebody-else')
    return hub_of_all


@pytest.fixture
def client(hub, client_of_all):
    shutil.rmtree(client_of_all.cache, ignore_errors=True)
    return client_of_all


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp('images'), dict(test=2), CLASSES)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """As a training leaves it: raw weights and their average."""
    path = tmp_path_factory.mktemp('checkpoint') / 'last.pth.tar'
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model(MODEL)
        torch.nn.init.normal_(model.head.fc.weight)
        states.append(model.state_dict())
    compiled = {f'_orig_mod.{k}': v for k, v in states[0].items()}
    torch.save(dict(epoch=3, arch='gunn15', args=argparse.Namespace(model='gunn15'), state_dict=compiled,
                    state_dict_ema=states[1]), path)
    return path


def raw_weights(checkpoint):
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(checkpoint, weights_only=True)
    return {k.removeprefix('_orig_mod.'): v for k, v in state['state_dict'].items()}


@pytest.fixture
def publish(client, images, checkpoint, tmp_path):
    """publish('--push', ...) is the command, with what it needs."""
    def call(*options, token='hf_good', checkpoint=checkpoint):
        argv = [str(checkpoint), '--model', MODEL, '--repo', REPO, '--weights', 'raw', '--data-dir', str(images),
                '--dataset-name', 'noise', '--training-command', 'python train.py --model gunn15', '--output',
                str(tmp_path / 'folder'), '--device', 'cpu', *options]
        return client(f'from weights.publish import main; main({argv!r})', token=token)

    call.folder, call.checkpoint = tmp_path / 'folder', checkpoint
    return call


def pinned(hub, folder):
    """Code that gives the name gunn15.c10 the weights published last, as the printed lines would."""
    return f'''
        import json, pathlib, timm, timm_gunn.verify
        from timm.models._registry import _model_pretrained_cfgs
        cfg = _model_pretrained_cfgs["{MODEL}"]
        cfg.file, cfg.hf_hub_id = None, "{REPO}@{hub.repos[REPO].head}"
        known = json.loads(pathlib.Path({str(folder)!r}, "fingerprint.json").read_text())
        timm_gunn.verify.known_weights = lambda: {{"{MODEL}": known}}'''


LOAD = '''
        import timm
        model = timm.create_model({!r}, pretrained=True)
        print("fc", model.head.fc.weight.double().sum().item())'''
VERIFY = f'''
        print("status", timm_gunn.verify.main(["{MODEL}"]))'''


def loaded(result):
    """The number that LOAD prints."""
    printed, error = result
    assert error is None, printed
    return float(printed.split('fc ')[1].split()[0])


def expected(folder):
    return safetensors.torch.load_file(folder / 'model.safetensors')['head.fc.weight'].double().sum().item()


def lfs_content(hub, change):
    """Let the Hub serve other bytes than it announces: change(content) in place of the weights."""
    def fault(request):
        parts = request.route.strip('/').split('/')
        if parts[0] != 'cdn' or request.command != 'GET':
            return False
        request.send_file(change(hub.lfs[parts[1]]), parts[1], parts[2])
        return True

    hub.faults.append(fault)


def test_dry_run_writes_the_folder(hub, publish, checkpoint, images):
    printed, error = publish()
    assert error is None, printed
    folder = publish.folder
    assert sorted(p.name for p in folder.iterdir()) == [
        'README.md', 'config.json', 'fingerprint.json', 'model.safetensors']
    assert f'--push would upload these to https://huggingface.co/{REPO}' in printed
    assert not hub.requests
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # nothing that the owner alone can read

    state = raw_weights(checkpoint)
    saved = safetensors.torch.load_file(folder / 'model.safetensors')
    assert state.keys() == saved.keys()
    assert all(torch.equal(v.half() if v.ndim > 1 else v, saved[k]) for k, v in state.items())
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'gunn15'
    assert config['num_classes'] == CLASSES
    assert 'num_classes' not in config.get('model_args', {})
    assert config['pretrained_cfg']['tag'] == 'c10'
    assert config['pretrained_cfg']['license'] == 'apache-2.0'
    assert config['pretrained_cfg']['mean'] == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255])
    fingerprint = json.loads((folder / 'fingerprint.json').read_text())
    assert fingerprint['sha256'] == hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
    assert len(fingerprint['logits']) == CLASSES

    # The card's numbers are those of the file on the images.
    model = timm.create_model(MODEL, checkpoint_path=str(folder / 'model.safetensors')).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    right = total = 0
    with torch.no_grad():
        for c in range(CLASSES):
            for path in (images / 'test' / f'class{c}').iterdir():
                right += model(transform(Image.open(path))[None]).argmax().item() == c
                total += 1
    card = ModelCard.load(folder / 'README.md')
    assert card.data.license == 'apache-2.0'
    assert card.data.library_name == 'timm'
    top1, top5 = card.data.eval_results
    assert top1.metric_value == pytest.approx(100 * right / total, abs=1e-3)
    assert top5.metric_value >= top1.metric_value
    assert (top1.dataset_name, top1.dataset_split, top1.metric_type) == ('noise', 'test', 'accuracy')
    for text in (
            fingerprint['sha256'], 'python train.py --model gunn15', f"'hf-hub:{REPO}'", f'torch {torch.__version__}',
            f'| noise, test | {total} | {100 - 100 * right / total:.2f} |', '1,585,746', 'raw, not averaged'):
        assert text in card.text


def test_publish_then_load_every_way(hub, client, publish):
    printed, error = publish('--push', '--weights', 'ema')
    assert error is None, printed
    head = hub.repos[REPO].head
    fc = expected(publish.folder)
    assert fc != raw_weights(publish.checkpoint)['head.fc.weight'].double().sum()
    for name in (f'hf-hub:{REPO}', f'hf-hub:{REPO}@{head}'):
        assert loaded(client(LOAD.format(name), token=None)) == fc
    pin = pinned(hub, publish.folder)
    for name in (MODEL, 'gunn15'):
        assert loaded(client(pin + LOAD.format(name))) == fc
    assert 'status 0' in client(pin + VERIFY)[0]

    # From the cache, without a network.
    offline = Client(hub, client.cache.parent, HF_HUB_OFFLINE='1')
    try:
        before = len(hub.requests)
        assert loaded(offline(pin + LOAD.format(MODEL))) == fc
        assert 'status 0' in offline(pin + VERIFY)[0]
        _, error = offline(LOAD.format('hf-hub:me/other'))
        assert 'LocalEntryNotFoundError' in error
        assert len(hub.requests) == before
    finally:
        offline.close()


def test_the_printed_lines_make_it_pretrained(hub, publish, tmp_path):
    """In a copy of the package, where they are pasted."""
    printed, error = publish('--push')
    assert error is None, printed
    entry, = re.findall(rf"^    '{MODEL}': .*,$", printed, re.MULTILINE)
    record, = re.findall(rf'^    ("{MODEL}": .*)$', printed, re.MULTILINE)
    shutil.copytree(ROOT / 'timm_gunn', tmp_path / 'copy' / 'timm_gunn')
    source = tmp_path / 'copy' / 'timm_gunn' / 'gunn.py'
    code, count = re.subn(rf"^    '{MODEL}': .*,$", entry, source.read_text(), flags=re.MULTILINE)
    assert count == 1
    source.write_text(code)
    known = {**known_weights(), **json.loads(f'{{{record}}}')}
    (source.parent / 'fingerprints.json').write_text(json.dumps(known))
    client = Client(hub, tmp_path / 'home', PYTHONPATH=str(tmp_path / 'copy'))
    try:
        where = client('import timm_gunn; print(timm_gunn.__file__)')[0]
        assert str(tmp_path / 'copy') in where
        assert loaded(client(LOAD.format('gunn15'))) == expected(publish.folder)
        result = client('\n        import timm_gunn.verify' + VERIFY)
        assert 'status 0' in result[0], result
    finally:
        client.close()


def test_second_publish_makes_no_commit(hub, publish):
    printed, error = publish('--push')
    assert error is None, printed
    commits = len(hub.repos[REPO].commits)
    printed, error = publish('--push')
    assert error is None, printed
    assert f'{REPO} has all of this already, at {hub.repos[REPO].head}: no commit' in printed
    assert len(hub.repos[REPO].commits) == commits
    # Other weights are a new commit, on the old one.
    printed, error = publish('--push', '--weights', 'ema')
    assert error is None, printed
    assert len(hub.repos[REPO].commits) == commits + 1


def test_the_token_stays_secret(hub, publish, tmp_path):
    assert publish('--push')[1] is None
    assert all(b'hf_good' not in path.read_bytes() for path in publish.folder.iterdir())
    assert all(b'hf_good' not in content for content, _ in hub.repos[REPO].commits[-1][1].values())
    for text in ('hf_good', 'hf_' + 'a1B2' * 8):  # one's own, and what looks like one
        _, error = publish('--training-command', f'HF_TOKEN={text} python train.py')
        assert error == (
            'SystemExit: README.md would hold an access token; expected a checkpoint and arguments without one')
    safetensors.torch.save_file(raw_weights(publish.checkpoint), tmp_path / 'x.safetensors', dict(of='hf_good'))
    _, error = publish(checkpoint=tmp_path / 'x.safetensors')
    assert 'model.safetensors would hold an access token' in error


@pytest.mark.parametrize('token', [None, 'hf_bad'])
def test_no_token_or_a_bad_one(hub, publish, token):
    _, error = publish('--push', token=token)
    assert 'Log in by `hf auth login`, or set HF_TOKEN to a token that may write. Nothing has been uploaded.' in error
    assert not hub.repos


def test_a_repository_of_somebody_else(hub, publish):
    assert publish('--push')[1] is None
    head = hub.repos[REPO].head
    _, error = publish('--push', '--weights', 'ema', token='hf_other')
    assert 'Expected a token with write access, and a repository of your own.' in error
    assert f'No commit has been made to {REPO}.' in error
    assert hub.repos[REPO].head == head
    hub.repos.clear()
    _, error = publish('--push', token='hf_other')
    assert 'Expected a token with write access, and a repository of your own.' in error
    assert f'There is no repository {REPO} that this token can see: nothing has been uploaded.' in error
    assert not hub.repos


def test_visibility(hub, publish):
    assert publish('--push', '--private')[1] is None
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    _, error = publish('--push', '--private', '--weights', 'ema')
    assert f'{REPO} is public; expected a private repository, or no --private. No commit has been made' in error


def test_no_pickles_beside_the_weights(hub, publish):
    hub.repos[REPO] = Repo('me')
    hub.repos[REPO].add({'pytorch_model.bin': (b'old', False), 'last.pth.tar': (b'old', False)}, 'old')
    _, error = publish('--push')
    assert f'{REPO} holds last.pth.tar, pytorch_model.bin; expected none that is loaded by pickle: remove' in error
    assert f'No commit has been made to {REPO}.' in error


def test_a_card_that_the_hub_refuses(hub, publish):
    def refuse(request):
        if request.route != '/api/validate-yaml':
            return False
        request.send(400, {'errors': [{'message': '"license" must be one of these'}], 'warnings': []})
        return True

    hub.faults.append(refuse)
    _, error = publish('--push', '--license', 'wtf')
    assert 'must be one of these' in error
    if int(huggingface_hub.__version__.split('.')[0]) < 1:  # asks this Hub with the upload only
        assert EMPTY in error
    else:
        assert 'Nothing has been uploaded.' in error
        assert not hub.repos


def failing(route, status=500):
    """A fault: the Hub fails at a route."""
    def fault(request):
        if route not in request.route:
            return False
        request.fail(status, 'Failure', 'out of order')
        return True

    return fault


def cutting(route, method, answer_first=False):
    """A fault: the connection breaks at a route, before the Hub has done what was asked or after it."""
    def fault(request):
        if route not in request.route or request.command != method:
            return False
        if answer_first:
            request.wfile = io.BytesIO()  # does its work, and the answer gets lost
            hub = request.server.hub
            hub.answer(request)
        request.cut()
        return True

    return fault


NO_REPO = f'There is no repository {REPO} that this token can see: nothing has been uploaded.'
EMPTY = f'The repository {REPO} is there, without weights.'


@pytest.mark.parametrize(('fault', 'message', 'commits'), [pytest.param(*values, id=name) for name, values in {
    'hub is gone': (cutting('/api/', 'GET'), 'Nothing has been uploaded.', None),
    'create fails': (failing('/repos/create', 500), NO_REPO, None),
    'lfs fails': (failing('/lfs/', 400), EMPTY, 1),
    'commit fails': (failing('/commit/', 400), EMPTY, 1),
    'commit is unavailable': (failing('/commit/', 503), EMPTY, 1),
    'create is cut': (cutting('/repos/create', 'POST'), NO_REPO, None),
    'answer to create is lost': (cutting('/repos/create', 'POST', answer_first=True), EMPTY, 1),
    'lfs is cut': (cutting('/lfs/', 'PUT'), EMPTY, 1),
    'commit is cut': (cutting('/commit/', 'POST'), EMPTY, 1),
    'answer to commit is lost': (cutting('/commit/', 'POST', answer_first=True), 'not yet checked: publish again', 2),
    'download is cut': (cutting('/cdn/', 'GET'), 'has not passed its checks: do not use it before it has.', 2),
}.items()])
def test_an_upload_that_fails_says_what_remains(hub, publish, fault, message, commits):
    """And publishing again, with the Hub in order, ends well."""
    hub.faults.append(fault)
    printed, error = publish('--push')
    assert message in error, printed
    assert 'Traceback' not in error
    assert (len(hub.repos[REPO].commits) if REPO in hub.repos else None) == commits
    assert expected(publish.folder)
    hub.faults.clear()
    printed, error = publish('--push')
    assert error is None, printed
    assert len(hub.repos[REPO].commits) == 2


def test_a_commit_in_the_meantime(hub, publish):
    assert publish('--push')[1] is None

    def somebody(request):
        if request.route.endswith('/preupload/main'):
            hub.repos[REPO].add({'note': (b'mine', False)}, 'note')
            hub.faults.clear()
        return False

    hub.faults.append(somebody)
    _, error = publish('--push', '--weights', 'ema')
    assert f'{REPO} has got the commit {hub.repos[REPO].head} from somebody else in the meantime: look at it' in error
    assert 'note' in hub.repos[REPO].commits[-1][1]
    assert len(hub.repos[REPO].commits) == 3


def test_what_the_hub_made_of_it_is_checked(hub, publish):
    """A Hub whose commit has another file."""
    def other_file(request):
        if request.route.endswith('/commit/main') and request.command == 'POST':
            hub.faults.clear()
            hub.answer(request)
            files = hub.repos[REPO].commits[-1][1]
            files['model.safetensors'] = (files['model.safetensors'][0][:-1] + b'x', True)
            return True
        return False

    hub.faults.append(other_file)
    _, error = publish('--push')
    assert f'{REPO} has other contents in model.safetensors. The commit {hub.repos[REPO].head} is in {REPO}' in error
    assert 'has not passed its checks: do not use it before it has' in error


def test_what_is_served_is_not_taken_from_the_cache(hub, client, publish):
    """A Hub that has the right file, after a publication that went well, and serves other bytes."""
    assert publish('--push')[1] is None
    assert client(LOAD.format(f'hf-hub:{REPO}@{hub.repos[REPO].head}'))[1] is None
    lfs_content(hub, lambda content: content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
    _, error = publish('--push')
    assert re.search(f'{REPO} serves a model.safetensors of sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}', error)


def test_a_hub_that_repeats_the_token(hub, publish):
    token = 'hf_' + 'a1B2' * 8
    hub.tokens[token] = 'me'

    def fault(request):
        if '/commit/' not in request.route:
            return False
        request.fail(400, 'Failure', f'you said {request.headers["Authorization"]}')
        return True

    hub.faults.append(fault)
    _, error = publish('--push', token=token)  # the client's fixture looks for the token in all of the output
    assert 'you said Bearer ***' in error
    # Of a token that is somebody else's, too.
    hub.faults[:] = [lambda request: '/commit/' in request.route and (
        request.fail(400, 'Failure', f'you said hf_{"c3D4" * 8}') or True)]
    assert 'you said ***' in publish('--push')[1]


def test_a_repository_from_somebody_else_meanwhile(hub, publish):
    """It is not called one that has been created here."""
    def somebody(request):
        if request.route == '/api/repos/create':
            hub.repos[REPO] = Repo('me')
            hub.repos[REPO].add({'model.safetensors': (b'theirs', True)}, 'theirs')
        return False

    hub.faults.append(somebody)
    _, error = publish('--push')
    assert 'Somebody has it, or the token may not see it.' in error
    assert f'No commit has been made to {REPO}.' in error
    # One that is there and that the token does not see.
    hub.faults.clear()
    hub.repos[REPO] = Repo('somebody-else', private=True)
    _, error = publish('--push')
    assert 'Somebody has it, or the token may not see it.' in error
    assert NO_REPO in error


# --- Loading, when something is wrong ---

@pytest.fixture
def published(hub, client, publish):
    printed, error = publish('--push')
    assert error is None, printed
    shutil.rmtree(client.cache, ignore_errors=True)
    return pinned(hub, publish.folder)


def test_connection_cut_always(hub, client, publish, published):
    def cut(request):
        if request.route.startswith('/cdn') and request.command == 'GET':
            request.cut()
            return True
        return False

    hub.faults.append(cut)
    _, error = client(published + LOAD.format(MODEL))
    assert re.search('disconnected|broken|aborted|reset', error), error
    assert not list(client.cache.rglob('model.safetensors'))  # nothing that a later load could take for the weights
    printed, error = client(published + VERIFY)
    assert error is None, printed
    assert 'status 1' in printed
    hub.faults.clear()
    assert loaded(client(published + LOAD.format(MODEL))) == expected(publish.folder)


def test_short_body(hub, client, publish, published):
    lfs_content(hub, lambda content: content[:-1000])
    _, error = client(published + LOAD.format(MODEL))
    assert 'Consistency check failed' in error
    assert 'force_download=True' in error
    assert not list(client.cache.rglob('model.safetensors'))
    hub.faults.clear()
    assert loaded(client(published + LOAD.format(MODEL))) == expected(publish.folder)


def test_damaged_header(hub, client, published):
    lfs_content(hub, lambda content: b'\xff' * 8 + content[8:])
    _, error = client(published + LOAD.format(MODEL))
    assert 'SafetensorError' in error
    assert_verify_tells(client(published + VERIFY))


def assert_verify_tells(result):
    printed, error = result
    assert error is None, printed
    assert 'status 1' in printed
    assert 'it is damaged or another file. Remove ' in printed


def test_damaged_tensor(hub, client, publish, published):
    """One bit: it loads without a word, and verify tells."""
    lfs_content(hub, lambda content: content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
    assert client(published + LOAD.format(MODEL))[1] is None
    result = client(published + VERIFY)
    assert_verify_tells(result)
    # Its advice helps.
    hub.faults.clear()
    assert 'status 1' in client(published + VERIFY)[0]
    Path(re.search('Remove (.*); it is then downloaded again', result[0])[1]).unlink()
    assert 'status 0' in client(published + VERIFY)[0]


def test_a_stranger_with_the_same_name(hub, client, publish, published, tmp_path):
    """The pinned config does not load what somebody else has put under a name that has become free."""
    torch.manual_seed(5)
    safetensors.torch.save_file(timm.create_model(MODEL).state_dict(), tmp_path / 'x')
    files = {'config.json': hub.repos[REPO].commits[-1][1]['config.json'],
             'model.safetensors': ((tmp_path / 'x').read_bytes(), True)}
    del hub.repos[REPO]
    _, error = client(published + LOAD.format(MODEL))
    assert 'RepositoryNotFoundError' in error
    hub.repos[REPO] = Repo('somebody-else')
    hub.repos[REPO].add(files, 'mine')
    _, error = client(published + LOAD.format(MODEL))
    assert 'RevisionNotFoundError' in error
    printed, error = client(published + VERIFY)
    assert error is None
    assert 'status 1' in printed
    assert 'RevisionNotFoundError' in printed
    assert 'do not load them without their commit' in printed
    # Without a pin they come in silence.
    assert loaded(client(LOAD.format(f'hf-hub:{REPO}'))) != expected(publish.folder)


# --- What is not fit to be published ---

STEM = 'stem.conv.weight'
UNFIT = {  # what is made of the raw weights, and the error that says so
    'nan': (lambda raw: dict(state_dict={**raw, STEM: raw[STEM].index_fill(0, torch.tensor(0), torch.nan)}),
            f'{STEM} has values that are not finite'),
    'float16': (lambda raw: dict(state_dict={**raw, STEM: raw[STEM].half()}),
                f'expected torch.float32, got {STEM} in torch.float16'),
    'missing': (lambda raw: dict(state_dict={k: v for k, v in raw.items() if k != STEM}), f'does not fit {MODEL}: '),
    'shape': (lambda raw: dict(state_dict={**raw, 'head.fc.bias': torch.zeros(7)}), 'size mismatch for head.fc.bias'),
    'overflow': (lambda raw: dict(state_dict={**raw, 'head.fc.weight': raw['head.fc.weight'].fill_(1e38)}),
                 'losses or logits are not finite, though the weights are'),
    'another network': (lambda raw: dict(state_dict=raw, arch='sunn15'),
                        'is of sunn15; expected --model sunn15.TAG, got one of gunn15'),
    'another network on the Hub': (lambda raw: dict(state_dict=raw, arch='hf-hub:me/sunn15.c10@abc'),
                                   'is of sunn15; expected --model sunn15.TAG'),
    'other arguments of our trainer': (
        lambda raw: dict(state_dict=raw, settings=dict(model_kwargs=dict(ordered=False, fused=False))),
        "the model arguments {'ordered': False}; expected gunn15"),
    "other arguments of timm's": (
        lambda raw: dict(state_dict=raw, args=argparse.Namespace(model_kwargs=dict(residual=False))),
        "the model arguments {'residual': False}; expected gunn15"),
    'other preprocessing': (
        lambda raw: dict(state_dict=raw, args=argparse.Namespace(model_kwargs={}, mean=[0.5, 0.5, 0.5], std=None)),
        'was trained with --mean [0.5, 0.5, 0.5]; expected that of the model, (0.49'),
    'no checkpoint': (lambda raw: raw, 'a state dict by itself is taken as .safetensors'),
    'no state': (lambda raw: [1, 2], 'expected state_dict for --weights raw, got list'),
    'ema alone': (lambda raw: dict(state_dict_ema=raw),
                  "expected state_dict for --weights raw, got ['state_dict_ema']"),
}


@pytest.mark.parametrize(('change', 'message'), UNFIT.values(), ids=UNFIT)
def test_unfit_weights(hub, publish, tmp_path, change, message):
    """Nothing is uploaded, and the folder of an earlier publication stays."""
    publish.folder.mkdir()
    (publish.folder / 'fingerprint.json').write_text('earlier')
    torch.save(change(raw_weights(publish.checkpoint)), tmp_path / 'broken.pth.tar')
    _, error = publish('--push', checkpoint=tmp_path / 'broken.pth.tar')
    assert message in error
    assert [p.read_text() for p in publish.folder.iterdir()] == ['earlier']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['broken.pth.tar', 'folder']
    assert not hub.requests


def test_weights_that_are_known_under_another_name(hub, publish):
    """GUNN-15 and SUNN-15 have tensors of the same names and shapes; a bare file does not say which it is of."""
    path = Path(timm.get_pretrained_cfg('sunn15.c10').file)
    _, error = publish('--push', checkpoint=path)
    assert 'holds the weights of sunn15.c10; expected --model sunn15.c10, got gunn15.c10' in error
    assert not publish.folder.exists()
    assert not hub.requests


def test_only_what_was_published_is_replaced(publish, tmp_path):
    (publish.folder / 'deeper').mkdir(parents=True)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'README.md').write_text('mine')
    for options, message in (
            ([], 'expected an --output that is new or holds what was published'),
            (['--output', str(tmp_path / 'mine')], 'expected an --output that is new or holds what was published'),
            (['--output', str(tmp_path / 'mine' / 'README.md' / 'x')], 'expected an --output of its own, in a folder'),
            (['--output', '.'], 'expected an --output of its own')):
        printed, error = publish(*options)
        assert error == 'SystemExit: 2'
        assert message in printed
    # A link is followed.
    (tmp_path / 'there').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'there')
    for _ in range(2):
        assert publish('--output', str(tmp_path / 'link'))[1] is None
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'there' / 'README.md').exists()


def test_weights_of_our_trainer(hub, publish, images, tmp_path):
    """Published from its checkpoint or from its file, they have the sha256 of its result."""
    import train_cifar
    data = tmp_path / 'data'
    data.mkdir()
    for split in ('train', 'test'):
        (data / split).symlink_to(images / 'test')
    train_cifar.main([
        '--data-dir', str(data), '--output', str(tmp_path / 'run'), '--device', 'cpu', '--batch-size', '8', '--epochs',
        '1', '--schedule', 'onecycle'])
    result, = read_csv(tmp_path / 'run' / 'result.csv')
    for file in ('last.pth.tar', 'model.safetensors'):
        printed, error = publish(checkpoint=tmp_path / 'run' / file)
        assert error is None, printed
        assert hashlib.sha256((publish.folder / 'model.safetensors').read_bytes()).hexdigest() == result['sha256']
        assert f'| {float(result["error"]):.2f} |' in (publish.folder / 'README.md').read_text()


def test_checkpoints_that_compute_the_same(publish, tmp_path):
    """Of weights that began on the Hub, and of arguments that change nothing."""
    state = dict(state_dict=raw_weights(publish.checkpoint), arch='hf-hub:me/gunn15.c10@0123', settings=dict(
        model_kwargs=dict(fused=False, drop_path_rate=0.1)))
    torch.save(state, tmp_path / 'x.pth.tar')
    printed, error = publish(
        '--training-command', 'python train.py \\\n  --model gunn15', checkpoint=tmp_path / 'x.pth.tar')
    assert error is None, printed
    assert '\n    python train.py \\\n      --model gunn15\n\n' in (publish.folder / 'README.md').read_text()


def test_an_image_that_can_not_be_read(publish, images, tmp_path):
    """timm would take its neighbour instead."""
    shutil.copytree(images, tmp_path / 'images')
    (tmp_path / 'images' / 'test' / 'class3' / '1.png').write_bytes(b'no image')
    _, error = publish('--data-dir', str(tmp_path / 'images'))
    assert 'class3/1.png can not be read: ' in error
    assert not publish.folder.exists()


def test_licence_is_that_of_the_card(publish):
    assert publish('--license', 'cc-by-nc-4.0')[1] is None
    assert ModelCard.load(publish.folder / 'README.md').data.license == 'cc-by-nc-4.0'
    assert json.loads((publish.folder / 'config.json').read_text())['pretrained_cfg']['license'] == 'cc-by-nc-4.0'


def test_bad_arguments(publish, tmp_path, images):
    _, error = publish(checkpoint=tmp_path / 'nowhere')
    assert 'nowhere: no such file; expected a checkpoint' in error
    (tmp_path / 'text').write_text('no')
    _, error = publish(checkpoint=tmp_path / 'text')
    assert 'text can not be read: ' in error
    _, error = publish('--split', 'val')
    assert 'val: no such folder; expected one with a subfolder per class' in error
    (tmp_path / 'none' / 'test' / 'class0').mkdir(parents=True)
    _, error = publish('--data-dir', str(tmp_path / 'none'))
    assert 'none: expected images in test/<class>/: ' in error
    (tmp_path / 'two' / 'test').mkdir(parents=True)
    for c in range(2):
        (tmp_path / 'two' / 'test' / f'class{c}').symlink_to(images / 'test' / f'class{c}')
    _, error = publish('--data-dir', str(tmp_path / 'two'))
    assert 'expected 10 classes, got 2' in error
    for options, message in (
            (['--model', 'gunn15'], 'expected --model NAME.TAG of this package, such as gunn15.c10, got gunn15'),
            (['--model', 'gunn15.x'], 'got gunn15.x'), (['--model', 'resnet18.a1_in1k'], 'got resnet18.a1_in1k'),
            (['--repo', 'gunn15'], 'expected --repo OWNER/NAME, got gunn15'),
            (['--repo', 'me/a..b'], 'expected --repo OWNER/NAME, got me/a..b'),
            (['--dataset-name', ' '], "expected a --dataset-name in one line and without \"|\", got ' '"),
            (['--dataset-name', 'a | b'], "got 'a | b'"), (['--dataset-name', '数据'], 'expected a --dataset-id'),
            (['--device', 'cdua'], 'expected a --device that is there, got cdua'),
            (['--batch-size', '0'], 'expected --batch-size >= 1, got 0')):
        printed, error = publish(*options)
        assert error == 'SystemExit: 2'
        assert message in printed


# --- What the package ships ---

def test_shipped_weights_are_those_of_a_result():
    data = {'c10': 'CIFAR-10', 'c100': 'CIFAR-100', 'tiny_in': 'Tiny ImageNet'}
    trained = {r['sha256']: (r['model'].split('.')[0], r['data']) for r in read_csv(ROOT / 'weights' / 'results.csv')}
    for name, record in known_weights().items():
        if timm.get_pretrained_cfg(name).file:
            architecture, tag = name.split('.')
            assert trained[record['sha256']] == (architecture, data[tag])


def test_verify_of_names_without_weights(capsys, monkeypatch):
    monkeypatch.setattr(verify, '_find_weights', {'gunn18': 'tiny_in'}.get)
    monkeypatch.setattr(verify, 'known_weights', lambda: {k: v for k, v in known_weights().items() if 'sunn' not in k})
    assert verify.main(['sunn18', 'gunn18', 'nothing']) == 1
    printed = capsys.readouterr().out
    assert 'gunn18.tiny_in: ok, ' in printed  # what pretrained=True loads without a tag
    assert 'sunn18.in1k: no weights that this package knows; it knows ' in printed
    assert 'nothing: no weights that this package knows' in printed
    # Known and not there: a package that has lost its files.
    monkeypatch.setattr(verify, 'known_weights', lambda: {'gunn18.in1k': dict(sha256='0', logits=[1.0])})
    assert verify.main([]) == 1
    assert 'gunn18.in1k: the package came without its weights; install it again' in capsys.readouterr().out
    # The right file, which this version computes otherwise.
    record = known_weights()['gunn15.c10']
    monkeypatch.setattr(verify, 'known_weights', lambda: {
        'gunn15.c10': dict(record, logits=[record['logits'][0] + 1e-4, *record['logits'][1:]])})
    assert verify.main([]) == 1
    assert 'gunn15.c10: the logits of the fixed image are others, though' in capsys.readouterr().out
