"""Pins that `AdaptEmbedP` measures what it says and leaves the training as it was; its rule; what it refuses

It is tried in every kind of Learner in which fastai has an embedding. The rule's reference is a loop over the
measurements, written from the page's formula. Losses are compared with `validate`'s.
"""
import math, pickle, subprocess, sys, zipfile
from collections import deque
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (Categorize, Datasets, Numericalize, SortedDL, pad_input_chunk, set_seed,
                             text_classifier_learner)
from fastai_embdrop import adapt
from fastai_embdrop.adapt import AdaptEmbedP, eval_loss, feedback_p, _hold_out, _sample_batches, smoothed
from fastai_embdrop.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_learner
from fastai_embdrop.embeddings import add_embedding_dropout
from fastai_embdrop.run.corpus import lm_dataloaders
from fastai_embdrop.run.checkpoint import Checkpoint, last_checkpoint
from fastai_embdrop.run.distrib import LMDistributedDL
from conftest import SMALL, random_tokens, small_dls

# fastai reads the tables of pandas 3, and reads only
pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')

# Learners of every kind; each begins with its own seed, so two of a kind are equal

def lm(**kwargs):
    set_seed(0)
    return awd_lstm_learner(small_dls(), {**SMALL, 'embed_p':0.}, **kwargs)

def many_texts():
    set_seed(0)
    texts = [random_tokens(30, i) for i in range(30)]
    dls = lm_dataloaders(texts, [random_tokens(200, 99)], tok='split', min_freq=1, bs=4, seq_len=8, device='cpu')
    return awd_lstm_learner(dls, {**SMALL, 'embed_p':0.})

def classifier(embed_p=0.):
    set_seed(0)
    texts = [random_tokens(5+i%17, i) for i in range(50)]
    vocab = ['xxunk', 'xxpad', *sorted({w for t in texts for w in t})]
    tfms = [[lambda i: texts[i], Numericalize(vocab)], [lambda i: i%2, Categorize([0, 1])]]
    dsets = Datasets(range(50), tfms, splits=[range(40), range(40, 50)], dl_type=SortedDL)
    dls = dsets.dataloaders(bs=4, before_batch=pad_input_chunk, device='cpu', num_workers=0)
    config = {**awd_lstm_clas_config, **SMALL, 'embed_p':embed_p}
    return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, seq_len=8, metrics=accuracy)

def table(n=90):
    rng = np.random.default_rng(0)
    a,b,x,y = rng.integers(0, 9, n),rng.integers(0, 7, n),rng.normal(size=n),rng.normal(size=n)
    return pd.DataFrame(dict(a=a, b=b, x=x, y=y))

def tabular():
    set_seed(0)
    dls = TabularDataLoaders.from_df(table(), procs=[Categorify, Normalize], cat_names=['a','b'], cont_names=['x'],
                                     y_names='y', valid_idx=list(range(70, 90)), bs=8, device='cpu')
    learn = tabular_learner(dls, layers=[10], y_range=(-2, 2))
    add_embedding_dropout(learn.model, 0.)
    return learn

def collab():
    set_seed(0)
    dls = CollabDataLoaders.from_df(table(), user_name='a', item_name='b', rating_name='y', valid_pct=.2, seed=1, bs=8,
                                    device='cpu')
    learn = collab_learner(dls, n_factors=6, y_range=(-2, 2))
    add_embedding_dropout(learn.model, 0.)
    return learn

kinds = dict(lm=lm, with_logits=partial(lm, keep_logits=True), many_texts=many_texts, classifier=classifier,
             tabular=tabular, collab=collab)
every_kind = pytest.mark.parametrize('make', kinds.values(), ids=kinds)

def weights(learn):
    tensors = [*learn.model.parameters(), *learn.model.buffers()]
    return torch.cat([o.detach().flatten() for o in tensors])

def zero(history): return 0.

# Training is left as it was

def fitted(make, *cbs, epochs=3):
    learn = make()
    learn.fit_one_cycle(epochs, 1e-2, cbs=list(cbs))
    return learn

def assert_same_fit(a, b):
    assert torch.equal(weights(a), weights(b)) and a.recorder.losses==b.recorder.losses
    assert [v[:2] for v in a.recorder.values]==[v[:2] for v in b.recorder.values]

@every_kind
def test_a_rule_that_answers_0_changes_no_bit(make):
    cb = AdaptEmbedP(rule=zero)
    a,b = fitted(make),fitted(make, cb)
    assert_same_fit(a, b)
    assert len(cb.history)==20

others = GradientAccumulation,partial(GradientAccumulation, 8),partial(MixedPrecision, amp_mode=AMPMode.BF16)
@pytest.mark.parametrize('other', others)
def test_no_bit_beside_other_callbacks(other):
    a,b = fitted(lm, other()),fitted(lm, other(), AdaptEmbedP(rule=zero))
    assert_same_fit(a, b)

def test_the_rule_acts():
    a,b = fitted(lm),fitted(lm, AdaptEmbedP(rule=lambda history: .5))
    n = a.train_iter//20
    assert a.recorder.losses[:n]==b.recorder.losses[:n] and a.recorder.losses[-1]!=b.recorder.losses[-1]

class State(nn.Module):
    "A model whose forward pass assigns attributes, changes others in place, and draws from all generators"
    def __init__(self):
        super().__init__()
        self.bn,self.out,self.frozen = nn.BatchNorm1d(3),nn.Linear(3, 1),nn.BatchNorm1d(3)
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('sparse', torch.eye(3).to_sparse())
        self.hidden,self.seen = torch.zeros(1),[]
        self.total,self.mean,self.wide = torch.zeros(()),torch.zeros(()),torch.zeros(1).expand(3)
        self.log,self.last,self.sizes,self.window = [],{},set(),deque(maxlen=2)
        self.frozen.eval()
    def forward(self, x):
        self.calls += 1
        self.hidden,self.new = x.sum(),len(self.seen)
        self.seen = [*self.seen, len(x)]
        self.total += len(x)
        self.mean.data.add_(1)
        self.log.append(len(x))
        self.last['x'] = len(x)
        self.sizes.add(len(x))
        self.window.append(len(x))
        return self.out(self.frozen(self.bn(x)) + torch.rand(1) + np.random.rand())

    def held(self):
        "What it keeps besides its state dict"
        names = 'hidden','seen','total','mean','wide','log','last','sizes','window'
        return [*(getattr(self, o) for o in names), hasattr(self, 'new')]

class Count(Callback):
    n = 0
    def __init__(self): self.batches = []
    def before_batch(self):
        self.n += 1
        self.batches.append(self.n)

def test_what_a_forward_pass_changes_is_put_back():
    xs = [(torch.randn(3), torch.randn(1)) for _ in range(20)]
    count,learn = Count(),Learner(DataLoaders(DataLoader(xs, bs=4), DataLoader(xs, bs=4)), State(), nn.MSELoss())
    learn.add_cb(count)
    batches = list(learn.dls.valid)
    learn.model.train()
    learn.model.frozen.eval()
    def state():
        m = learn.model
        attrs = [m.held(), count.n, count.batches, sorted(vars(learn)), [o.training for o in m.modules()]]
        return str([*attrs, m.state_dict(), np.random.get_state(), torch.get_rng_state().tolist(), learn.training])
    learn.model(xs[0][0][None].expand(2, 3)) # so that there is something to put back
    log,total = learn.model.log,learn.model.total
    before = state()
    assert eval_loss(learn, batches) and state()==before
    assert learn.model.log is log and learn.model.total is total

def test_a_failed_measurement_leaves_nothing_either():
    learn = lm()
    batches,hidden = _sample_batches(learn.dls.valid, 1),learn.model[0].hidden
    learn.loss_func = lambda pred, targ: 1/0
    with pytest.raises(ZeroDivisionError): eval_loss(learn, batches)
    assert learn.model.training and learn.model[0].hidden is hidden and not hasattr(learn, 'xb')

def test_no_graph_is_built():
    learn,seen = lm(),[]
    learn.add_cb(Callback(after_pred=lambda self: seen.append(self.pred.requires_grad)))
    eval_loss(learn, _sample_batches(learn.dls.valid, 1))
    assert seen==[False]

class Skip(Callback):
    "Cancels validation batches of which `which` says so"
    def __init__(self, which): self.which,self.cancelled = which,0
    def before_batch(self):
        if not self.training and self.which(self.xb[0]): raise CancelBatchException
    def after_cancel_batch(self): self.cancelled += 1

def test_a_cancelled_batch_is_not_measured():
    learn = lm()
    a,b = _sample_batches(learn.dls.valid, 2)
    loss,skip = eval_loss(learn, [b]),Skip(lambda x: torch.equal(x, a[0]))
    learn.add_cb(skip)
    assert eval_loss(learn, [a, b])==loss
    cb = AdaptEmbedP(rule=zero)
    fitted(lm, cb, skip, epochs=20) # two batches in a sample
    assert len(cb.history)==20

def test_all_batches_cancelled():
    with pytest.raises(ValueError, match='callbacks cancelled every batch of a sample'):
        fitted(lm, AdaptEmbedP(), Skip(lambda x: True))

# What is measured

@every_kind
def test_the_loss_is_that_of_validate(make):
    learn = fitted(make, epochs=1)
    batches = list(learn.dls.valid)
    learn.model.train()
    learn._split(batches[0])
    learn.model(*learn.xb) # leaves a hidden state
    loss = eval_loss(learn, batches)
    assert loss==pytest.approx(learn.validate()[0], rel=1e-5)

def test_batches_weigh_as_they_hold_items():
    learn = collab()
    batches = list(learn.dls.valid)
    assert len({len(y) for *_,y in batches})>1
    losses = [eval_loss(learn, [b]) for b in batches]
    assert eval_loss(learn, batches)==pytest.approx(np.average(losses, weights=[len(y) for *_,y in batches]))

def ids_of(batches): return torch.cat([b[0].flatten() for b in batches])

@every_kind
def test_a_sample_is_always_the_same(make):
    learn = make()
    state = torch.get_rng_state()
    a,b = (ids_of(_sample_batches(learn.dls.train, 2)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
    for _ in learn.dls.train: pass # shuffles
    assert torch.equal(a, ids_of(_sample_batches(learn.dls.train, 2)))

def test_items_are_spread_and_text_is_not():
    dl = TfmdDL(list(range(100)), bs=10, shuffle=True, num_workers=0)
    assert [o.tolist() for o in _sample_batches(dl, 2)]==[list(range(0, 50, 5)), list(range(50, 100, 5))]
    assert len(_sample_batches(dl, 99))==10
    train = lm().dls.train
    a,b = [x for x,_ in _sample_batches(train, 2)]
    text = train.dataset[0][0]
    assert torch.equal(torch.cat([a[0],b[0]]), text[:16])

def test_a_sample_has_the_rows_of_one_process():
    train = lm().dls.train
    assert train.bs==4
    ours = LMDistributedDL(train, 0, 8)
    a,b = (_sample_batches(o, 1)[0] for o in (ours, train))
    assert all(x.shape==(4, 8) and torch.equal(x, y) for x,y in zip(a, b))

def test_other_loaders_give_their_first_batches():
    xs = [(torch.tensor([float(i)]),)*2 for i in range(10)]
    dl = torch.utils.data.DataLoader(xs, batch_size=2)
    assert [x.flatten().tolist() for x,_ in _sample_batches(dl, 2)]==[[0, 1], [2, 3]]

def test_a_sample_has_a_batch_for_every_250(monkeypatch):
    monkeypatch.setattr(adapt, '_most_batches', 99)
    learn,cb = lm(),AdaptEmbedP()
    learn.add_cb(cb)
    learn.n_epoch = 249
    assert len(cb._draw().train)==249*25//250==24

@pytest.mark.parametrize('epochs,n', [(1, 1), (19, 1), (20, 2), (30, 3), (200, 8)])
def test_size_of_the_samples(epochs, n):
    learn,cb = lm(),AdaptEmbedP()
    learn.add_cb(cb)
    learn.n_epoch = epochs
    assert len(learn.dls.train)==25
    samples = cb._draw()
    assert len(samples.train)==n and len(samples.control)==min(n, len(learn.dls.valid))

def test_history_is_what_was_measured():
    learn,seen = lm(),[]
    class Look(Callback):
        order = AdaptEmbedP.order+1
        def after_batch(self):
            if self.training: seen.append([eval_loss(self.learn, o) for o in (cb.samples.train, cb.samples.control)])
    cb = AdaptEmbedP(rule=lambda history: .01*len(history))
    learn.fit(4, cbs=[cb, Look()])
    assert len(seen)==100 and [h[2:] for h in cb.history]==[tuple(o) for o in seen[4::5]]
    assert [h[:2] for h in cb.history]==[((i+1)/20, pytest.approx(.01*i)) for i in range(20)]
    assert learn.recorder.hps['embed_p']==pytest.approx([.01*(i//5) for i in range(100)])
    assert learn.model[0].encoder_dp.embed_p==pytest.approx(.19)

def test_a_short_fit_measures_after_each_batch():
    learn,cb = tabular(),AdaptEmbedP()
    learn.fit(1, cbs=cb)
    assert len(cb.history)==len(learn.dls.train)==8 and cb.history[-1][0]==1.

# The rule

def reference(history, max_p, rho, gain, dead, ema, until):
    least,x,p,cap = math.inf,None,0.,None
    for pct,_,train,control in history:
        new = control - rho*train
        x = new if x is None else ema*x + (1-ema)*new
        least = min(least, x)
        p = min(max(gain*(x-least-dead), 0.), max_p)
        if pct<=until: cap = p
    return p if cap is None else min(p, cap)

losses = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), max_size=25)
@given(losses, st.floats(.01, 1), st.floats(0, 1), st.floats(0, 8), st.floats(0, .5), st.floats(0, .9), st.floats(0, 1))
def test_the_rule_is_its_formula(losses, max_p, rho, gain, dead, ema, until):
    history = [((i+1)/20, 0., *o) for i,o in enumerate(losses)]
    args = max_p,rho,gain,dead,ema,until
    assert feedback_p(history, *args)==pytest.approx(reference(history, *args), abs=1e-12)
    assert 0 <= feedback_p(history, *args) <= max_p

def test_the_defaults_of_the_rule():
    history = [(.1, 0., 5., 5.), (.2, 0., 4., 4.8)]
    x = [3., .9+.7*3.2]
    assert feedback_p(history)==pytest.approx(4*(x[1]-x[0]-.06))
    late = [(.65, 0., 4., 9.)]
    assert feedback_p(history+late)==pytest.approx(feedback_p(history)) and feedback_p(history+[(.6, 0., 4., 9.)])==.4
    assert feedback_p([(.65, 0., 5., 5.), (.7, 0., 4., 9.)])==.4 # no measurement before `until`

def test_it_may_fall_after_until():
    history = [(.5, 0., 5., 5.), (.6, 0., 4., 6.)]
    assert feedback_p(history)==.4 and feedback_p(history+[(.7, 0., 5., 5.), (.8, 0., 5., 5.), (.9, 0., 5., 5.)]) < .2

def test_what_falls_after_until_does_not_raise_what_was_before():
    history = [(.2, 0., 0., 1.), (.4, 0., 0., 1.1), (.7, 0., 0., .5), (.8, 0., 0., 2.)]
    assert feedback_p(history, ema=0.)==pytest.approx(4*(.1-.06))

def test_moving_average():
    assert smoothed([], .3)==[] and smoothed([2.], .3)==[2.]
    assert smoothed([1., 2., 3.], .3)==pytest.approx([1, 1.7, .51+2.1])

def test_max_p_is_the_ceiling():
    def run(max_p):
        cb = AdaptEmbedP(max_p)
        with pytest.MonkeyPatch.context() as m:
            values = iter([1., 1.]+[1., 9.]*19)
            m.setattr(adapt, 'eval_loss', lambda *_: next(values))
            fitted(lm, cb)
        return max(p for _,p,*_ in cb.history)
    assert run(.4)==.4 and run(.05)==.05 and run(1)==1

def test_other_keys():
    learn,cb = lm(),AdaptEmbedP(key='*input_dp.p', rule=lambda history: .3)
    learn.fit(1, cbs=cb)
    assert learn.model[0].input_dp.p==.3 and learn.model[0].encoder_dp.embed_p==0
    assert list(learn.recorder.hps)==['*input_dp.p']

# Control data

def test_control_of_ones_own():
    train,valid = [random_tokens(800)],[random_tokens(300, 5)]
    dls = lm_dataloaders(train, valid, tok='split', vocab=lm().dls.vocab, bs=4, seq_len=8, device='cpu')
    cb,seen = AdaptEmbedP(control=dls.valid),[]
    class Look(Callback):
        def before_train(self): seen.append(ids_of(cb.samples.control))
    fitted(lm, cb, Look())
    assert len(seen)==3 and all(torch.equal(o, ids_of(_sample_batches(dls.valid, 1))) for o in seen)

def texts_of(dl): return [o[0].tolist() for o in dl.dataset]

@pytest.mark.parametrize('make', [lm, many_texts])
@pytest.mark.parametrize('share', [.001, .25, .6])
def test_text_held_out(make, share):
    dl = make().dls.train
    train,control = (texts_of(o) for o in _hold_out(dl, share))
    whole = sum(texts_of(dl), [])
    assert sum(train, [])+sum(control, [])==whole and len(sum(control, []))==round(share*len(whole))
    assert len(train)+len(control) in (len(texts_of(dl)), len(texts_of(dl))+1) and all(train+control)

@pytest.mark.parametrize('make', [classifier, tabular, collab])
def test_items_held_out(make):
    dl = make().dls.train
    train,control = _hold_out(dl, .25)
    n = len(dl.dataset)
    assert (len(train.dataset), len(control.dataset))==(n-round(n/4), round(n/4)) and train.shuffle and train.bs==dl.bs
    def rows(dl): return sorted(str(b[0].tolist()) for b in dl.new(shuffle=False, drop_last=False, bs=1))
    assert sorted(rows(train)+rows(control))==rows(dl)

def test_items_held_out_are_spread():
    dl = DataLoaders.from_dsets(list(range(10)), [0], bs=2, device='cpu', num_workers=0).train
    train,control = _hold_out(dl, .3)
    assert list(control.dataset)==[0, 3, 6] and list(train.dataset)==[1, 2, 4, 5, 7, 8, 9]

def test_training_never_sees_what_is_held_out():
    learn,seen = tabular(),[]
    class See(Callback):
        def before_batch(self):
            if self.training: seen.extend(map(str, self.xb[1].tolist()))
    cb = AdaptEmbedP(control=.25)
    learn.fit(3, cbs=[cb, See()])
    held = {str(o) for b in _sample_batches(_hold_out(learn.dls.train, .25)[1], 99) for o in b[1].tolist()}
    assert len(held)==18 and len(set(seen))>=45 and not held & set(seen)
    assert learn.train_iter==3*len(_hold_out(learn.dls.train, .25)[0])
    learn.fit(1, cbs=See())
    assert held & set(seen)

@pytest.mark.parametrize('make', [lm, many_texts, classifier, collab])
def test_a_share_works_everywhere(make):
    cb = AdaptEmbedP(control=.3)
    fitted(make, cb, epochs=2)
    assert cb.history[-1][0]==1. and all(map(math.isfinite, cb.history[-1]))

# Where it is silent

def test_lr_find_and_validate(tmp_path):
    set_seed(0)
    learn,cb = awd_lstm_learner(small_dls(), {**SMALL, 'embed_p':.2}, path=tmp_path),AdaptEmbedP(rule=zero)
    learn.add_cb(cb)
    learn.lr_find(num_it=50, show_plot=False)
    learn.validate()
    learn.get_preds(reorder=False)
    assert not cb.history and learn.model[0].encoder_dp.embed_p==.2
    learn.fit(1)
    before = list(cb.history)
    learn.validate()
    learn.get_preds(reorder=False)
    assert len(before)==20 and cb.history==before

def test_each_fit_begins_anew():
    learn,cb = lm(),AdaptEmbedP(rule=lambda history: .3)
    learn.fit(1, cbs=cb)
    learn.fit(1, cbs=cb)
    assert len(cb.history)==20 and learn.recorder.hps['embed_p'][0]==0

class Planted:
    "An item of a data set that says so when it is pickled"
    pickled = 0
    def __init__(self, x): self.x = x
    def __reduce__(self):
        Planted.pickled += 1
        return Planted,(self.x,)

def pairs(items):
    x = torch.tensor([[o.x] for o in items])
    return x,x

def planted():
    "A Learner whose data are `Planted`"
    items = [Planted(i/20) for i in range(20)]
    dls = DataLoaders(*(TfmdDL(items, bs=4, create_batch=pairs, num_workers=0) for _ in range(2)), device='cpu')
    return Learner(dls, nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.)), nn.MSELoss())

class End(Callback):
    "Ends a fit at its second batch by an exception"
    def __init__(self, ex): self.ex = ex
    def before_batch(self):
        if self.training and self.train_iter==1: raise self.ex

def sample_bytes(cb): return torch.cat([b[0].flatten() for b in cb.samples.train]).numpy().tobytes()

@pytest.mark.parametrize('ex', [None, CancelFitException, KeyboardInterrupt])
@pytest.mark.parametrize('own', [False, True])
def test_no_data_is_saved_with_it(ex, own):
    learn,seen = planted(),[]
    cb = AdaptEmbedP(control=learn.dls.valid if own else .25, key='*1.p', rule=zero)
    class Look(Callback):
        def before_train(self): seen.append(sample_bytes(cb))
    try: learn.fit(1, cbs=[cb, Look()] + ([End(ex)] if ex else []))
    except KeyboardInterrupt: pass
    Planted.pickled = 0
    saved = pickle.dumps(cb)
    assert Planted.pickled==0 and len(seen)==1 and seen[0] not in saved
    assert pickle.loads(saved).history==cb.history
    if ex is not KeyboardInterrupt: assert cb.samples is None and cb.train_dl is None

def test_a_loaded_one_asks_for_its_control_data():
    cb = pickle.loads(pickle.dumps(AdaptEmbedP(control=lm().dls.valid)))
    with pytest.raises(ValueError, match='no control data'): fitted(lm, cb)
    assert pickle.loads(pickle.dumps(AdaptEmbedP(control=.25))).control==.25

@pytest.mark.parametrize('control', [None, .2])
def test_a_learner_with_it_can_be_exported(control, tmp_path):
    learn = lm()
    learn.path = tmp_path
    learn.add_cb(AdaptEmbedP(control=control))
    learn.fit(1)
    learn.export('m.pkl')
    assert isinstance(load_learner(tmp_path/'m.pkl').adapt_embed_p, AdaptEmbedP)
    with zipfile.ZipFile(tmp_path/'m.pkl') as z: parts = [z.read(o) for o in z.namelist()]
    text,row = learn.dls.train.dataset[0][0].numpy(),8 # tokens that follow each other in a batch
    assert len(text)==800 and not any(text[i:i+row].tobytes() in o for o in parts for i in range(800-row))

class Reads(TorchDispatchMode):
    "Counts the numbers that the host reads from tensors"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

def test_the_host_reads_one_number_for_each_loss():
    def reads(*cbs):
        with Reads() as mode: fitted(lm, *cbs)
        return mode.n
    cb = AdaptEmbedP(rule=zero)
    assert reads(cb)-reads()==2*len(cb.history)+2==42 # two are seeds of the samples' loaders, when the fit begins

# Resumed, and in several processes

class Stop(Callback):
    order = 2000
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', [13, 50, 62])
def test_a_resumed_fit_is_bit_equal(at, tmp_path):
    rule = lambda history: .02*len(history)
    whole,cb = lm(),AdaptEmbedP(rule=rule)
    whole.fit_one_cycle(4, 1e-2, cbs=cb)
    stopped = [AdaptEmbedP(rule=rule), Checkpoint(tmp_path, every=1), Stop(at)]
    with pytest.raises(KeyboardInterrupt): lm().fit_one_cycle(4, 1e-2, cbs=stopped)
    learn,again = lm(),AdaptEmbedP(rule=rule)
    learn.fit_one_cycle(4, 1e-2, cbs=[again, Checkpoint(tmp_path, state=last_checkpoint(tmp_path)), Stop(None)])
    assert torch.equal(weights(whole), weights(learn)) and again.history==cb.history and len(cb.history)==20

def test_all_processes_take_what_process_0_measured(tmp_path):
    script = Path(__file__).with_name('adapt_ranks.py')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', script, tmp_path]
    res = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=200)
    assert res.returncode==0, res.stderr[-2000:]
    a,b = (torch.load(tmp_path/f'{r}.pth') for r in range(2))
    assert a['history']==b['history'] and a['ps']==b['ps'] and len(a['history'])==20 and max(a['ps'])>0
    assert a['own']!=b['own'] and a['refused'] and b['refused']
    assert a['divided']==b['divided'] and len(a['divided'])>1 and a['shapes']==b['shapes']=={(4, 8)}

# What is refused

@pytest.mark.parametrize('max_p', [0, -.1, 1.1, math.nan, True, 'x'])
def test_ceilings_that_are_none(max_p):
    with pytest.raises(ValueError, match=f'max_p={max_p!r}'): AdaptEmbedP(max_p)

def test_a_rule_has_its_own_ceiling():
    with pytest.raises(ValueError, match='max_p=0.1 is the ceiling of `feedback_p`'): AdaptEmbedP(.1, rule=zero)

def test_without_max_p_the_ceiling_is_two_fifths():
    assert AdaptEmbedP().rule([(.1, 0., 9., 9.), (.2, 0., 1., 9.)])==.4

@pytest.mark.parametrize('control', [0, 0., 1, -.5, 1.5, math.nan, True])
def test_shares_that_are_none(control):
    with pytest.raises(ValueError, match=f'control={control}'): AdaptEmbedP(control=control)

@pytest.mark.parametrize('control', ['0.1', [1, 2], small_dls()])
def test_control_that_is_no_loader(control):
    with pytest.raises(TypeError, match=f'control is a {type(control).__name__}'): AdaptEmbedP(control=control)

def test_a_share_of_any_type():
    a,b = (AdaptEmbedP(control=o) for o in (np.float32(.25), .25))
    fitted(lm, a), fitted(lm, b)
    assert a.history==b.history

def test_control_data_without_targets():
    learn = collab()
    control = learn.dls.test_dl(table()[:20].drop(columns='y'))
    assert len(next(iter(control)))<len(next(iter(learn.dls.train)))
    with pytest.raises(ValueError, match='control data has no targets'): learn.fit(1, cbs=AdaptEmbedP(control=control))

def one_loader():
    learn = lm()
    learn.dls = DataLoaders(learn.dls.train)
    return learn

def test_a_third_loader_does_not_matter():
    learn = lm()
    learn.dls = DataLoaders(*learn.dls.loaders, learn.dls.valid)
    cb = AdaptEmbedP()
    learn.fit(1, cbs=cb)
    assert cb.history

@pytest.mark.parametrize('n', [1, 2, 3])
def test_of_several_ranks_the_first_one_counts(n, monkeypatch):
    def broadcast(box): box[0] = 'of process 0'
    monkeypatch.setattr(adapt, 'num_distrib', lambda: n)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', broadcast)
    assert adapt._of_rank_0('own')==('own' if n==1 else 'of process 0')

@pytest.mark.parametrize('n', [0, 1, 2])
def test_a_share_is_for_one_process(n, monkeypatch):
    learn,cb = lm(),AdaptEmbedP(control=.25)
    learn.add_cb(cb)
    monkeypatch.setattr(adapt, 'num_distrib', lambda: n)
    if n<2: assert cb._control_dl()
    else:
        with pytest.raises(ValueError, match='in several processes give'): cb._control_dl()

def test_no_control_data():
    with pytest.raises(ValueError, match='no control data: the Learner has no validation set'):
        one_loader().fit(1, cbs=AdaptEmbedP())

@pytest.mark.parametrize('make,control', [(lm, DataLoader([], bs=4)), (lm, .003), (collab, .001)])
def test_control_data_without_a_batch(make, control):
    with pytest.raises(ValueError, match='no control data: its sample has no batch'):
        make().fit(1, cbs=AdaptEmbedP(control=control))

def test_a_share_needs_items():
    learn = lm()
    learn.dls = DataLoaders(torch.utils.data.DataLoader(range(8)), learn.dls.valid)
    with pytest.raises(ValueError, match='control=0.5 needs a fastai loader of items'):
        learn.fit(1, cbs=AdaptEmbedP(control=.5))

@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('which', [0, 1])
def test_a_loss_that_is_no_number(bad, which, monkeypatch):
    values = [1., 1.]
    values[which] = bad
    answers = iter([1., 1., *values])
    monkeypatch.setattr(adapt, 'eval_loss', lambda *_: next(answers))
    with pytest.raises(ValueError, match='training loss and control loss are .* at 10% of the fit'):
        fitted(lm, AdaptEmbedP())

def test_a_rule_that_leaves_0_to_1():
    with pytest.raises(ValueError, match='embed_p'): fitted(lm, AdaptEmbedP(rule=lambda history: 1.5))

def test_nothing_to_adapt():
    with pytest.raises(ValueError, match="'drop_p'"): fitted(lm, AdaptEmbedP(key='drop_p'))

def test_plot():
    cb = AdaptEmbedP(rule=lambda history: .02*len(history))
    with pytest.raises(ValueError, match='nothing was measured yet'): cb.plot()
    fitted(lm, cb)
    ax = cb.plot()
    pcts,ps,train,control = map(list, zip(*cb.history))
    assert [(l.get_xdata().tolist(), l.get_ydata().tolist(), l.get_label()) for l in ax.lines]==[
        (pcts, control, 'control loss'), (pcts, train, 'training loss')]
    twin = next(o for o in ax.figure.axes if o is not ax)
    assert twin.lines[0].get_ydata().tolist()==ps and cb.plot(ax) is ax
    low,high = twin.get_ylim()
    assert low < 0 < 1 <= high
