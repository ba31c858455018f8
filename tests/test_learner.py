"""Pins that fastai takes our `AWD_LSTM` wherever it takes its own: learners, encoders, pretrained weights, export

One classifier is trained from end to end."""
import warnings
import numpy as np, pandas as pd, pytest, torch
from fastai.text.all import (BaseTokenizer, CategoryBlock, ColReader, DataBlock, LMLearner, RandomSplitter, TextBlock,
                             URLs, accuracy, get_language_model, language_model_learner, load_learner, save_pickle,
                             set_seed, text_classifier_learner)
from fastai.text.models import awdlstm as fastai_awdlstm
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_learner, awd_lstm_lm_config
from fastai_embdrop.dropout import EmbeddingDropout
from conftest import SMALL, small_dls

LM = {**awd_lstm_lm_config, **SMALL}

def reviews(n=160, seed=0):
    "Texts of 12 words, 4 of them good or bad as the label says"
    rng = np.random.default_rng(seed)
    kinds = dict(pos=['good','great','fine','nice'], neg=['bad','poor','weak','dull'])
    neutral = ['the','film','was','a','story','with']
    def text(label): return ' '.join(rng.permutation([*rng.choice(kinds[label], 4), *rng.choice(neutral, 8)]))
    labels = ['pos','neg']*(n//2)
    return pd.DataFrame(dict(label=labels, text=[text(o) for o in labels]))

def reviews_dls(df, *blocks, **kwargs):
    block = TextBlock.from_df('text', tok=BaseTokenizer(), n_workers=0, min_freq=1, seq_len=12, **kwargs)
    return DataBlock((block,*blocks), get_x=ColReader('text'), get_y=ColReader('label') if blocks else None,
                     splitter=RandomSplitter(.25, 0)).dataloaders(df, bs=16, seq_len=12, device='cpu')

def test_classifier_end_to_end(tmp_path):
    "LM on text, `save_encoder`, `text_classifier_learner`, `load_encoder`, `fine_tune`, annealed at both stages"
    set_seed(0, reproducible=True)
    df,kw = reviews(320),dict(pretrained=False, drop_mult=.3, path=tmp_path)
    lm_dls = reviews_dls(df, is_lm=True)
    lm = language_model_learner(lm_dls, AWD_LSTM, config=LM, **kw)
    lm.fit_one_cycle(4, 1e-2, cbs=AnnealEmbedP(.3, 0))
    lm.save_encoder('enc')
    dls,config = reviews_dls(df, CategoryBlock, vocab=lm_dls.vocab),{**awd_lstm_clas_config, **SMALL}
    learn = text_classifier_learner(dls, AWD_LSTM, seq_len=12, metrics=accuracy, config=config, **kw)
    learn.load_encoder('enc')
    assert torch.equal(learn.model[0].module.encoder.weight, lm.model[0].encoder.weight)
    learn.fine_tune(6, 2e-2, freeze_epochs=2, lr_mult=5, cbs=AnnealEmbedP(.3, 0))
    assert learn.validate()[1] > .8, 'chance is .5'
    assert learn.model[0].module.encoder_dp.embed_p < .01

def fastais_learner(dls, **config):
    return language_model_learner(dls, AWD_LSTM, config={**LM, **config}, pretrained=False)

def our_learner(dls, **config): return awd_lstm_learner(dls, {**SMALL, **config})
both = pytest.mark.parametrize('make', [fastais_learner, our_learner])

@both
def test_learners_have_our_modules(dls, make):
    learn = make(dls)
    assert isinstance(learn, LMLearner) and isinstance(learn.model[0].encoder_dp, EmbeddingDropout)
    assert len(learn.splitter(learn.model))==SMALL['n_layers']+1
    learn.fit(1)
    learn.predict('w1', n_words=2, no_bar=True)

def wt103_like(path, d=12):
    "Weights and vocabulary in the format of fastai's WikiText-103 files, over other words in another order"
    vocab = ['xxunk','xxpad'] + [f'w{i}' for i in range(30,5,-1)]
    config = {**fastai_awdlstm.awd_lstm_lm_config, **SMALL}
    sd = get_language_model(fastai_awdlstm.AWD_LSTM, len(vocab), config).state_dict()
    path.mkdir(parents=True, exist_ok=True)
    torch.save(sd, path/'lstm_fwd.pth')
    save_pickle(path/'itos_wt103.pkl', vocab)
    return vocab,sd

def check_pretrained(learn, vocab, sd):
    i,j = vocab.index('w7'),learn.dls.vocab.index('w7')
    assert torch.equal(learn.model[0].encoder.weight[j], sd['0.encoder.weight'][i])
    assert torch.equal(learn.model[0].rnns[1].weight_hh_l0_raw, sd['0.rnns.1.weight_hh_l0_raw'])
    assert learn.model[1].decoder.weight is learn.model[0].encoder.weight

def test_pretrained_fnames(dls, tmp_path):
    vocab,sd = wt103_like(tmp_path/'models')
    learn = language_model_learner(dls, AWD_LSTM, config=LM, pretrained_fnames=['lstm_fwd','itos_wt103'], path=tmp_path)
    check_pretrained(learn, vocab, sd)

@pytest.mark.parametrize('backwards', [False, True])
def test_pretrained_is_wikitext_103(dls, tmp_path, monkeypatch, backwards):
    vocab,sd = wt103_like(tmp_path/'wt103')
    asked = []
    monkeypatch.setattr('fastai.text.learner.untar_data', lambda url, **kw: asked.append(url) or tmp_path/'wt103')
    check_pretrained(awd_lstm_learner(dls, SMALL, pretrained=True, backwards=backwards), vocab, sd)
    assert asked==[URLs.WT103_BWD if backwards else URLs.WT103_FWD]

def test_pretrained_classifier(tmp_path, monkeypatch):
    vocab,sd = wt103_like(tmp_path/'wt103')
    monkeypatch.setattr('fastai.text.learner.untar_data', lambda url, **kw: tmp_path/'wt103')
    df = pd.DataFrame(dict(text=['w7 w8 w9']*40, label=['a','b']*20))
    dls = reviews_dls(df, CategoryBlock)
    encoder = text_classifier_learner(dls, AWD_LSTM, config=SMALL).model[0].module.encoder
    i,j = vocab.index('w7'),dls.vocab[0].index('w7')
    assert torch.equal(encoder.weight[j], sd['0.encoder.weight'][i])

def test_save_load_with_optimizer(dls, tmp_path):
    learn = awd_lstm_learner(dls, SMALL, path=tmp_path)
    learn.fit(1)
    learn.save('m')
    other = awd_lstm_learner(dls, SMALL, path=tmp_path).load('m')
    assert all(torch.equal(a,b) for a,b in zip(learn.model.parameters(), other.model.parameters()))

def test_export_load_learner(dls, tmp_path):
    learn = awd_lstm_learner(dls, SMALL, path=tmp_path, cbs=AnnealEmbedP(.5, .1))
    learn.fit(1)
    learn.export('m.pkl')
    other = load_learner(tmp_path/'m.pkl')
    x = torch.randint(0, 20, (2,5))
    for l in (learn,other): l.model.eval().reset()
    assert torch.equal(learn.model(x)[0], other.model(x)[0])
    assert other.model[0].encoder_dp.embed_p==learn.model[0].encoder_dp.embed_p

def test_only_the_contiguity_warning_is_muted():
    m = AWD_LSTM(20, 6, 8, 1)
    def warn(*_):
        warnings.warn('RNN module weights are not part of single contiguous chunk of memory.')
        warnings.warn('another')
    m.rnns[0].module.register_forward_pre_hook(warn)
    with pytest.warns(UserWarning) as seen: m(torch.zeros(1,2, dtype=torch.long))
    assert [str(w.message) for w in seen]==['another']

def test_config_keys_reach_the_module(dls):
    assert awd_lstm_learner(dls, {**SMALL, 'per':'sequence'}).model[0].encoder_dp.per=='sequence'
    learn = text_classifier_learner(reviews_dls(reviews(), CategoryBlock), AWD_LSTM, config=SMALL, pretrained=False)
    assert learn.model[0].module.encoder_dp.hold

@both
def test_hold_in_a_language_model_warns(dls, make):
    with pytest.warns(UserWarning, match='one mask lasts|lasts that long'): make(dls, hold=True).fit(1)
