"""Pins our classes to fastai's: the same seed gives the same bits wherever fastai's are right.

`EmbeddingDropout` over seeds x p x dtypes x padding, `AWD_LSTM` over state dicts, outputs and twenty training losses.
"""
import pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai.text.all import Callback, get_language_model, get_text_classifier, language_model_learner
from fastai.text.models import awdlstm as theirs
from fastai_embdrop import awdlstm as ours
from fastai_embdrop.dropout import EmbeddingDropout
from conftest import SMALL, small_dls

V,D = 50,6
LM = {**theirs.awd_lstm_lm_config, **SMALL}

def pair(padding_idx=None, dtype=torch.float32, p=.5):
    emb = nn.Embedding(V, D, padding_idx=padding_idx, dtype=dtype)
    return EmbeddingDropout(emb, p), theirs.EmbeddingDropout(emb, p)

def seeded(seed, f, *args, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('padding_idx', [None, 0, 1, V-1])
@pytest.mark.parametrize('p', [0, .02, .1, .5, .9])
def test_same_seed_same_bits(p, padding_idx, dtype):
    a,b = pair(padding_idx, dtype, p)
    for seed in range(10):
        words = seeded(seed, torch.randint, 0, V, (4,9))
        assert torch.equal(seeded(seed, a, words), seeded(seed, b, words))

def test_same_bits_up_to_half_a_million_words():
    emb,words = nn.Embedding(2**19, 1),torch.randint(0, 2**19, (4,9))
    a,b = EmbeddingDropout(emb, .5),theirs.EmbeddingDropout(emb, .5)
    assert torch.equal(seeded(0, a, words), seeded(0, b, words))

@pytest.mark.parametrize('p', [.02, .5, .9])
def test_same_gradients(p):
    a,b = pair(1, p=p)
    words,grads = torch.randint(0, V, (4,9)),[]
    for m in (a,b):
        seeded(0, m, words).pow(2).sum().backward()
        grads.append(m.emb.weight.grad.clone())
        m.emb.weight.grad = None
    assert_close(*grads)

scales = [2., torch.tensor(.3), torch.arange(1., D+1), torch.rand(V,1), torch.rand(V,D), torch.rand(1,D)]
@pytest.mark.parametrize('scale', scales)
def test_same_scale(scale):
    a,b = pair()
    words = torch.randint(0, V, (4,9))
    if isinstance(scale, torch.Tensor) and scale.numel()>1: # fastai's `if scale` takes one number alone
        want = theirs.F.embedding(words, b.emb.weight*seeded(0, theirs.dropout_mask, b.emb.weight, (V,1), .5)*scale)
    else: want = seeded(0, b, words, scale=scale)
    assert_close(seeded(0, a, words, scale=scale), want, rtol=1e-6, atol=1e-6)

def test_same_number_of_draws():
    a,b = pair()
    words = torch.randint(0, V, (4,9))
    seeded(0, a, words)
    after = torch.rand(1)
    seeded(0, b, words)
    assert torch.equal(after, torch.rand(1))

MODELS = dict(
    lm   = lambda arch: get_language_model(arch, V, LM),
    bidir_lm = lambda arch: get_language_model(arch, V, {**LM, 'bidir':True}),
    untied_lm = lambda arch: get_language_model(arch, V, {**LM, 'tie_weights':False}),
    clas = lambda arch: get_text_classifier(arch, V, 3, config=SMALL),
    bidir_clas = lambda arch: get_text_classifier(arch, V, 3, config={**SMALL, 'bidir':True}))

@pytest.mark.parametrize('make', MODELS.values(), ids=MODELS)
def test_state_dicts_both_ways(make):
    a,b = make(ours.AWD_LSTM),make(theirs.AWD_LSTM)
    assert list(a.state_dict())==list(b.state_dict())
    assert [n for n,_ in a.named_parameters()]==[n for n,_ in b.named_parameters()]
    a.load_state_dict(b.state_dict(), strict=True)
    assert all(torch.equal(x,y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))
    make(theirs.AWD_LSTM).load_state_dict(a.state_dict(), strict=True)

@pytest.mark.parametrize('make', [MODELS['lm'], MODELS['untied_lm']])
def test_ties_survive_loading(make):
    a = make(ours.AWD_LSTM)
    tied = a[1].decoder.weight is a[0].encoder.weight
    a.load_state_dict(make(theirs.AWD_LSTM).state_dict())
    assert tied==(make is MODELS['lm'])==(a[1].decoder.weight is a[0].encoder.weight)
    assert a[0].encoder is a[0].encoder_dp.emb

def test_same_seed_same_model():
    a,b = (seeded(0, MODELS['lm'], lib.AWD_LSTM) for lib in (ours,theirs))
    assert all(torch.equal(x,y) for x,y in zip(a.parameters(), b.parameters()))

@pytest.mark.parametrize('train', [True, False])
def test_same_outputs(train):
    a,b = (seeded(0, MODELS['lm'], lib.AWD_LSTM).train(train) for lib in (ours,theirs))
    for sl in (7,5):
        words = torch.randint(0, V, (3,sl))
        for x,y in zip(seeded(1, a, words), seeded(1, b, words)): assert_close(x, y)

class LossLog(Callback):
    run_valid = False
    def before_fit(self): self.vals = []
    def after_batch(self): self.vals.append(self.loss.item())

def losses(arch):
    torch.manual_seed(0)
    learn = language_model_learner(small_dls(), arch, config=LM, pretrained=False, cbs=LossLog)
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn.loss_log.vals

def test_same_first_twenty_losses():
    a,b = losses(ours.AWD_LSTM),losses(theirs.AWD_LSTM)
    assert len(a)>=20 and a[0]-a[19]>.05
    assert_close(torch.tensor(a[:20]), torch.tensor(b[:20]), rtol=1e-5, atol=0)
