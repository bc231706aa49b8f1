"""Fetch the source distribution of the installed timm, which holds timm's own tests.

    python tests/fetch_timm_tests.py
"""
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent.parent / '.cache'


def folder_of_timm_tests() -> Path:
    """Folder of the tests of the installed timm, whether it is there or not."""
    return CACHE / f'timm-{version("timm")}' / 'tests'


def fetch() -> Path:
    """Download and unpack unless done before; a download that fails leaves nothing behind."""
    tests = folder_of_timm_tests()
    if not (tests / 'test_models.py').exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
            subprocess.run([
                sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', tmp,
                f'timm=={version("timm")}'], check=True)
            archive, = Path(tmp).glob('*.tar.gz')
            shutil.unpack_archive(archive, tmp)
            (Path(tmp) / tests.parent.name).rename(tests.parent)
    return tests


if __name__ == '__main__':
    print(fetch())
