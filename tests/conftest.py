"""Shared by all tests: no window for plots, one thread, small data made here, the skips of `cuda` and `long` tests, and
hypothesis' profiles.
"""
import os, shutil, tempfile
from collections import Counter
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import numpy as np, pytest, torch
from fastai.basics import defaults
from fastai.callback.progress import ProgressCallback
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir
from fastai_embdrop.run.corpus import lm_dataloaders

SMALL = dict(emb_sz=12, n_hid=16, n_layers=2)

common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile('ci', max_examples=40, derandomize=True, **common)
settings.register_profile('long', max_examples=560, **common)
settings.load_profile(os.getenv('HYPOTHESIS_PROFILE', 'ci'))
set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), 'hypothesis'))

tried = Counter() # examples of each property that came to their end

def pytest_terminal_summary(terminalreporter):
    if tried: terminalreporter.write_line(f'{tried.total():,} examples of {len(tried)} properties')

def pytest_runtest_setup(item):
    if 'cuda' in item.keywords and not torch.cuda.is_available(): pytest.skip('no CUDA device')
    if 'long' in item.keywords and 'EMBDROP_LONG' not in os.environ: pytest.skip('long: set EMBDROP_LONG=1')

def random_tokens(n, seed=0, V=40):
    "`n` tokens of a `V`-word language with Zipf's frequencies"
    return [f'w{i}' for i in np.random.default_rng(seed).zipf(1.5, n)%V]

def small_dls(n=800, bs=4, seq_len=8, device='cpu'):
    texts = [random_tokens(n)],[random_tokens(200, seed=1)]
    return lm_dataloaders(*texts, tok='split', min_freq=1, bs=bs, seq_len=seq_len, device=device)

@pytest.fixture
def dls(): return small_dls()

@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    "One thread, and learners that draw no progress bar and print no table"
    torch.set_num_threads(1)
    monkeypatch.setattr(defaults, 'callbacks', [c for c in defaults.callbacks if c is not ProgressCallback])
    monkeypatch.setattr('fastai.learner.print', lambda *_: None, raising=False)

def graphs(): return torch._dynamo.utils.counters['stats']['unique_graphs']

@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()

compiler = shutil.which('g++') or shutil.which('clang++')
needs_compiler = pytest.mark.skipif(not compiler, reason='torch.compile needs a C++ compiler on a CPU')
# raised inside torch's compiler
compiling = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning',
                                       'ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning',
                                       'ignore:Guards may run slower on Python 3.13.0:RuntimeWarning')
