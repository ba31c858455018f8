"""Pins training in two processes: what each rank reads, draws and ends with, against one process with twice the rows.

Tests marked `both` fail on fastai's loader (xfail, strict), as in test_defects.py. ranks.py is what the processes do.
"""
import json, os, random, shutil, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.callback.schedule import SchedCos
from fastai.data.core import TfmdDL
from fastai.distributed import DistributedDL
from fastai.text.data import LMDataLoader
from fastai_embdrop.run.checkpoint import Checkpoint, last_checkpoint
from fastai_embdrop.run.distrib import LMDistributedDL, lm_distrib_ctx
from fastai_embdrop.run.train import main, _run_files
from ranks import awd_lstm_learner, dls, without_dropout
from conftest import SMALL, random_tokens

class Halves(DistributedDL):
    "fastai's loader, without the way over a GPU"
    def _broadcast(self, t, rank): return t

def both(theirs):
    fails = pytest.mark.xfail(strict=True, reason='defect of fastai 2.8.12')
    return pytest.mark.parametrize('lib', [pytest.param(theirs, id='fastai', marks=fails),
                                           pytest.param(LMDistributedDL, id='ours')])

launchers = dict(torchrun=['torch.distributed.run', '--standalone', '--nproc_per_node=2'],
                 accelerate=['accelerate.commands.launch', '--multi_gpu', '--num_processes=2'])

def launch(script, *args, by='torchrun', **env):
    "A finished job of two processes, which takes some twenty seconds"
    cmd = [sys.executable, '-m', *launchers[by], Path(__file__).with_name(script), *args]
    paths = [str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH', '')] # conftest.py, and what is set already
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, paths)), **env}
    return subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=200, env=env)

def loader(n, bs, seq_len, **kw):
    "`n` numbers in texts of 30"
    return LMDataLoader(torch.arange(n).split(30), bs=bs, seq_len=seq_len, **kw)

# What a rank reads, in one process

@both(Halves)
@pytest.mark.parametrize('n', [101, 89]) # 4 and 3 batches of 4 rows, the last one shorter
def test_all_ranks_have_the_same_batches(lib, n):
    def shapes(rank): return [x.shape for x,_ in lib(loader(n, 4, 8), rank, 2)]
    assert shapes(0)==shapes(1)

@both(DistributedDL)
@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a CUDA device')
def test_no_gpu_is_needed(lib): next(iter(lib(loader(101, 4, 8), 0, 2)))

@both(Halves)
@pytest.mark.parametrize('n', [201, 289])
def test_the_ranks_together_read_what_one_process_would(lib, n):
    ranks = [list(lib(loader(n, 2, 5), r, 3)) for r in range(3)]
    for one,*parts in zip(loader(n, 6, 5), *ranks, strict=True):
        for o,*ps in zip(one, *parts): assert torch.equal(o, torch.cat(ps))

def test_the_order_of_texts_is_pythons():
    def read(dl):
        random.seed(1)
        return [x for x,_ in dl]
    ranks = [read(LMDistributedDL(loader(300, 2, 5, shuffle=True), r, 2)) for r in range(2)]
    ones = read(loader(300, 4, 5, shuffle=True))
    for o,*ps in zip(ones, *ranks, strict=True): assert torch.equal(o, torch.cat(ps))
    assert not torch.equal(ones[0][0], torch.arange(5))

def test_texts_are_read_once():
    calls = []
    class Texts(list):
        def __getitem__(self, i):
            calls.append(i)
            return super().__getitem__(i)
    whole = LMDataLoader(Texts(torch.arange(300).split(30)), lens=[30]*10, bs=2, seq_len=5, cache=10)
    dl = LMDistributedDL(whole, 0, 2)
    calls.clear()
    list(dl)
    assert calls and len(calls)==len(set(calls))

def test_worker_processes_read_the_same():
    def read(workers): return [x.tolist() for x,_ in LMDistributedDL(loader(200, 2, 5, num_workers=workers), 1, 2)]
    assert read(0)==read(2)

def test_too_little_text():
    with pytest.raises(ValueError, match='30 tokens do not fill the 32 rows of 2 processes'):
        LMDistributedDL(loader(30, 16, 5), 0, 2)

def test_other_loaders_are_refused():
    with pytest.raises(TypeError, match='TfmdDL: only the rows of an LMDataLoader'):
        LMDistributedDL(TfmdDL([1,2], bs=1), 0, 2)

def test_one_process_is_left_alone():
    learn = awd_lstm_learner(dls(4), SMALL)
    loaders,state = learn.dls.loaders,random.getstate()
    with lm_distrib_ctx(learn) as same:
        assert same.dls.loaders is loaders and 'distributed_trainer' not in same.cbs.attrgot('name')
    assert random.getstate()==state

# Two processes

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "The results of ranks 0 and 1"
    d = tmp_path_factory.mktemp('ranks')
    p = launch('ranks.py', d)
    assert p.returncode==0, p.stdout+p.stderr
    return [torch.load(d/f'{r}.pt', weights_only=False) for r in range(2)]

def test_every_rank_follows_the_same_embed_p(ranks):
    a,b = (r['dropped_out'] for r in ranks)
    n,sched = a['steps'],SchedCos(.6, .1)
    assert n==b['steps'] > 50 and a['ps']==b['ps']==pytest.approx([sched(i/n) for i in range(n)])

def test_ranks_draw_different_masks(ranks):
    a,b = (r['dropped_out'] for r in ranks)
    agree = []
    for x,y,p,q in zip(a['read'], b['read'], a['dropped'], b['dropped']):
        both_read = set(x.flatten().tolist()) & set(y.flatten().tolist())
        agree += [(w in p)==(w in q) for w in both_read]
    assert .4 < sum(agree)/len(agree) < .75 and len(agree)>200

def test_a_held_seed_is_each_ranks_own(ranks): assert ranks[0]['held']!=ranks[1]['held']

def test_weights_are_equal_after_50_steps(ranks):
    a,b = (r['dropped_out']['weights'] for r in ranks)
    assert torch.equal(a, b) and a.isfinite().all()

def test_the_record_is_the_same_on_every_rank(ranks):
    a,b = (r['dropped_out']['values'] for r in ranks)
    assert a==b and len(a)==3

def test_an_epoch_reads_every_text_once(ranks):
    read = torch.cat([x.flatten() for r in ranks for x in r['dropped_out']['read'][:17]])
    left = torch.cat([o[0] for o in dls(4).train.dataset]).bincount(minlength=60)-read.bincount(minlength=60)
    assert left.min()==0 and 0 < left.sum() <= 8 # what does not fill 8 rows, and the last target

def test_the_same_as_one_process_with_twice_the_rows(ranks):
    one = without_dropout(nullcontext, bs=8)
    assert one['hidden'] # the decoder's weights are used outside the wrapped model
    for r in ranks:
        for k,v in one.items():
            got = torch.as_tensor(r['without_dropout'][k])
            torch.testing.assert_close(got, torch.as_tensor(v), rtol=1e-4, atol=1e-5)

def test_one_rank_may_predict_alone(ranks): assert ranks[0]['alone'].startswith('w1 w2 ') and ranks[1]['alone'] is None

# The command

def flags(folder, out, *args):
    "Of a run with 17 batches in each of two epochs"
    res = dict(data=folder/'text.txt', out=folder/out, epochs=2, bs=4, seq_len=8, emb_sz=8, n_hid=12, tok='split',
               min_freq=1, device='cpu', save_every=5)
    return [str(o) for k,v in res.items() for o in (f'--{k}', v)] + list(args)

def train(*args, kill_at=-1, **kw): return launch('embdrop_train.py', *flags(*args), KILL_AT=str(kill_at), **kw)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder of runs, and the three jobs: `whole`; `killed`, which was resumed; and `cut`, a copy of it before that"
    d = tmp_path_factory.mktemp('runs')
    (d/'text.txt').write_text(' '.join(random_tokens(1200)))
    whole,killed = train(d, 'whole'),train(d, 'killed', kill_at=23)
    assert last_checkpoint(d/'killed')['train_iter']==20
    shutil.copytree(d/'killed', d/'cut')
    return d,(whole, killed, train(d, 'killed', '--resume'))

def test_a_dead_rank_ends_the_job(runs):
    whole,killed,resumed = runs[1]
    assert whole.returncode==resumed.returncode==0 and killed.returncode==1 and 'SIGKILL' in killed.stderr

def test_a_resumed_job_ends_like_one_that_was_not_killed(runs):
    a,b = runs[0]/'whole',runs[0]/'killed'
    for f in 'model.pth','sample.txt','losses.png','schedule.png': assert (a/f).read_bytes()==(b/f).read_bytes()
    hists = [pd.read_csv(o/'history.csv').drop(columns='time') for o in (a,b)]
    assert hists[0].equals(hists[1]) and len(hists[0])==2

def test_accelerate_launch_does_the_same(runs):
    d = runs[0]
    p = train(d, 'accelerate', by='accelerate')
    assert p.returncode==0, p.stderr
    assert (d/'accelerate'/'model.pth').read_bytes()==(d/'whole'/'model.pth').read_bytes()

def test_a_run_is_resumed_by_as_many_processes(runs, capsys):
    d = runs[0]
    assert main(flags(d, 'cut', '--resume'))==2 and 'processes: 2 -> 1' in capsys.readouterr().err

def test_a_checkpoint_is_of_so_many_processes(tmp_path):
    learn = awd_lstm_learner(dls(4), SMALL)
    learn.fit(1, cbs=Checkpoint(tmp_path))
    state = last_checkpoint(tmp_path)
    state['ranks'] *= 2
    with pytest.raises(ValueError, match='from 2 processes, but this fit has 1'):
        learn.fit(1, cbs=Checkpoint(tmp_path, state=state))

def test_one_rank_writes_and_prints(runs):
    for o in 'whole','killed': assert sorted(os.listdir(runs[0]/o))==sorted(_run_files)
    out = runs[1][0].stdout
    assert [out.count(o) for o in ('held-out tokens', 'epoch ', 'perplexity ', 'model.pth')]==[1,2,3,1]

def test_the_batch_is_bs_times_processes(runs):
    cfg = json.loads((runs[0]/'whole'/'config.json').read_text())
    assert (cfg['settings']['bs'], cfg['processes'], cfg['global_bs'])==(4,2,8)
    assert last_checkpoint(runs[0]/'cut')['size']==(2, 17) # epochs, and ceil((1080-1)//8 / 8) batches
