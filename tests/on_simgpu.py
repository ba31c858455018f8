"""Pins, on the simulated accelerator of `simgpu`: our code mixes no devices and adds no copies or reads to a fit.

Each check also runs on faulty code, which it must catch. tests/test_simgpu.py runs this file in a process of its own.
"""
from collections import Counter
from functools import cache, partial
import pytest, simgpu, torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.text.all import AWD_LSTM as FastaiAWD_LSTM, Perplexity, SchedLin, language_model_learner, set_seed
from fastai.text.models.awdlstm import awd_lstm_lm_config as fastais_config
from fastai.text.models.core import get_text_classifier
from fastai_embdrop import dropout
from fastai_embdrop.anneal import AnnealDropMult, AnnealEmbedP, DropoutScheduler
from fastai_embdrop.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_learner, awd_lstm_lm
from fastai_embdrop.dropout import EmbeddingDropout
from fastai_embdrop.embeddings import add_embedding_dropout, remove_embedding_dropout
from fastai_embdrop.loss import without_logits
from fastai_embdrop.run.checkpoint import Checkpoint, last_checkpoint
from fastai_embdrop.run.settings import Settings
from fastai_embdrop.run.train import load_run, train_lm
from conftest import SMALL, random_tokens, small_dls
from simgpu import SimTensor, lines, simulated

card = simgpu.device

# The simulation itself

x,y = torch.arange(6.).view(2,3),torch.tensor([0,1])
mixes = dict(add=lambda a: a+x, product=lambda a: a@x.T, index=lambda a: x[(a[:,0]>9).long()],
             into_the_card=lambda a: a.add_(x), into_the_cpu=lambda a: x.clone().add_(a),
             sum_into_the_cpu=lambda a: torch.zeros(()).add_(a.sum()))

@pytest.mark.parametrize('op', mixes.values(), ids=mixes)
def test_an_operation_on_both_devices_raises(op):
    with simulated(), pytest.raises(RuntimeError, match='same device'): op(x.to(card))

def test_a_number_may_take_part():
    with simulated() as seen:
        a = torch.ones(2, 3, device=card)
        res = a*torch.tensor(2.) + 1
        assert res.device==card and not seen
    assert_close(res.cpu_tensor, torch.full((2,3), 3.))

asked = dict(item=('read', lambda a: a.sum().item()), bool=('read', lambda a: bool(a.sum()>0)),
             nonzero=('read', lambda a: a.nonzero()), boolean_index=('read', lambda a: a[a>0]),
             cpu=('to host', lambda a: a.cpu()), copy=('to host', lambda a: x.clone().copy_(a)),
             to=('to card', lambda a: x.to(a.device)), copy_in=('to card', lambda a: a.copy_(x)),
             index=('to card', lambda a: a[y]), tensor=('to card', lambda a: torch.tensor(.5, device=a.device)))

@pytest.mark.parametrize('kind, op', asked.values(), ids=asked)
def test_a_copy_or_read_is_counted_with_its_line(kind, op):
    with simulated() as seen:
        a = torch.ones(2, 3, device=card)
        assert not seen
        op(a)
    (k,line),n = *seen, seen.total()
    assert k==kind and n==1 and line.startswith('tests/on_simgpu.py') and 'lambda a' in line

def test_a_moved_parameter_is_the_same_object():
    with simulated():
        m = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5)])
        tied = m[1].weight = m[0].weight
        m.to(card)
        assert m[0].weight is m[1].weight is tied and type(tied) is SimTensor

# What is pinned with it

def on_host(t): return t.cpu_tensor if isinstance(t, SimTensor) else t

def draw(m, words):
    "Outputs at several values of `embed_p`, then after `reset()` and in evaluation; gradients of the weight"
    res = []
    for p in (0., .3, 1.):
        m.embed_p = p
        m.emb.weight.grad = None
        out = m(words)
        out.sum().backward()
        res += [out,m.emb.weight.grad.coalesce() if m.emb.weight.grad.is_sparse else m.emb.weight.grad]
    m.reset()
    res.append(m(words))
    return res + [m.eval()(words)]

def check_draws(cls=EmbeddingDropout, V=50, sparse=False, moved=False, **kw):
    "`cls` on the card gives what it gives on the CPU, asks for no copy and reads nothing"
    torch.manual_seed(0)
    emb,words = nn.Embedding(V, 2, sparse=sparse),torch.randint(0, V, (3,7))
    torch.manual_seed(1)
    want = draw(cls(emb, .3, **kw), words)
    emb.weight.grad = None
    with simulated() as seen:
        m = cls(emb, .3, **kw).to(card) if moved else cls(emb.to(card), .3, **kw)
        words = words.to(card)
        seen.clear()
        torch.manual_seed(1)
        got = draw(m, words)
        asked = dict(seen)
    assert all(t.device==card for t in got)
    for g,w in zip(got, want): assert_close(on_host(g).detach(), w.detach())
    assert asked=={}

ways = [dict(), dict(hold=True), dict(per='sequence'), dict(per='sequence', hold=True), dict(per='token')]

@pytest.mark.parametrize('V', [50, 2**19+1], ids=['small','above the limit'])
@pytest.mark.parametrize('sparse', [False, True], ids=['dense','sparse'])
@pytest.mark.parametrize('kw', ways, ids=str)
def test_embedding_dropout(kw, sparse, V):
    for moved in (False, True): check_draws(V=V, sparse=sparse, moved=moved, **kw)

def reads(f):
    "`f`, which also looks at a value of its result"
    def planted(*args):
        res = f(*args)
        res.flatten()[0].item()
        return res
    return planted

def copies(f): return lambda *args: f(*args)*torch.tensor(1, device=args[0].device)
def on_the_cpu(f): return lambda *args: f(*map(on_host, args))

faults = [(reads,AssertionError), (copies,AssertionError), (on_the_cpu,RuntimeError)]

@pytest.mark.parametrize('fault, error', faults)
@pytest.mark.parametrize('name, per', [('dropout_mask','batch'), ('splitmix64','token')])
def test_a_fault_in_the_mask_is_caught(name, per, fault, error, monkeypatch):
    check_draws(per=per)
    monkeypatch.setattr(dropout, name, fault(getattr(dropout, name)))
    with pytest.raises(error, match='read|to card|same device'): check_draws(per=per)

@pytest.mark.parametrize('per', ['batch', 'sequence', 'token'])
@pytest.mark.parametrize('moved', [False, True], ids=['built there','moved there'])
def test_row_dropout_in_place(per, moved):
    with simulated() as seen:
        m = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3))
        if not moved: m.to(card)
        drop, = add_embedding_dropout(m, .3, per=per).values()
        m.to(card)
        words = torch.randint(0, 50, (3,7), device=card)
        seen.clear()
        m(words).sum().backward()
        drop.embed_p = .8
        m(words).sum().backward()
        m.eval()(words)
        remove_embedding_dropout(m)
        out = m.train()(words)
        assert out.device==card and not seen

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kw', ways, ids=str)
def test_awd_lstm(kw, dtype):
    with simulated() as seen:
        lm = awd_lstm_lm(50, {**SMALL, **kw})
        lm(torch.randint(0, 50, (3,7)))
        lm.to(card, dtype)
        batches = [torch.randint(0, 50, (bs,7), device=card) for bs in (3,5,2)]
        seen.clear()
        for words in batches: lm(words)[0].float().sum().backward()
        lm.reset()
        lm.eval()
        for words in batches: out = lm(words)[0]
        assert out.device==card and out.dtype==dtype and not seen

@pytest.mark.parametrize('kw', ways, ids=str)
def test_awd_lstm_from_meta(kw):
    source = awd_lstm_lm(50, SMALL)
    with simulated() as seen:
        with torch.device('meta'): lm = awd_lstm_lm(50, {**SMALL, **kw})
        lm.to_empty(device=card)
        lm.load_state_dict(source.state_dict())
        lm.reset()
        words = torch.randint(0, 50, (3,7), device=card)
        seen.clear()
        for _ in range(2): out = lm(words)[0]
        out.sum().backward()
        assert out.device==card and not seen

def test_classifier():
    configs = {AWD_LSTM:{**awd_lstm_clas_config, **SMALL}, FastaiAWD_LSTM:SMALL}
    def traffic(arch):
        with simulated() as seen:
            m = get_text_classifier(arch, 50, 2, seq_len=3, config=configs[arch]).to(card)
            words = torch.randint(2, 50, (4,9), device=card)
            seen.clear()
            for _ in range(2):
                m.reset()
                m(words)[0].sum().backward()
            return Counter(seen)
    assert traffic(AWD_LSTM)==traffic(FastaiAWD_LSTM)

# Fits

our_learner = partial(awd_lstm_learner, config=SMALL)

def fit(learner=our_learner, cbs=lambda: [], device=card, n_epoch=1, **kw):
    "A fit on the card that was moved there before; the learner and what was asked for"
    with simulated() as seen:
        set_seed(0)
        learn = learner(small_dls(240, device=device), metrics=Perplexity(), **kw)
        cbs = cbs()
        learn.model.to(device)
        seen.clear()
        with learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-2, cbs=cbs)
        return learn,Counter(seen)

def fastais_learner(dls, **kw):
    return language_model_learner(dls, FastaiAWD_LSTM, config={**fastais_config, **SMALL}, pretrained=False, **kw)

@cache
def _fastais(): return fit(fastais_learner)[1]

@pytest.fixture
def fastais(): return _fastais()

def test_a_fit_is_that_of_the_cpu():
    anneal = lambda: [AnnealEmbedP(.5, .05)]
    on_cpu,on_card = (fit(cbs=anneal, device=d)[0] for d in ('cpu',card))
    for a,b in zip(on_cpu.model.parameters(), on_card.model.parameters()): assert_close(on_host(b), a)
    assert_close(on_card.recorder.values, on_cpu.recorder.values)

def check_fit(fastais, cbs=lambda: [], **kw):
    "A fit of ours asks for the copies and reads of a fit of fastai's own, line by line"
    learn,asked = fit(cbs=cbs, **kw)
    assert asked==fastais, asked - fastais + (fastais - asked)
    return learn

scheds = {'embed_p':SchedLin(.5, .1), '0.input_dp.p':SchedLin(.2, .1)}
fits = dict(model=dict(learner=partial(our_learner, keep_logits=True)), model_and_loss=dict(),
            loss=dict(learner=lambda *args, **kw: without_logits(fastais_learner(*args, **kw))),
            anneal=dict(cbs=lambda: [AnnealEmbedP(.5, .05)]),
            epochs=dict(cbs=lambda: [AnnealEmbedP(.5, .05, epochs=3)]),
            drop_mult=dict(cbs=lambda: [AnnealDropMult(1, .5)]), scheduler=dict(cbs=lambda: [DropoutScheduler(scheds)]))

@pytest.mark.parametrize('kw', fits.values(), ids=fits)
def test_fit(kw, fastais): check_fit(fastais, **kw)

class ReadsTheLoss(AnnealEmbedP):
    def after_batch(self):
        super().after_batch()
        self.loss.item()

class CopiesItsValue(AnnealEmbedP):
    def before_batch(self):
        super().before_batch()
        self.value = torch.tensor(.5, device=self.x.device)

@pytest.mark.parametrize('cb', [ReadsTheLoss, CopiesItsValue])
def test_a_fault_in_a_callback_is_caught(cb, fastais):
    with pytest.raises(AssertionError, match='on_simgpu.py'): check_fit(fastais, cbs=lambda: [cb(.5, .05)])

def tensors(state): return sum(isinstance(o, torch.Tensor) for o in tree_leaves(state))

def check_checkpoint(cls, folder, fastais):
    "A fit with one checkpoint copies each of its tensors to the host once, and asks for no more"
    asked = fit(cbs=lambda: [cls(folder)])[1]
    extra = asked - fastais
    assert fastais <= asked and {k for k,_ in extra}=={'to host'}, str(extra)
    assert 0 < extra.total() <= tensors(last_checkpoint(folder))

class WaitsAtEachBatch(Checkpoint):
    def after_batch(self):
        self.loss.item()
        super().after_batch()

def test_checkpoint_copies_each_tensor_once(tmp_path, fastais):
    check_checkpoint(Checkpoint, tmp_path, fastais)
    with pytest.raises(AssertionError, match='self.loss.item'): check_checkpoint(WaitsAtEachBatch, tmp_path, fastais)

class Stop(Callback):
    "Breaks a fit off after training batch `n`"
    order = 2000
    def __init__(self, n): self.breaks = lambda i: i==n
    def after_batch(self):
        if self.training and self.breaks(self.train_iter): raise KeyboardInterrupt

def test_resumed_fit(tmp_path):
    cbs = lambda state=None, kill_at=0: [AnnealEmbedP(.5, .05), Checkpoint(tmp_path, 5, state), Stop(kill_at)]
    whole,_ = fit(cbs=cbs)
    with pytest.raises(KeyboardInterrupt): fit(cbs=lambda: cbs(kill_at=5))
    state = last_checkpoint(tmp_path)
    assert state['train_iter']==5
    resumed,asked = fit(cbs=lambda: cbs(state))
    for a,b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(on_host(a), on_host(b))
    moments = [t for s in resumed.opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert moments and all(t.device==card for t in moments)
    assert not [l for k,l in asked if k=='read' and 'fastai_embdrop' in l]

class Sums(Callback):
    "Keeps a tensor on the card"
    def before_fit(self): self.total = None
    def after_batch(self):
        loss = self.learn.loss_grad.detach()
        self.total = loss if self.total is None else self.total+loss

def test_what_the_ranks_exchange_is_on_the_cpu(tmp_path, monkeypatch):
    "Pickled, a card's tensor would come back on that same card in every process"
    sent = []
    def gather(res, o):
        sent.append(o)
        res[:] = [o]*len(res)
    cbs = lambda: [Sums(), GradientAccumulation(12), Checkpoint(tmp_path, 5)]
    with monkeypatch.context() as m:
        m.setattr('fastai_embdrop.run.checkpoint.num_distrib', lambda: 2)
        m.setattr(torch.distributed, 'all_gather_object', gather)
        fit(cbs=cbs)
    leaves = [t for t in tree_leaves(sent) if isinstance(t, torch.Tensor)]
    assert len(leaves) > 20 and not [t for t in leaves if isinstance(t, SimTensor)]

def test_state_comes_back_on_the_device_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(cbs=lambda: [Sums(), GradientAccumulation(12), Checkpoint(tmp_path, 5), Stop(6)])
    state,sums = last_checkpoint(tmp_path),Sums()
    fit(cbs=lambda: [sums, GradientAccumulation(12), Checkpoint(tmp_path, 5, state), Stop(0)])
    whole = Sums()
    fit(cbs=lambda: [whole, GradientAccumulation(12), Checkpoint(tmp_path/'whole', 5), Stop(0)])
    assert sums.total.device==whole.total.device==card and torch.equal(on_host(sums.total), on_host(whole.total))

def test_load_run(tmp_path):
    (tmp_path/'t.txt').write_text(' '.join(random_tokens(1500)))
    s = Settings(data=str(tmp_path/'t.txt'), out=str(tmp_path/'run'), tok='split', device='cpu', emb_sz=12, n_hid=16,
                 n_layers=1, bs=4, seq_len=8, epochs=1, min_freq=1)
    on_cpu = train_lm(s)
    with simulated() as seen:
        learn = load_run(s.out, str(card))
        assert {p.device for p in learn.model.parameters()}=={card}
        assert seen.total() <= 2*tensors(on_cpu.model.state_dict())+9 and sum(lines('read').values())<=1
        words = torch.randint(0, 20, (2,7), device=card)
        learn.model.eval()
        seen.clear()
        out = learn.model(words)[0]
        assert not seen
    on_cpu.model.eval().reset()
    assert_close(on_host(out), on_cpu.model(on_host(words))[0])
