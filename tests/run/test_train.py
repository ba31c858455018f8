"""Pins `embdrop-train`: settings and their precedence, the files of a run, bad input (one line, status 2, nothing written), loading."""
import json, math, os, pickle, platform, shutil, subprocess, sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.text.all import SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly, match_embeds
from fastcore.docments import docments
from fastai_embdrop import __version__
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.corpus import fingerprint, lm_dataloaders, read_corpus
from fastai_embdrop.run.files import load_weights, read_vocab
from fastai_embdrop.run.settings import Settings, parse_args, read_ini, to_ini
from fastai_embdrop.run import folder
from fastai_embdrop.run.folder import load_run, run_files
from fastai_embdrop.run.train import main, train_lm
from conftest import random_tokens

root = Path(__file__).parent.parent.parent
TINY = dict(epochs=2, bs=4, seq_len=8, emb_sz=8, n_hid=12, n_layers=2, tok='split', min_freq=1, device='cpu')

def flags(**kw): return [o for k,v in {**TINY, **kw}.items() for o in (f'--{k}', str(v))]

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'text.txt'
    path.write_text(' '.join(random_tokens(900)))
    return path

@pytest.fixture(scope='module')
def run(text, tmp_path_factory):
    "A finished run: folder and `Learner`"
    out = tmp_path_factory.mktemp('out')/'new'/'run'
    return out,train_lm(Settings(**TINY, data=text, out=out))

def fails(capsys, *args):
    "The one line that `main` writes to stderr for bad input"
    capsys.readouterr()
    assert main([str(o) for o in args])==2
    out,err = capsys.readouterr()
    assert err.count('\n')==1 and err.startswith('embdrop-train: ') and 'Exception occured' not in err
    return err

# Settings

shipped = Settings(max_words=120_000, embed_p=.1, embed_p_end=0)

def test_shipped_settings_anneal_on_fewer_words():
    assert (root/"settings.ini").read_text()==to_ini(shipped)
    assert parse_args([str(root/"settings.ini")])==(shipped, False, False, False) and parse_args([])==(Settings(), False, False, False)

def test_the_keys():
    keys = 'data out epochs bs seq_len lr emb_sz n_hid n_layers drop_mult embed_p embed_p_end sched tok max_vocab min_freq max_words seed device precision save_every'
    assert list(read_ini(root/'settings.ini'))==keys.split()
    assert (Settings().data, Settings().out)==('docstrings','run')

def test_flag_over_file_over_default(tmp_path):
    (tmp_path/'s.ini').write_text('\ufeff[train]\nepochs = 2\nlr = 1e-3\ndata = 50%%/$x\n', encoding='utf-8')
    s,show,overwrite,resume = parse_args(['--epochs', '7', str(tmp_path/'s.ini'), '--overwrite'])
    assert (s.epochs, s.lr, s.bs, s.data)==(7, 1e-3, Settings().bs, '50%%/$x')
    assert (show,overwrite,resume)==(False,True,False)

def test_show_prints_the_settings_in_force(tmp_path, capsys):
    assert main(['--epochs', '9', '--show', '--out', str(tmp_path/'run')]) is None
    (tmp_path/'s.ini').write_text(capsys.readouterr().out)
    assert parse_args([str(tmp_path/'s.ini')])[0]==Settings(epochs=9, out=tmp_path/'run') and not (tmp_path/'run').exists()

def test_help_documents_each_setting(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert e.value.code==0 and all(docments(Settings)[k] for k in vars(Settings()))
    for k,v in vars(Settings()).items(): assert f'--{k} ' in text and f'(default: {v})' in text

# Bad input

@pytest.mark.parametrize('flag,value,msg', [
    ('data','nowhere','nowhere'), ('data','','data is empty'), ('epochs','0','epochs=0'), ('epochs','2.5',"epochs='2.5': not of type int"),
    ('lr','0','lr=0'), ('lr','inf','lr=inf'), ('bs','-1','bs=-1'), ('embed_p','1.5','embed_p=1.5'), ('embed_p_end','nan','embed_p_end=nan'), ('drop_mult','-1','drop_mult'),
    ('sched','up','up'), ('tok','words','words'), ('precision','fp8','fp8'), ('precision','fp16','needs a CUDA device'), ('precision','bf16','needs a CUDA device'),
    ('device','gpu','device=gpu'), ('device','meta','device=meta'), ('seed',2**64,'seed'), ('n_hid','0','n_hid'), ('max_vocab','1','max_vocab'),
    ('epoch','3','--epoch'), ('seq-len','8','--seq-len'), ('drop_mult','9','_p=')])
def test_bad_setting(capsys, tmp_path, text, flag, value, msg):
    assert msg in fails(capsys, *flags(data=text, out=tmp_path/'run'), f'--{flag}', value)
    assert not (tmp_path/'run').exists()

@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a CUDA device')
def test_no_such_device(capsys, tmp_path, text):
    assert 'device=cuda' in fails(capsys, *flags(data=text, out=tmp_path/'run', device='cuda'))

@pytest.mark.parametrize('kw', [dict(embed_p=0), dict(embed_p_end=0)])
def test_exponential_schedule_needs_both_ends(capsys, kw):
    assert 'embed_p and embed_p_end must be above 0' in fails(capsys, *flags(sched='exp', **kw))

@pytest.mark.parametrize('ini,msg', [('[train]\nepoch = 3', 'unknown key epoch'), ('[train]\nepochs = three', "epochs='three'"), ('[run]\nepochs = 3', 'no section'),
                                     ('epochs = 3', 'no section'), ('[train]\nbs = 3\nbs = 4', 'bs'), ('[train]\nbs', 'bs'), ('[train]\nbs =', 'bs is empty'), ('', 'no text')])
def test_bad_ini(capsys, tmp_path, ini, msg):
    (tmp_path/'s.ini').write_text(ini)
    assert msg in fails(capsys, tmp_path/'s.ini')

def test_missing_ini(capsys, tmp_path): assert 's.ini' in fails(capsys, tmp_path/'s.ini')

@pytest.mark.parametrize('name,content,msg', [('a.txt', b'', 'no text'), ('a.txt', b'caf\xe9 ', 'not UTF-8 at byte 3'), ('a.csv', b'body\nhello\n', "'text'"),
                                              ('a.txt', b'a few words '*10, '28 training tokens, but a batch needs 33'), ('a.txt', b'a '*300, '29 held-out')])
def test_bad_data(capsys, tmp_path, name, content, msg):
    (tmp_path/name).write_bytes(content)
    assert msg in fails(capsys, *flags(data=tmp_path/name, out=tmp_path/'run', bs=32 if 'held' in msg else 4))
    assert os.listdir(tmp_path)==[name]

def test_out_is_not_the_data(capsys, tmp_path):
    (tmp_path/'sample.txt').write_text('mine')
    assert 'is where the data are' in fails(capsys, *flags(data=tmp_path, out=tmp_path/'.'), '--overwrite')
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
    assert sorted(os.listdir(tmp_path))==sorted([*run_files, 'mine.txt']) and (tmp_path/'mine.txt').read_text()=='old'
    assert 'xxunk' in json.loads((tmp_path/'vocab.json').read_text())

def test_error_of_a_callback_is_unwrapped(capsys, tmp_path, text, monkeypatch):
    def before_fit(self): raise ValueError('two\nlines')
    monkeypatch.setattr('fastai.learner.Recorder.before_fit', before_fit)
    assert fails(capsys, *flags(data=text, out=tmp_path/'run'))=='embdrop-train: two lines\n'

def test_diverged_training_says_so(capsys, tmp_path, text):
    assert 'not finite' in fails(capsys, *flags(data=text, out=tmp_path/'run', lr=1e30))

# A run

def test_files_of_a_run(run):
    out,learn = run
    assert sorted(os.listdir(out))==sorted(run_files)
    for f in 'schedule.png','losses.png': assert min(plt.imread(out/f).shape[:2])>300 and plt.imread(out/f)[...,:3].std()>0
    assert json.loads((out/'vocab.json').read_text())==list(learn.dls.vocab)
    prompt,text = (out/'sample.txt').read_text().strip().split('\n\n', 1)
    assert text.startswith(prompt) and len(text.split())>len(prompt.split())+40

def test_weights_alone(run):
    out,learn = run
    wgts = torch.load(out/'model.pth', weights_only=True)
    assert list(wgts)==list(learn.model.state_dict()) and all(torch.equal(v, wgts[k]) for k,v in learn.model.state_dict().items())

def test_config(run, text):
    out,learn = run
    cfg = json.loads((out/'config.json').read_text())
    assert Settings(**cfg['settings'])==Settings(**TINY, data=text, out=out)
    corpus = read_corpus(text)
    assert cfg['fingerprint']==fingerprint(corpus) and cfg['device']=='cpu'
    assert cfg['versions']['torch']==torch.__version__ and cfg['versions']['python']==platform.python_version() and cfg['versions']['fastai_embdrop']==__version__
    assert {'fastai','fastcore'} < set(cfg['versions'])
    assert cfg['tokens']=={k: sum(len(t.split()) for t in v) for k,v in corpus._asdict().items()} and cfg['vocab_sz']==len(learn.dls.vocab)
    assert cfg['params']==sum(p.numel() for p in learn.model.parameters())

def test_history(run):
    hist = pd.read_csv(run[0]/'history.csv')
    assert list(hist)==['epoch','train_loss','valid_loss','perplexity','embed_p','time'] and len(hist)==2
    assert np.allclose(hist.perplexity, np.exp(hist.valid_loss))

@pytest.mark.parametrize('name,sched', [
    ('cos',SchedCos(.6,.1)), ('lin',SchedLin(.6,.1)), ('exp',SchedExp(.6,.1)), ('poly',SchedPoly(.6,.1,2)),
    ('const',SchedNo(.6,.1)), ('early',lambda pct: max(.6-1.5*pct, .1)), ('late',lambda pct: .6 if pct<.5 else .1)])
def test_embed_p_follows_the_schedule(tmp_path, text, name, sched):
    learn = train_lm(Settings(**{**TINY, 'epochs':3}, data=text, out=tmp_path, embed_p=.6, embed_p_end=.1, sched=name))
    n,hist = len(learn.dls.train),pd.read_csv(tmp_path/'history.csv')
    assert learn.recorder.hps['embed_p']==pytest.approx([sched(i/(3*n)) for i in range(3*n)])
    assert hist.embed_p.tolist()==pytest.approx([sched(((e+1)*n-1)/(3*n)) for e in range(3)])
    assert set(learn.recorder.hps)=={'lr','mom','embed_p'}

def test_a_run_can_be_repeated(run, tmp_path, text):
    hists = []
    for i,seed in enumerate([42,42,1]):
        train_lm(Settings(**TINY, data=text, out=tmp_path/str(i), seed=seed))
        hists.append(pd.read_csv(tmp_path/str(i)/'history.csv').drop(columns='time'))
    assert hists[0].equals(hists[1]) and not hists[0].equals(hists[2])
    assert (tmp_path/'0/model.pth').read_bytes()==(tmp_path/'1/model.pth').read_bytes()
    assert (tmp_path/'0/sample.txt').read_text()==(tmp_path/'1/sample.txt').read_text()

def test_settings_reach_the_model(tmp_path, text):
    learn = train_lm(Settings(**{**TINY, 'min_freq':2, 'max_vocab':20, 'epochs':1}, data=text, out=tmp_path, drop_mult=0, max_words=500))
    enc = learn.model[0]
    assert (enc.emb_sz, enc.n_hid, enc.n_layers, enc.input_dp.p, enc.rnns[0].weight_p)==(8, 12, 2, 0, 0)
    assert (learn.dls.bs, learn.dls.train.seq_len)==(4,8) and len([o for o in learn.dls.vocab if o!='xxfake'])==20
    assert json.loads((tmp_path/'config.json').read_text())['tokens']=={'train':500, 'valid':50, 'test':0}

def test_test_text_is_measured(tmp_path, capsys):
    for i,o in enumerate(['train','valid','test']): (tmp_path/f'{o}.txt').write_text(' '.join(random_tokens(400, i)))
    assert main(flags(data=tmp_path, out=tmp_path/'run'))is None
    res = json.loads((tmp_path/'run'/'config.json').read_text())['results']
    assert res['test_perplexity']==pytest.approx(np.exp(res['test_loss'])) and res['test_loss']!=res['valid_loss']
    assert f"test_perplexity {res['test_perplexity']:.4g}" in capsys.readouterr().out

def test_summary(tmp_path, text, capsys):
    main(flags(data=text, out=tmp_path/'run'))
    out,err = capsys.readouterr()
    res = json.loads((tmp_path/'run'/'config.json').read_text())['results']
    assert f"perplexity {res['perplexity']:.4g}" in out and all(str(tmp_path/'run'/f) in out for f in run_files) and not err

# Loading

def test_load_run_predicts_the_same(run):
    out,learn = run
    again,x = load_run(out, 'cpu'),torch.randint(0, len(learn.dls.vocab), (2,9))
    for l in learn,again: l.model.eval(); l.model.reset()
    assert torch.equal(learn.model(x)[0], again.model(x)[0])
    assert again.predict('w1 w2', n_words=4, no_bar=True).startswith('w1 w2')
    assert again.model[0].encoder.weight is again.model[1].decoder.weight

# Files from strangers

@pytest.fixture
def copy(run, tmp_path): return shutil.copytree(run[0], tmp_path/'copy')

class Bomb:
    "What makes a folder when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def among(path): return torch.load(path, weights_only=True)
plants = {'whole': lambda b,f: torch.save(b, f), 'among weights': lambda b,f: torch.save(among(f) | {'0.encoder.weight':b}, f),
          'named from the stack': lambda b,f: torch.save(among(f) | {'more':b}, f, pickle_protocol=4),
          'old format': lambda b,f: torch.save(b, f, _use_new_zipfile_serialization=False), 'bare': lambda b,f: f.write_bytes(pickle.dumps(b))}

@pytest.mark.parametrize('f,how', [('model.pth',k) for k in plants] + [('vocab.json','bare'), ('config.json','bare')])
def test_a_bomb_in_a_good_run_does_not_go_off(copy, tmp_path, f, how):
    assert load_run(copy).predict('w1', no_bar=True)
    plants[how](Bomb(tmp_path/'boom'), copy/f)
    with pytest.raises(ValueError, match=f): load_run(copy)
    assert not (tmp_path/'boom').exists()
    pickle.loads((copy/f).read_bytes()) if how=='bare' else torch.load(copy/f, weights_only=False)
    assert (tmp_path/'boom').exists(), 'it was a live one'

class Claim:
    "What has PyTorch's own `weights_only` unpickler take 64 GB"
    def __reduce__(self): return bytearray, (2**36,)

def test_a_small_file_takes_no_memory(copy):
    torch.save(Claim(), copy/'model.pth')
    with pytest.raises(ValueError, match='model.pth: .*names __builtin__ bytearray'): load_run(copy)

def only_on_meta(monkeypatch):
    "Fail a test that makes a model whose tensors have data"
    make = folder.awd_lstm_lm
    def made(*args):
        assert torch.empty(()).is_meta
        return make(*args)
    monkeypatch.setattr(folder, 'awd_lstm_lm', made)
    monkeypatch.setattr(folder, 'run_learner', lambda *_: pytest.fail('made a learner'))

@pytest.mark.parametrize('kw', [dict(n_hid=10**9), dict(emb_sz=10**9), dict(n_layers=10**6), dict(n_layers=2**62, n_hid=2**62), dict(n_layers=60), dict(emb_sz=10**4)])
def test_sizes_beyond_the_file_are_refused_at_once(copy, kw, monkeypatch):
    cfg = json.loads((copy/'config.json').read_text())
    cfg['settings'].update(kw)
    (copy/'config.json').write_text(json.dumps(cfg))
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match='config.json: .*( bytes, but| layers, but|Storage size calculation overflowed)'): load_run(copy)

def test_a_thousand_layers_in_one_tensor_are_refused(copy, monkeypatch):
    "Many names for the same bytes: the model would be larger than the file"
    cfg,wgts = json.loads((copy/'config.json').read_text()),torch.load(copy/'model.pth', weights_only=True)
    cfg['settings']['n_layers'] = 1000
    (copy/'config.json').write_text(json.dumps(cfg))
    one = {k.removeprefix('0.rnns.0'):v for k,v in wgts.items() if k.startswith('0.rnns.0')}
    torch.save(wgts | {f'0.rnns.{i}{k}':v for i in range(1000) for k,v in one.items()}, copy/'model.pth')
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match='config.json: 1000 layers, but'): load_run(copy)

@pytest.mark.parametrize('change,msg', [
    (lambda w: w['1.decoder.bias'].fill_(math.nan), "'1.decoder.bias' is not finite"), (lambda w: w.pop('1.decoder.bias'), "'1.decoder.bias' is missing"),
    (lambda w: w.update(more=torch.zeros(1)), r"'more' is \(1,\) torch.float32, by settings and vocabulary missing"),
    (lambda w: w.update({'1.decoder.bias':w['1.decoder.bias'].double()}), 'float64'), (lambda w: w.update({'1.decoder.bias':w['1.decoder.bias'][:-1]}), "'1.decoder.bias' is"),
    (lambda w: w.update({'1.decoder.bias':torch.zeros(1).expand(2**40)}), 'larger than its file'), (lambda w: w.update({1:torch.zeros(1)}), 'not tensors by name'), (lambda w: w.update(a=1), 'not tensors by name')])
def test_weights_are_those_of_the_settings(copy, change, msg):
    wgts = torch.load(copy/'model.pth', weights_only=True)
    change(wgts)
    torch.save(wgts, copy/'model.pth')
    with pytest.raises(ValueError, match=f'model.pth: .*{msg}'): load_run(copy)

def test_layers_without_weights_are_refused_however_large_the_file(copy, monkeypatch):
    cfg,wgts = json.loads((copy/'config.json').read_text()),torch.load(copy/'model.pth', weights_only=True)
    cfg['settings']['n_layers'] = 100
    (copy/'config.json').write_text(json.dumps(cfg))
    torch.save(wgts | dict(more=torch.zeros(2**20)), copy/'model.pth')
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match='config.json: 100 layers, but'): load_run(copy)

def test_compressed_weights_are_refused(copy):
    "A small file could hold any size"
    with ZipFile(copy/'model.pth') as z: files = {o:z.read(o) for o in z.namelist()}
    with ZipFile(copy/'model.pth', 'w', ZIP_DEFLATED) as z:
        for k,v in files.items(): z.writestr(k, v)
    assert torch.load(copy/'model.pth', weights_only=True)
    with pytest.raises(ValueError, match='damaged or compressed'): load_run(copy)

def test_one_flipped_bit_of_a_weight_is_noticed(copy):
    b = bytearray((copy/'model.pth').read_bytes())
    b[b.find(torch.load(copy/'model.pth', weights_only=True)['1.decoder.bias'].numpy().tobytes())] ^= 1
    (copy/'model.pth').write_bytes(b)
    with pytest.raises(ValueError, match='damaged'): load_run(copy)

@pytest.mark.parametrize('words,msg', [('{}', 'not a list of words'), ('["xxunk", 1]', 'not a list of words'), ('["xxpad","xxunk"]', 'does not begin with xxunk xxpad xxbos'), ('[', 'line 1'),
                                       ('['*100_000, 'recursion'), ('[1' + '0'*5000 + ']', 'digits')])
def test_bad_vocabulary(copy, words, msg):
    (copy/'vocab.json').write_text(words)
    with pytest.raises(ValueError, match=f'vocab.json: .*{msg}'): load_run(copy)

def test_vocabulary_and_weights_must_agree(copy):
    (copy/'vocab.json').write_text(json.dumps(json.loads((copy/'vocab.json').read_text())[:-1]))
    with pytest.raises(ValueError, match="model.pth: '0.encoder.weight' is"): load_run(copy)

@pytest.mark.parametrize('settings,msg', [({}, ''), (None, 'no settings'), ([], 'no settings'), ({'epoch':1}, 'unknown key epoch'), ({'start':.5}, 'start is called embed_p now'), ({'epochs':'1'}, "'epochs' is not of its type"),
                                          ({'epochs':True}, 'epochs=True: not of type int'), ({'lr':math.nan}, 'lr=nan'), ({'drop_mult':9.}, '_p=')])
def test_bad_config(copy, settings, msg):
    cfg = json.loads((copy/'config.json').read_text())
    cfg['settings'] = {**cfg['settings'], **settings} if settings else settings
    (copy/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=f'config.json: .*{msg}'): load_run(copy)

def test_what_fastai_unpickles_loads_safely(run, tmp_path, monkeypatch):
    "The ways of SECURITY.md: encoder, weights for another vocabulary, whole model"
    learn = run[1]
    other = awd_lstm_learner(lm_dataloaders([random_tokens(400, 3, V=30)], [random_tokens(99)], tok='split', min_freq=1, bs=4, seq_len=8, device='cpu'), dict(emb_sz=8, n_hid=12, n_layers=2), path=tmp_path)
    monkeypatch.setattr(learn, 'path', tmp_path)
    learn.save_encoder('enc'); learn.save('all', with_opt=False)
    torch.save(learn.model.state_dict(), tmp_path/'all.pth')
    wgts = match_embeds(load_weights(tmp_path/'all.pth'), read_vocab(run[0]/'vocab.json'), other.dls.vocab)
    other.model.load_state_dict(wgts)
    i,j = (o.dls.vocab.index('w1') for o in (learn,other))
    assert torch.equal(other.model[0].encoder.weight[j], learn.model[0].encoder.weight[i])
    new = awd_lstm_learner(learn.dls, dict(emb_sz=8, n_hid=12, n_layers=2), path=tmp_path)
    new.model[0].load_state_dict(load_weights(tmp_path/'models/enc.pth'))
    assert torch.equal(new.model[0].rnns[1].weight_hh_l0_raw, learn.model[0].rnns[1].weight_hh_l0_raw)
    assert new.load('all', weights_only=True) is new and torch.equal(new.model[1].decoder.bias, learn.model[1].decoder.bias)

# The command

def command(*args): return subprocess.run([sys.executable, '-c', 'import sys; from fastai_embdrop.run.train import main; sys.exit(main())', *map(str, args)], capture_output=True, text=True)

def test_command_succeeds(tmp_path, text):
    p = command(*flags(data=text, out=tmp_path/'run', tok='spacy'))
    assert (p.returncode, p.stderr)==(0,'') and 'valid_loss' in p.stdout and sorted(os.listdir(tmp_path/'run'))==sorted(run_files)

def test_command_fails_in_one_line(tmp_path):
    p = command('--data', tmp_path/'nowhere.txt', '--out', tmp_path/'run')
    assert p.returncode==2 and p.stderr==f"embdrop-train: {tmp_path/'nowhere.txt'}: no such file or folder\n" and not (tmp_path/'run').exists()
