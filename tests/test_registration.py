"""How timm comes to know the models: real installs into virtual environments, and what fresh interpreters see."""
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import timm

import timm_gunn
from timm_gunn.verify import known_weights

ROOT = Path(__file__).parent.parent
NAMES = ['gunn15', 'gunn15_nores', 'gunn18', 'gunn24', 'sunn15', 'sunn18', 'sunn24', 'wide_gunn18']
LIST = f'assert timm.list_models(module="gunn") == {NAMES}; '


class Environment:
    """A virtual environment that sees every package of the present one but timm-gunn."""

    def __init__(self, path: Path):
        venv.create(path, with_pip=False)
        self.python = str(path / 'bin' / 'python')
        self.site = Path(self('import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip())
        for entry in Path(sysconfig.get_path('purelib')).iterdir():
            if 'timm_gunn' not in entry.name and not entry.name.endswith('.pth') and entry.name != '__pycache__':
                (self.site / entry.name).symlink_to(entry)

    def __call__(self, code: str, *options: str, fails: bool = False, **env: str) -> subprocess.CompletedProcess:
        """Run code in a fresh interpreter, elsewhere than in the source tree."""
        clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'TORCH_DEVICE_BACKEND_AUTOLOAD')}
        result = subprocess.run(
            [self.python, *options, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
            cwd=Path(self.python).parent, env={**clean, **env})
        assert (result.returncode != 0) == fails, result.stderr
        return result

    def pip(self, *args: str) -> None:
        result = subprocess.run(
            [sys.executable, '-m', 'pip', '--python', self.python, *args, '--disable-pip-version-check'],
            capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr

    def install(self, *args: str) -> None:
        self.pip('install', '--no-deps', '--no-build-isolation', '--no-index', *args)

    def traces(self) -> list[str]:
        return [p.name for p in self.site.iterdir() if 'gunn' in p.name]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what the package is built from."""
    path = tmp_path_factory.mktemp('source') / 'timm-gunn'
    path.mkdir()
    for name in ('timm_gunn', 'weights', 'pyproject.toml', 'README.md', 'LICENSE', 'NOTICE'):
        item = ROOT / name
        (shutil.copytree if item.is_dir() else shutil.copy)(item, path / name)
    return path


@pytest.fixture(scope='module')
def wheel_env(source, tmp_path_factory):
    env = Environment(tmp_path_factory.mktemp('wheel') / 'venv')
    env.install(str(source))
    return env


# Code by the switch of PyTorch's autoload. Every order of imports registers all the names.
ON = [
    'import timm', 'from timm.models import create_model; import timm', 'import timm, timm_gunn',
    'import timm_gunn.gunn, timm']
OFF = ['import timm; assert not timm.list_models("gunn*")', 'import timm, timm_gunn', 'import timm_gunn, timm']
ONE_HOOK = '''
import sys
assert len([f for f in sys.meta_path if "timm_gunn" in type(f).__module__]) == 1
timm.create_model("gunn15", device="meta")'''
ABOUT_TIMM = '''
import inspect, timm.models
m = timm.models
print(sorted(vars(m)), type(m), m.__file__, type(m.__loader__), m.__spec__.loader is m.__loader__,
      sorted(vars(m.__loader__).items()), m.__spec__.origin, m.__spec__.submodule_search_locations,
      inspect.getsource(m) == open(m.__file__).read())'''


@pytest.fixture(scope='module')
def interpreters(wheel_env):
    """Fresh interpreters by what they run, two at a time: each is seconds of work for one core."""
    pool = ThreadPoolExecutor(2)
    off = partial(wheel_env, TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    yield {  # isolated, and with warnings as errors; or with the hook switched off
        **{code: pool.submit(wheel_env, f'{code}; {LIST}{ONE_HOOK}{ABOUT_TIMM}', '-I', '-W', 'error') for code in ON},
        **{code: pool.submit(off, f'{code}; {LIST if "timm_gunn" in code else ""}{ABOUT_TIMM}') for code in OFF}}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize('imports', ON)
def test_import_orders(interpreters, imports):
    """Every order registers all the names once: timm warns of a second registration."""
    result = interpreters[imports].result()
    assert 'Overwriting' not in result.stderr
    assert 'timm-gunn could not' not in result.stderr


@pytest.mark.slow  # compiles every module that there is
def test_optimised_interpreter(wheel_env):
    wheel_env('import timm; ' + LIST, '-O')


@pytest.mark.parametrize('code', OFF)
def test_autoload_switched_off(interpreters, code):
    interpreters[code].result()


def test_timm_is_left_as_it_was(interpreters):
    """Module, spec and loader of timm.models are those of an import without the hook."""
    with_hook, without = (interpreters[key].result().stdout for key in (ON[0], OFF[0]))
    assert len(with_hook) > 1000
    assert with_hook == without


def test_timm_that_is_imported_again(wheel_env):
    """As test suites and notebooks do. Models of before and after run, and their layers are those of the package."""
    result = wheel_env(f'''
        import copy, sys, torch, timm
        small = dict(channels=(4, 6), segments=(2, 3), layout="cifar")
        models, x = [timm.create_model("gunn15", **small)], torch.randn(2, 3, 8, 8)
        for dropped in ["timm"], ["timm.models"], ["timm"], ["timm_gunn", "timm"]:
            for name in list(sys.modules):
                if any(name == d or name.startswith(d + ".") for d in dropped):
                    del sys.modules[name]
            import timm, timm_gunn, timm_gunn.layer
            {LIST}
            models.append(timm.create_model("gunn15", **small))
            assert type(models[-1]) is timm_gunn.Gunn
            assert type(models[-1].stage1.layer) is timm_gunn.GunnLayer is timm_gunn.layer.GunnLayer
            models[-1].load_state_dict(models[0].state_dict())
        for m in models:
            m(x).sum().backward()
        assert len({{str(m.stem.conv.weight.grad.tolist()) for m in models}}) == 1
        assert len([f for f in sys.meta_path if "timm_gunn" in type(f).__module__]) == 1''')
    assert 'RuntimeWarning' not in result.stderr


def test_weights_travel_in_the_wheel(wheel_env):
    """All that the package knows are found there, and are as they were published."""
    result = wheel_env('''
        import json, pathlib, timm, timm_gunn.verify
        known = sorted(timm_gunn.verify.known_weights())
        assert timm.list_models(module="gunn", pretrained=True, include_tags=True) == known
        files = {name: timm.get_pretrained_cfg(name).file for name in known}
        files = {name: pathlib.Path(file) for name, file in files.items() if file}  # others are on the Hub
        assert {file.parent for file in files.values()} == {pathlib.Path(timm_gunn.__file__).parent / "weights"}
        assert timm_gunn.verify.main(list(files)) == 0''', HF_HUB_OFFLINE='1')
    assert result.stdout.count(': ok, ') == sum(bool(timm.get_pretrained_cfg(n).file) for n in known_weights())


def test_torch_alone_gets_nothing_but_the_hook(wheel_env):
    """Neither timm nor the package is imported, nor any module for the hook's sake, when only torch is."""
    wheel_env('''
        import sys
        import torch
        assert not [m for m in sys.modules if m.split(".")[0] in ("timm", "timm_gunn", "torchvision")]
        hooks = [f for f in sys.meta_path if type(f).__module__ == "_timm_gunn_autoload"]
        assert sys.meta_path[0] in hooks and len(hooks) == 1''')
    wheel_env('''
        import sys
        before = set(sys.modules)
        import _timm_gunn_autoload
        _timm_gunn_autoload.arm()
        _timm_gunn_autoload.arm()
        assert set(sys.modules) - before == {"_timm_gunn_autoload"}
        assert len([f for f in sys.meta_path if type(f).__module__ == "_timm_gunn_autoload"]) == 1''')


@pytest.fixture
def fake(tmp_path):
    """Write packages that stand before the installed ones: fake('timm_gunn', code) gives the environment to pass."""
    def write(name, code):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(code))
        return dict(PYTHONPATH=str(tmp_path))
    return write


@pytest.mark.parametrize('options', [(), ('-W', 'error::RuntimeWarning')], ids=['default', 'warnings are errors'])
def test_failure_of_ours_is_one_warning(wheel_env, fake, options):
    env = fake('timm_gunn/__init__.py', 'raise OSError("disk on fire")')
    result = wheel_env('import torch, timm; print(len(timm.list_models()) > 1000, timm.list_models("gunn*"))',
                       *options, **env)
    assert result.stdout.split() == ['True', '[]']
    assert result.stderr.count('RuntimeWarning: timm-gunn could not register its models with timm ') == 1
    assert 'OSError: disk on fire' in result.stderr


def test_old_timm_is_one_warning(wheel_env, fake):
    fake('timm/__init__.py', '__version__ = "0.4.12"; import torch; from . import models')
    env = fake('timm/models/__init__.py', 'from torch import nn')
    result = wheel_env('import timm; print(timm.__version__)', **env)
    assert result.stdout.strip() == '0.4.12'
    assert result.stderr.count(
        'RuntimeWarning: timm-gunn could not register its models with timm 0.4.12 (it needs 1.0.22 or newer)') == 1
    assert 'No module named' in result.stderr or 'cannot import name' in result.stderr


def test_timm_that_fails_once(wheel_env, fake):
    """The hook survives a failed import of timm, whose own error is the one that the user sees."""
    fake('timm/__init__.py', 'import torch; from . import models')
    env = fake('timm/models/__init__.py', 'import os; assert "READY" in os.environ, "not yet"')
    result = wheel_env('''
        import os, sys
        try:
            import timm
        except AssertionError as e:
            print("failed:", e)
        os.environ["READY"] = "1"
        sys.modules.pop("timm", None)
        import timm''', **env)
    assert result.stdout.strip() == 'failed: not yet'
    # The second attempt reaches the registration, which this timm is no timm for.
    assert result.stderr.count('RuntimeWarning: timm-gunn could not register') == 1


def test_two_threads(wheel_env):
    """One imports timm while the other imports timm.models, which waits for the first."""
    wheel_env(f'''
        import threading, time, torch, torchvision.ops
        threads = [threading.Thread(target=__import__, args=(name,)) for name in ("timm", "timm.models", "timm")]
        for t in threads:
            t.start()
            time.sleep(0.05)
        for t in threads:
            t.join()
        import timm
        {LIST}''')


@pytest.mark.parametrize('loader', ['namespace', 'legacy'])
def test_loaders_that_cannot_be_followed(wheel_env, fake, loader):
    """The import works as without the hook, with one warning."""
    fake('timm/__init__.py', 'import torch')
    env = fake('timm/models/other.py', '')
    result = wheel_env(f'''
        import importlib.machinery, sys, types
        class Legacy:
            def load_module(self, name):
                return sys.modules.setdefault(name, types.ModuleType(name))
        class Finder:
            def find_spec(self, name, path=None, target=None):
                return importlib.machinery.ModuleSpec(name, Legacy()) if name == "timm.models" else None
        if "{loader}" == "legacy":
            sys.meta_path.insert(0, Finder())
        import timm.models
        print("imported")''', **env)
    assert result.stdout.strip() == 'imported'
    assert result.stderr.count('RuntimeWarning: timm-gunn c') == 1


def test_installs_and_uninstalls(source, tmp_path):
    env = Environment(tmp_path / 'venv')
    assert env.traces() == []
    copy = tmp_path / 'copy'
    shutil.copytree(source, copy)
    env.install('--editable', str(copy))
    where = env('import timm; ' + LIST + 'import timm_gunn; print(timm_gunn.__file__)').stdout.strip()
    assert Path(where).parent.parent == copy

    # A source tree that is moved away breaks the package, but neither torch nor timm.
    copy.rename(tmp_path / 'moved')
    result = env('import torch, timm; print(timm.list_models("gunn*"))')
    assert result.stdout.strip() == '[]'
    assert result.stderr.count('RuntimeWarning: timm-gunn could not register its models without its package') == 1
    assert "ModuleNotFoundError: No module named 'timm_gunn'" in result.stderr

    env.pip('uninstall', '--yes', 'timm-gunn')
    assert env.traces() == []
    env('import sys, timm; assert not timm.list_models("gunn*"); assert not [m for m in sys.modules if "gunn" in m]')

    # The same of a wheel.
    env.install(str(source))
    assert set(env.traces()) == {'timm_gunn', '_timm_gunn_autoload.py', f'timm_gunn-{timm_gunn.__version__}.dist-info'}
    assert (env.site / 'timm_gunn' / 'py.typed').exists()
    assert not (env.site / 'timm_gunn' / '_autoload.py').exists()
    env.pip('uninstall', '--yes', 'timm-gunn')
    assert env.traces() == []
