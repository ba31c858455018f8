"Shared by the tests of the training command: small settings, a text, a finished run, a pickle that runs code."
import os, subprocess, sys
import pytest
from fastai_embdrop.run.settings import Settings
from fastai_embdrop.run.train import main, train_lm
from conftest import random_tokens

TINY = dict(epochs=2, bs=4, seq_len=8, emb_sz=8, n_hid=12, n_layers=2, tok='split', min_freq=1, device='cpu')

def flags(**kw):
    "Arguments of the command for `TINY` with `kw`"
    return [o for k,v in {**TINY, **kw}.items() for o in (f'--{k}', str(v))]

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    "A file of 900 words"
    path = tmp_path_factory.mktemp('data')/'text.txt'
    path.write_text(' '.join(random_tokens(900)))
    return path

@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    "A finished run: its folder and its `Learner`"
    out = tmp_path_factory.mktemp('out')/'new'/'run'
    return out,train_lm(Settings(**TINY, data=text, out=out))

def fails(capsys, *args):
    "The one line that `main` writes to stderr for bad input"
    capsys.readouterr()
    assert main([str(o) for o in args])==2
    out,err = capsys.readouterr()
    assert err.count('\n')==1 and err.startswith('embdrop-train: ') and 'Exception occured' not in err
    return err

def command(*args, before=''):
    "The command in a process of its own, after the code `before`"
    code = f'{before}\nimport sys\nfrom fastai_embdrop.run.train import main\nsys.exit(main())'
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)

class Bomb:
    "Makes the folder `path` when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)
