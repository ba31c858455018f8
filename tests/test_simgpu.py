"""Pins that tests/on_simgpu.py passes: what the library does on a simulated accelerator.

It runs in a process of its own, because a backend cannot be unregistered: torch would use it as the machine's
accelerator in all later tests. To run single tests: `pytest tests/on_simgpu.py`.
"""
import os, subprocess, sys
from pathlib import Path
import pytest, torch

def test_on_the_simulated_accelerator():
    if not hasattr(torch.utils.backend_registration, '_setup_privateuseone_for_python_backend'):
        pytest.skip(f'torch {torch.__version__} has no backends in Python')
    path = Path(__file__).parent/'on_simgpu.py'
    cmd = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', path]
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES':''}
    r = subprocess.run(cmd, cwd=path.parent.parent, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-9000:]
    assert ' skipped' not in r.stdout.splitlines()[-1]
