"""The examples run as scripts, briefly."""
import csv
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


def test_benchmark(tmp_path):
    result = run(
        'benchmark.py', '--models', 'gunn15', 'gunn15:composite', '--bench', 'train', '--img-size', '8',
        '--batch-size', '2', '--rounds', '2', '--warmup', '0', '--csv', 'rows.csv', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / 'rows.csv', newline='') as f:
        fused, composite = csv.DictReader(f)
    assert float(fused['saved_mib_per_image']) < float(composite['saved_mib_per_image'])
    assert fused['gmacs'] == composite['gmacs']
    assert 'benchmark.py --models gunn15' in fused['command']


def test_benchmark_says_what_is_wrong(tmp_path):
    result = run('benchmark.py', '--models', 'gunn15:fast', cwd=tmp_path)
    assert result.returncode != 0
    assert "expected NAME, NAME:composite or NAME:folded of a timm model, got 'gunn15:fast'" in result.stderr
    result = run('benchmark.py', '--sweep', '400x56', '12x4', '--segments', '5', cwd=tmp_path)
    assert result.returncode != 0
    assert '--segments must divide the 12 channels, got 5' in result.stderr
    # What goes wrong in the process of a variant.
    result = run('benchmark.py', '--models', 'gunn15', '--device', 'nowhere', '--csv', 'rows.csv', cwd=tmp_path)
    assert result.returncode != 0
    assert 'benchmark: gunn15: RuntimeError: ' in result.stderr
    assert not (tmp_path / 'rows.csv').exists()
