"""Two processes on one machine."""
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('options', [
    pytest.param([], id='frozen'),
    pytest.param(['--sync-bn'], id='sync-bn', marks=pytest.mark.gpu),
])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, options):
    result = subprocess.run([
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
        str(Path(__file__).parent / 'ddp_worker.py'), *options],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr
    assert 'process 0 agrees' in result.stdout
    assert 'process 1 agrees' in result.stdout
