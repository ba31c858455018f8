"""Pins `embdrop-train`: what it trains, bad input (one line, status 2, nothing written), what it prints."""
import json, os
import numpy as np, pandas as pd, pytest
from fastai.text.all import SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly
from fastai_embdrop.run.folder import _run_files
from fastai_embdrop.run.settings import Settings
from fastai_embdrop.run.train import main, train_lm
from conftest import random_tokens
from running import TINY, command, fails, flags, run, text

# Bad input

@pytest.mark.parametrize('name,content,msg', [
    ('a.txt', b'', 'no text'), ('a.txt', b'caf\xe9 ', 'not UTF-8 at byte 3'), ('a.csv', b'body\nhello\n', "'text'"),
    ('a.txt', b'a few words '*10, '28 training tokens, but a batch needs 33'), ('a.txt', b'a '*300, '29 held-out')])
def test_bad_data(capsys, tmp_path, name, content, msg):
    (tmp_path/name).write_bytes(content)
    bs = 32 if 'held' in msg else 4
    assert msg in fails(capsys, *flags(data=tmp_path/name, out=tmp_path/'run', bs=bs))
    assert os.listdir(tmp_path)==[name]

def test_out_is_not_the_data(capsys, tmp_path):
    (tmp_path/'sample.txt').write_text('mine')
    assert 'the data are there' in fails(capsys, *flags(data=tmp_path, out=tmp_path/'.'), '--overwrite')
    assert os.listdir(tmp_path)==['sample.txt']

def test_unwritable_out(capsys, tmp_path, text):
    (tmp_path/'file').write_text('mine')
    assert 'cannot be written to' in fails(capsys, *flags(data=text, out=tmp_path/'file'/'run'))
    assert (tmp_path/'file').read_text()=='mine'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()==0, reason='root may write anywhere')
def test_read_only_out(capsys, tmp_path, text):
    tmp_path.chmod(0o500)
    assert 'cannot be written to' in fails(capsys, *flags(data=text, out=tmp_path/'run'))

def test_a_run_is_not_overwritten_unasked(capsys, tmp_path, text):
    for f in ['vocab.json', 'mine.txt']: (tmp_path/f).write_text('old')
    args = flags(data=text, out=tmp_path, epochs=1)
    assert 'holds a run' in fails(capsys, *args)
    assert 'a batch needs' in fails(capsys, *args, '--overwrite', '--bs', 1000)
    assert (tmp_path/'vocab.json').read_text()=='old', 'bad input costs no run'
    assert main([*args, '--overwrite']) is None
    assert sorted(os.listdir(tmp_path))==sorted([*_run_files, 'mine.txt']) and (tmp_path/'mine.txt').read_text()=='old'
    assert 'xxunk' in json.loads((tmp_path/'vocab.json').read_text())

def test_error_of_a_callback_is_unwrapped(capsys, tmp_path, text, monkeypatch):
    def before_fit(self): raise ValueError('two\nlines')
    monkeypatch.setattr('fastai.learner.Recorder.before_fit', before_fit)
    assert fails(capsys, *flags(data=text, out=tmp_path/'run'))=='embdrop-train: two lines\n'

def test_diverged_training_says_so(capsys, tmp_path, text):
    assert 'not finite' in fails(capsys, *flags(data=text, out=tmp_path/'run', lr=1e30))

# A run

@pytest.mark.parametrize('name,sched', [
    ('cos',SchedCos(.6,.1)), ('lin',SchedLin(.6,.1)), ('exp',SchedExp(.6,.1)), ('poly',SchedPoly(.6,.1,2)),
    ('const',SchedNo(.6,.6)), ('early',lambda pct: max(.6-1.5*pct, .1)), ('late',lambda pct: .6 if pct<.5 else .1),
    ('curriculum',lambda pct: .1+.5*np.exp(-10*pct))])
def test_embed_p_follows_the_schedule(tmp_path, text, name, sched):
    end = None if name=='const' else .1
    s = Settings(**{**TINY, 'epochs':3}, data=text, out=tmp_path, embed_p=.6, embed_p_end=end, sched=name)
    learn = train_lm(s)
    n,hist = len(learn.dls.train),pd.read_csv(tmp_path/'history.csv')
    assert learn.recorder.hps['embed_p']==pytest.approx([sched(i/(3*n)) for i in range(3*n)])
    assert hist.embed_p.tolist()==pytest.approx([sched(((e+1)*n-1)/(3*n)) for e in range(3)])
    assert set(learn.recorder.hps)=={'lr','mom','embed_p'}

def test_without_an_end_embed_p_is_constant(tmp_path, text):
    learn = train_lm(Settings(**TINY, data=text, out=tmp_path, embed_p=.3, sched='exp'))
    assert learn.recorder.hps['embed_p']==[.3]*(2*len(learn.dls.train))
    assert json.loads((tmp_path/'config.json').read_text())['settings']['embed_p_end'] is None

def test_adapt_finds_embed_p_in_a_run(tmp_path, text, monkeypatch):
    "20 measurements from 0 on, whatever embed_p is; history.csv has the values"
    monkeypatch.setattr('fastai_embdrop.adapt.feedback_p', lambda history, max_p: min(max_p, .01*len(history)))
    s = Settings(**{**TINY, 'epochs':3}, data=text, out=tmp_path, embed_p=.6, sched='adapt')
    ps = train_lm(s).recorder.hps['embed_p']
    assert ps[0]==0 and ps==sorted(ps) and ps[-1]==pytest.approx(.19)
    hist = pd.read_csv(tmp_path/'history.csv')
    assert hist.embed_p.tolist()==pytest.approx([ps[len(ps)*n//3-1] for n in (1,2,3)])

def test_a_run_can_be_repeated(run, tmp_path, text):
    hists = []
    for i,seed in enumerate([42,42,1]):
        train_lm(Settings(**TINY, data=text, out=tmp_path/str(i), seed=seed))
        hists.append(pd.read_csv(tmp_path/str(i)/'history.csv').drop(columns='time'))
    assert hists[0].equals(hists[1]) and not hists[0].equals(hists[2])
    for f in 'model.pth','sample.txt': assert (tmp_path/'0'/f).read_bytes()==(tmp_path/'1'/f).read_bytes()

def test_settings_reach_the_model(tmp_path, text):
    few = {**TINY, 'min_freq':2, 'max_vocab':20, 'epochs':1}
    learn = train_lm(Settings(**few, data=text, out=tmp_path, drop_mult=0, max_words=500))
    enc = learn.model[0]
    assert (enc.emb_sz, enc.n_hid, enc.n_layers, enc.input_dp.p, enc.rnns[0].weight_p)==(8, 12, 2, 0, 0)
    assert (learn.dls.bs, learn.dls.train.seq_len)==(4,8) and len([o for o in learn.dls.vocab if o!='xxfake'])==20
    assert json.loads((tmp_path/'config.json').read_text())['tokens']=={'train':500, 'valid':50, 'test':0}

def test_test_text_is_measured(tmp_path, capsys):
    for i,o in enumerate(['train','valid','test']): (tmp_path/f'{o}.txt').write_text(' '.join(random_tokens(400, i)))
    assert main(flags(data=tmp_path, out=tmp_path/'run')) is None
    res = json.loads((tmp_path/'run'/'config.json').read_text())['results']
    assert res['test_perplexity']==pytest.approx(np.exp(res['test_loss'])) and res['test_loss']!=res['valid_loss']
    assert f"test_perplexity {res['test_perplexity']:.4g}" in capsys.readouterr().out

# What it prints

def test_summary(tmp_path, text, capsys):
    main(flags(data=text, out=tmp_path/'run'))
    out,err = capsys.readouterr()
    res = json.loads((tmp_path/'run'/'config.json').read_text())['results']
    assert f"perplexity {res['perplexity']:.4g}" in out and not err
    assert all(str(tmp_path/'run'/f) in out for f in _run_files)

def test_command_prints_a_line_per_epoch_and_no_bar_to_a_file(tmp_path, text):
    p = command(*flags(data=text, out=tmp_path/'run', tok='spacy'))
    assert (p.returncode, p.stderr)==(0,'') and sorted(os.listdir(tmp_path/'run'))==sorted(_run_files)
    assert p.stdout.isascii() and '\r' not in p.stdout
    lines = p.stdout.splitlines()
    assert [l.split(',')[0] for l in lines[1:3]]==['epoch 0','epoch 1'] and len(lines)==4+len(_run_files)
    shown = 'train_loss','valid_loss','perplexity','embed_p','time'
    for line in lines[1:3]: assert all(f', {k} ' in line for k in shown)

def test_command_fails_in_one_line(tmp_path):
    p = command('--data', tmp_path/'nowhere.txt', '--out', tmp_path/'run')
    assert p.returncode==2 and p.stderr==f"embdrop-train: {tmp_path/'nowhere.txt'}: no such file or folder\n"
    assert not (tmp_path/'run').exists()

deprecated = '''
import torch.jit, warnings
def script(f, *args, **kw):
    warnings.warn('`torch.jit.script` is deprecated. Please switch to `torch.compile`.', FutureWarning, stacklevel=2)
    return f
torch.jit.script = script
'''

def test_command_passes_on_no_warning_of_fastais_import():
    "torch 2.14 warns where fastai calls `torch.jit.script`, as it is imported"
    p = command('--show', before=deprecated)
    assert (p.returncode, p.stderr)==(0,'') and p.stdout.startswith('[train]')

full = '''
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
'''

def test_command_on_a_full_disk(tmp_path, text):
    "A limit on the size of files has the same effect: the first checkpoint is larger"
    pytest.importorskip('resource')
    out = tmp_path/'run'
    p = command(*flags(data=text, out=out, emb_sz=40), before=full)
    assert p.returncode==2
    assert p.stderr==f"embdrop-train: {out/'checkpoint.pth'}: cannot be written (File too large)\n"
    assert os.listdir(out)==[]
