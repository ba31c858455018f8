"Pins the folder of a run: its files, loading it (with no code of a stranger's run), a classifier made of it."
import json, math, os, pickle, platform, shutil
from zipfile import ZIP_DEFLATED, ZipFile
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from fastai.text.all import TextDataLoaders, accuracy, match_embeds, set_seed, text_classifier_learner
from fastai_embdrop import __version__
from fastai_embdrop.awdlstm import AWD_LSTM, awd_lstm_learner
from fastai_embdrop.run import folder
from fastai_embdrop.run.corpus import fingerprint, lm_dataloaders, read_corpus
from fastai_embdrop.run.files import load_weights, read_vocab
from fastai_embdrop.run.folder import (_clas_config as clas_config, _read_settings as read_settings, classifier_from_lm,
                                       load_run, _run_files)
from fastai_embdrop.run.settings import Settings
from fastai_embdrop.run.train import train_lm
from conftest import SMALL, random_tokens, small_dls
from running import TINY, Bomb, run, text

@pytest.fixture
def copy(run, tmp_path): return shutil.copytree(run[0], tmp_path/'copy')

def edit_settings(copy, **kw):
    cfg = json.loads((copy/'config.json').read_text())
    cfg['settings'].update(kw)
    (copy/'config.json').write_text(json.dumps(cfg))

def weights(copy): return torch.load(copy/'model.pth', weights_only=True)

# What is in it

def test_files_of_a_run(run):
    out,learn = run
    assert sorted(os.listdir(out))==sorted(_run_files)
    for f in 'schedule.png','losses.png':
        image = plt.imread(out/f)
        assert min(image.shape[:2])>300 and image[...,:3].std()>0
    assert json.loads((out/'vocab.json').read_text())==list(learn.dls.vocab)
    prompt,text = (out/'sample.txt').read_text().strip().split('\n\n', 1)
    assert text.startswith(prompt) and len(text.split())>len(prompt.split())+40

def test_weights_alone(run):
    out,learn = run
    wgts,want = torch.load(out/'model.pth', weights_only=True),learn.model.state_dict()
    assert list(wgts)==list(want) and all(torch.equal(v, wgts[k]) for k,v in want.items())

def test_config(run, text):
    out,learn = run
    cfg,corpus = json.loads((out/'config.json').read_text()),read_corpus(text)
    assert Settings(**cfg['settings'])==read_settings(out/'config.json')==Settings(**TINY, data=text, out=out)
    assert cfg['fingerprint']==fingerprint(corpus) and cfg['device']=='cpu'
    versions = cfg['versions']
    assert versions['torch']==torch.__version__ and versions['python']==platform.python_version()
    assert versions['fastai_embdrop']==__version__ and {'fastai','fastcore'} < set(versions)
    def n_words(texts): return sum(len(t.split()) for t in texts)
    assert cfg['tokens']=={part:n_words(texts) for part,texts in corpus._asdict().items()}
    assert cfg['vocab_sz']==len(learn.dls.vocab)
    assert cfg['params']==sum(p.numel() for p in learn.model.parameters())

def test_history(run):
    hist = pd.read_csv(run[0]/'history.csv')
    assert list(hist)==['epoch','train_loss','valid_loss','perplexity','embed_p','time'] and len(hist)==2
    assert np.allclose(hist.perplexity, np.exp(hist.valid_loss))

def test_line_ends_in_the_sample_are_line_ends(tmp_path):
    (tmp_path/'a.txt').write_text('\n'.join(' '.join(random_tokens(5, i)) for i in range(200)))
    train_lm(Settings(**TINY, data=tmp_path/'a.txt', out=tmp_path/'run'))
    sample = (tmp_path/'run/sample.txt').read_text().split('\n\n', 1)[1]
    assert 'xxeos' not in sample and sample.strip().count('\n')>1

# Loading

def test_load_run_predicts_the_same(run):
    out,learn = run
    again,x = load_run(out, 'cpu'),torch.randint(0, len(learn.dls.vocab), (2,9))
    for l in learn,again:
        l.model.eval()
        l.model.reset()
    assert torch.equal(learn.model(x)[0], again.model(x)[0])
    assert again.predict('w1 w2', n_words=4, no_bar=True).startswith('w1 w2')
    assert again.model[0].encoder.weight is again.model[1].decoder.weight

@pytest.mark.parametrize('what', [lambda l: l.validate(), lambda l: l.validate(0), lambda l: l.get_preds(),
                                  lambda l: l.fit(1), lambda l: l.dls.one_batch()])
def test_without_text_there_is_nothing_to_measure_or_train_on(run, what):
    learn = load_run(run[0], 'cpu')
    with pytest.raises(ValueError, match='no text to train or validate on'): what(learn)
    assert learn.predict('w1', no_bar=True)
    x,_ = learn.dls.test_dl(['w1 w2 w3']).one_batch()
    assert learn.dls.vocab[x[0,0]]=='w1', 'a text of one\'s own has batches'

def test_with_its_text_a_run_validates_to_its_own_values(run, text):
    learn = load_run(run[0], 'cpu', data=text)
    res = json.loads((run[0]/'config.json').read_text())['results']
    assert learn.validate()==[pytest.approx(res[k], rel=1e-6) for k in ('valid_loss','perplexity')]
    learn.fit(1)
    assert learn.recorder.values[-1][0]<res['train_loss']

# To a classifier

@pytest.fixture
def reviews():
    "80 texts of the run's words, of two kinds"
    texts = ['w1 w5 w1 w9 w1','w2 w7 w2 w3 w2']*40
    return pd.DataFrame(dict(text=texts, label=['c0','c1']*40, is_valid=[False]*60+[True]*20))

def clas_loaders(reviews, lm):
    return TextDataLoaders.from_df(reviews, text_vocab=lm.dls.vocab, text_col='text', label_col='label',
                                   valid_col='is_valid', bs=10, device='cpu')

def test_a_run_becomes_a_classifier(run, reviews):
    set_seed(0)
    lm = load_run(run[0], 'cpu')
    learn = classifier_from_lm(lm, clas_loaders(reviews, lm), drop_mult=.1, metrics=accuracy)
    encoder = learn.model[0].module
    assert isinstance(encoder, AWD_LSTM) and (encoder.emb_sz, encoder.n_hid, encoder.n_layers)==(8,12,2)
    for k,v in run[1].model[0].state_dict().items(): assert torch.equal(encoder.state_dict()[k], v), k
    assert not encoder.encoder.weight.requires_grad and learn.model[1].layers[0][2].weight.requires_grad
    learn.unfreeze()
    learn.fit_one_cycle(8, 5e-2)
    assert learn.recorder.values[-1][2]==1
    assert [learn.predict(f'{w} {w} w4 {w}')[0] for w in ('w1','w2')]==['c0','c1']

def test_the_same_as_fastais_way(run, reviews, tmp_path):
    "save_encoder, a config by hand, load_encoder"
    lm = load_run(run[0], 'cpu')
    dls = clas_loaders(reviews, lm)
    ours = classifier_from_lm(lm, dls)
    lm.path = tmp_path
    lm.save_encoder('enc')
    theirs = text_classifier_learner(dls, AWD_LSTM, config=clas_config(lm), pretrained=False, path=tmp_path)
    theirs.load_encoder('enc')
    a,b = (o.model[0].state_dict() for o in (ours,theirs))
    assert list(a)==list(b) and all(torch.equal(a[k], b[k]) for k in a)
    def trainable(learn): return [p.requires_grad for p in learn.model.parameters()]
    assert trainable(ours)==trainable(theirs) and {*trainable(ours)}=={True, False}

def test_a_classifier_of_a_bidirectional_model(reviews):
    lm = awd_lstm_learner(small_dls(), {**SMALL, 'bidir':True})
    learn = classifier_from_lm(lm, clas_loaders(reviews, lm), metrics=accuracy)
    encoder = learn.model[0].module
    assert encoder.n_dir==2
    for k,v in lm.model[0].state_dict().items(): assert torch.equal(encoder.state_dict()[k], v), k
    learn.fit(1)

def test_a_classifier_of_other_words_is_refused(run, reviews):
    lm = load_run(run[0], 'cpu')
    other = TextDataLoaders.from_df(reviews, text_col='text', label_col='label', valid_col='is_valid', bs=10)
    with pytest.raises(ValueError, match='make the loaders with text_vocab=lm.dls.vocab'): classifier_from_lm(lm, other)

# From strangers: code

plants = {
    'whole': lambda bomb,f: torch.save(bomb, f),
    'among weights': lambda bomb,f: torch.save(weights(f.parent) | {'0.encoder.weight':bomb}, f),
    'named from the stack': lambda bomb,f: torch.save(weights(f.parent) | {'more':bomb}, f, pickle_protocol=4),
    'old format': lambda bomb,f: torch.save(bomb, f, _use_new_zipfile_serialization=False),
    'bare': lambda bomb,f: f.write_bytes(pickle.dumps(bomb))}

@pytest.mark.parametrize('f,how', [*[('model.pth',k) for k in plants], ('vocab.json','bare'), ('config.json','bare')])
def test_a_bomb_in_a_good_run_does_not_go_off(copy, tmp_path, f, how):
    assert load_run(copy).predict('w1', no_bar=True)
    plants[how](Bomb(tmp_path/'boom'), copy/f)
    with pytest.raises(ValueError, match=f): load_run(copy)
    assert not (tmp_path/'boom').exists()
    if how=='bare': pickle.loads((copy/f).read_bytes())
    else: torch.load(copy/f, weights_only=False)
    assert (tmp_path/'boom').exists(), 'it was a live one'

class Claim:
    "What has PyTorch's own `weights_only` unpickler take 64 GB"
    def __reduce__(self): return bytearray, (2**36,)

def test_a_small_file_takes_no_memory(copy):
    torch.save(Claim(), copy/'model.pth')
    with pytest.raises(ValueError, match='model.pth: .*names __builtin__ bytearray'): load_run(copy)

@pytest.mark.parametrize('metadata', ['x', 5, {'':5}])
def test_crafted_metadata_does_no_harm(copy, metadata):
    wgts = weights(copy)
    wgts._metadata = metadata
    torch.save(wgts, copy/'model.pth')
    assert load_run(copy, 'cpu').predict('w1', no_bar=True)

# From strangers: sizes

def only_on_meta(monkeypatch):
    "Fail a test that makes a model whose tensors have data"
    make = folder.awd_lstm_lm
    def made(*args):
        assert torch.empty(()).is_meta
        return make(*args)
    monkeypatch.setattr(folder, 'awd_lstm_lm', made)
    monkeypatch.setattr(folder, '_run_learner', lambda *_: pytest.fail('made a learner'))

too_large = 'config.json: .*( bytes, but| layers, but|Storage size calculation overflowed)'

@pytest.mark.parametrize('kw', [dict(n_hid=10**9), dict(emb_sz=10**9), dict(emb_sz=10**4), dict(n_layers=10**6),
                                dict(n_layers=2**62, n_hid=2**62), dict(n_layers=60)])
def test_sizes_beyond_the_file_are_refused_at_once(copy, kw, monkeypatch):
    edit_settings(copy, **kw)
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match=too_large): load_run(copy)

def test_a_thousand_layers_in_one_tensor_are_refused(copy, monkeypatch):
    "Many names for the same bytes: the model would be larger than the file"
    wgts = weights(copy)
    edit_settings(copy, n_layers=1000)
    one = {k.removeprefix('0.rnns.0'):v for k,v in wgts.items() if k.startswith('0.rnns.0')}
    torch.save(wgts | {f'0.rnns.{i}{k}':v for i in range(1000) for k,v in one.items()}, copy/'model.pth')
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match='config.json: 1000 layers, but'): load_run(copy)

def test_layers_without_weights_are_refused_however_large_the_file(copy, monkeypatch):
    edit_settings(copy, n_layers=100)
    torch.save(weights(copy) | dict(more=torch.zeros(2**20)), copy/'model.pth')
    only_on_meta(monkeypatch)
    with pytest.raises(ValueError, match='config.json: 100 layers, but'): load_run(copy)

# From strangers: what does not fit

B = '1.decoder.bias'
@pytest.mark.parametrize('change,msg', [
    (lambda w: w[B].fill_(math.nan), f"'{B}' is not finite"), (lambda w: w.pop(B), f"'{B}' is missing"),
    (lambda w: w.update(more=torch.zeros(1)), r"'more' is \(1,\) torch.float32 in the file, but missing in the model"),
    (lambda w: w.update({B:w[B].double()}), 'float64'), (lambda w: w.update({B:w[B][:-1]}), f"'{B}' is"),
    (lambda w: w.update({B:torch.zeros(1).expand(2**40)}), 'larger than its file'),
    (lambda w: w.update({1:torch.zeros(1)}), 'not tensors by name'), (lambda w: w.update(a=1), 'not tensors by name')])
def test_weights_are_those_of_the_settings(copy, change, msg):
    wgts = weights(copy)
    change(wgts)
    torch.save(wgts, copy/'model.pth')
    with pytest.raises(ValueError, match=f'model.pth: .*{msg}'): load_run(copy)

def test_compressed_weights_are_refused(copy):
    "A small file could hold any size"
    with ZipFile(copy/'model.pth') as z: files = {o:z.read(o) for o in z.namelist()}
    with ZipFile(copy/'model.pth', 'w', ZIP_DEFLATED) as z:
        for k,v in files.items(): z.writestr(k, v)
    assert weights(copy)
    with pytest.raises(ValueError, match='damaged or compressed'): load_run(copy)

def test_one_flipped_bit_of_a_weight_is_noticed(copy):
    data = bytearray((copy/'model.pth').read_bytes())
    data[data.find(weights(copy)[B].numpy().tobytes())] ^= 1
    (copy/'model.pth').write_bytes(data)
    with pytest.raises(ValueError, match='damaged'): load_run(copy)

@pytest.mark.parametrize('words,msg', [
    ('{}', 'not a list of words'), ('["xxunk", 1]', 'not a list of words'), ('[', 'line 1'),
    ('["xxpad","xxunk"]', 'does not begin with xxunk xxpad xxbos'), ('['*100_000, 'recursion'),
    ('[1' + '0'*5000 + ']', 'digits')])
def test_bad_vocabulary(copy, words, msg):
    (copy/'vocab.json').write_text(words)
    with pytest.raises(ValueError, match=f'vocab.json: .*{msg}'): load_run(copy)

def test_vocabulary_and_weights_must_agree(copy):
    (copy/'vocab.json').write_text(json.dumps(json.loads((copy/'vocab.json').read_text())[:-1]))
    with pytest.raises(ValueError, match="model.pth: '0.encoder.weight' is"): load_run(copy)

@pytest.mark.parametrize('settings,msg', [
    ({'epoch':1}, 'unknown key epoch'), ({'start':.5}, 'start is called embed_p now'), ({'lr':math.nan}, 'lr=nan'),
    ({'end':.5}, 'end is called embed_p_end now'), ({'epochs':'1'}, "'epochs' has a value of the wrong type"),
    ({'epochs':True}, 'epochs=True: not of type int'),
    ({'embed_p_end':'None'}, "'embed_p_end' has a value of the wrong type"),
    ({'drop_mult':9.}, '_p=')])
def test_bad_config(copy, settings, msg):
    edit_settings(copy, **settings)
    with pytest.raises(ValueError, match=f'config.json: .*{msg}'): load_run(copy)

@pytest.mark.parametrize('config', ['{}', '[]', '{"settings":null}', '{"settings":[]}'])
def test_config_without_settings(copy, config):
    (copy/'config.json').write_text(config)
    with pytest.raises(ValueError, match='config.json: no settings'): load_run(copy)

def test_what_fastai_unpickles_loads_safely(run, tmp_path, monkeypatch):
    "The ways of SECURITY.md: encoder, weights for another vocabulary, whole model"
    learn,sizes = run[1],dict(emb_sz=8, n_hid=12, n_layers=2)
    dls = lm_dataloaders([random_tokens(400, 3, V=30)], [random_tokens(99)], tok='split', min_freq=1, bs=4, seq_len=8,
                         device='cpu')
    other = awd_lstm_learner(dls, sizes, path=tmp_path)
    monkeypatch.setattr(learn, 'path', tmp_path)
    learn.save_encoder('enc')
    learn.save('all', with_opt=False)
    torch.save(learn.model.state_dict(), tmp_path/'all.pth')
    wgts = match_embeds(load_weights(tmp_path/'all.pth'), read_vocab(run[0]/'vocab.json'), other.dls.vocab)
    other.model.load_state_dict(wgts)
    i,j = (o.dls.vocab.index('w1') for o in (learn,other))
    assert torch.equal(other.model[0].encoder.weight[j], learn.model[0].encoder.weight[i])
    new = awd_lstm_learner(learn.dls, sizes, path=tmp_path)
    new.model[0].load_state_dict(load_weights(tmp_path/'models/enc.pth'))
    assert torch.equal(new.model[0].rnns[1].weight_hh_l0_raw, learn.model[0].rnns[1].weight_hh_l0_raw)
    assert new.load('all', weights_only=True) is new
    assert torch.equal(new.model[1].decoder.bias, learn.model[1].decoder.bias)
