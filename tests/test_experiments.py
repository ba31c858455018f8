"""Pins experiments.schedules: a key decides a run, a kill costs only the runs it hit, controls are what they claim

Tiny texts, CPU."""
import math, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastai_embdrop.anneal import drop_attrs
from conftest import random_tokens

root = Path(__file__).parent.parent
sys.path.insert(0, str(root)) # `experiments` is no part of the installed package
from experiments import edge as E, grid as G, schedules as S

glob = 'wikitext/few/*/0'
keys = G.matching(S.grid(), [glob])

def write_texts(path, seed=0):
    "Random training text; held-out text and test text are the same"
    path.mkdir()
    texts = dict(train=random_tokens(1500, seed), valid=random_tokens(400, seed+1), test=random_tokens(400, seed+1))
    for name,words in texts.items(): (path/f'{name}.txt').write_text(' '.join(words))
    return path

@pytest.fixture(scope='module')
def text(tmp_path_factory): return write_texts(tmp_path_factory.mktemp('data')/'text')

@pytest.fixture(scope='module')
def killed(text, tmp_path_factory):
    "Rows of a grid killed after its first run, with a torn line added; the bytes before it; the first printed line"
    path = tmp_path_factory.mktemp('rows')/'rows.csv'
    flags = ['--wikitext', text, '--out', path, '--workers', '1', '--only', glob]
    cmd = [sys.executable, '-m', 'experiments.schedules', *flags]
    p = subprocess.Popen(cmd, cwd=root, stdout=subprocess.PIPE, text=True)
    first = p.stdout.readline()
    p.kill()
    p.communicate(timeout=20) # returns once the workers, who share the pipe, have ended too
    whole = path.read_bytes()
    path.write_bytes(whole + b'wikitext,few,const-0.4,0,6.5;6.')
    return path,whole,first

@pytest.fixture
def path(killed, tmp_path): return Path(shutil.copy(killed[0], tmp_path))

def test_killed_grid_resumes(path, killed, text):
    _,whole,first = killed
    assert first.startswith(f'[1/{len(keys)}] {keys[0]}: ') and set(S.grid_of.stored_rows(path)) < set(keys)
    S.grid_of.run_keys(keys, path, 1, text)
    assert path.read_bytes().startswith(whole) and len(path.read_text().splitlines())==1+len(keys)
    assert set(S.grid_of.stored_rows(path))==set(keys)

def test_finished_rows_are_not_run(path, text, monkeypatch):
    done,started = list(S.grid_of.stored_rows(path)),[]
    monkeypatch.setattr(S.grid_of, 'rows', lambda todo, *_: started.extend(todo) or [])
    S.grid_of.run_keys(keys, path, 1, text)
    assert done and started==[k for k in keys if k not in done]

def once(path, text): return S.main(['--once', keys[0], '--wikitext', str(text), '--out', str(path)])

def test_once_is_bit_equal(path, text, capsys):
    assert once(path, text)==0 and 'bit-equal' in capsys.readouterr().out

def test_once_sees_the_last_bit(text, tmp_path, capsys):
    row,path = S.run(keys[0], text),tmp_path/'rows.csv'
    near = np.nextafter(row['final_perplexity'], 0).item()
    with G.open_rows(path) as f: S.grid_of.append(f, {**row, 'final_perplexity':near})
    assert once(path, text)==1 and 'not equal' in capsys.readouterr().out

def test_row(text):
    r = S.run('wikitext/few/rise/0', text)
    valid = [float(o) for o in r['valid_loss'].split(';')]
    assert tuple(sorted(r))==tuple(sorted(S.columns)) and len(valid)==len(r['train_loss'].split(';'))==3
    assert (r['final_perplexity'], r['best_perplexity'])==(math.exp(valid[-1]), math.exp(min(valid)))
    assert np.isclose(r['test_perplexity'], r['final_perplexity']) and r['threads']==1
    assert 0 < float(r['mean_p']) < float(r['final_p']) < .4

def weights_of(model): return torch.nn.utils.parameters_to_vector(model.parameters()).clone()

class Spy(Callback):
    def before_fit(self): self.weights,self.batches = weights_of(self.model),[]
    def before_batch(self): self.batches.append(self.xb[0].clone())

def spied(key):
    spy = Spy()
    learn,_ = S.train(key, cbs=[spy])
    return spy.weights,torch.cat(spy.batches, 1),weights_of(learn.model)

@pytest.mark.parametrize('name', ['const-0.4', 'fall', 'late'])
def test_schedules_of_a_seed_are_paired(name, monkeypatch):
    docs = [random_tokens(50, i) for i in range(40)]
    monkeypatch.setattr(S, 'tokens', lambda *_: ([docs[:30],docs[30:],[]], ''))
    a,b,other = (spied(f'docstrings/few/{o}') for o in ('none/0', f'{name}/0', f'{name}/1'))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])
    assert not torch.equal(b[0], other[0]) and not torch.equal(b[1], other[1])

def regularizers(key, text):
    learn = S.learner(key, text)
    return {a for _,a in drop_attrs(learn.model)},any(isinstance(c, RNNRegularizer) for c in learn.cbs),learn.wd

def test_only_embedding_dropout_is_left(text):
    assert regularizers('wikitext/only/none/0', text)==({'embed_p'}, False, 0)
    assert regularizers('wikitext/many/none/0', text)[:2]==({'embed_p','weight_p','p'}, True)

@pytest.mark.parametrize('name', S.moving)
def test_controls_have_the_mean_and_the_end(name):
    f,x = S.moving[name],np.linspace(0, 1, 4001)
    mean,end = (S.scheds[c] for c in S.controls(name))
    assert mean(0)==mean(.3)==mean(1) and end(0)==end(.3)==end(1)
    assert abs(mean(.5)-np.mean([f(o) for o in x])) < 1e-3 and abs(end(.5)-f(1)) < 1e-3

def test_controls_are_run_beside_their_schedules():
    g = set(S.grid())
    runs = [k.split('/') for k in S.grid()]
    assert len(runs)==len(g)
    for corpus,regime,name,seed in runs:
        if name in S.moving: assert {f'{corpus}/{regime}/{o}/{seed}' for o in S.controls(name)} <= g

def test_order_of_the_grid():
    full = [f'{c}/{n}/{s}' for s in range(3) for c in S.full for n in S.names]
    assert S.grid()[:len(full)]==full
    assert S.grid(wikitext=False)==[k for k in S.grid() if k.startswith('docstrings/')]

def test_the_edge_is_outside_the_grid():
    "Beyond the largest constant, in the cells that overfit, with the seeds that all cells have"
    assert not set(E.keys) & set(S.grid()) and len(E.keys)==len(set(E.keys))==24
    assert all(S.scheds[n](0)==S.scheds[n](1)==S.p_of(n) > .4 for n in S.edge)
    assert all(f'{c}/const-0.4/{s}' in S.grid() for c in E.cells for s in range(3))

def test_torn_header(tmp_path):
    path = tmp_path/'rows.csv'
    path.write_text('corpus,regime,sch')
    assert S.grid_of.stored_rows(path)=={}
    with G.open_rows(path) as f: S.grid_of.append(f, dict(corpus='a', regime='b', schedule='c', seed=0))
    assert list(S.grid_of.stored_rows(path))==['a/b/c/0']

def test_one_grid_at_a_time(tmp_path):
    path = tmp_path/'rows.csv'
    with G.open_rows(path), pytest.raises(SystemExit, match='another grid'): G.open_rows(path)
    G.open_rows(path).close()

def test_rows_of_another_text_stop_the_grid(path, killed, tmp_path):
    with pytest.raises(SystemExit, match='wikitext/few: stored rows come from another text'):
        S.grid_of.run_keys(['wikitext/few/fall/1'], path, 1, write_texts(tmp_path/'other', seed=5))
    assert path.read_bytes()==killed[1]
