"""The examples run as scripts, briefly."""
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / 'examples'


def run(name, *args, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args], capture_output=True, text=True, timeout=300, cwd=cwd)


def test_quickstart(tmp_path):
    result = run('quickstart.py', '--epochs', '1', '--train-images', '64', '--size', '16', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'accuracy on 450 held-out images: ' in result.stdout
    assert (tmp_path / 'output' / 'quickstart.png').read_bytes().startswith(b'\x89PNG')
    result = run('quickstart.py', '--train-images', '8', cwd=tmp_path)
    assert result.returncode == 2
    assert 'at least one batch of 32 training images, got 8' in result.stderr


def test_model_table_is_that_of_the_readme(tmp_path):
    result = run('model_table.py', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout in (EXAMPLES.parent / 'README.md').read_text()
