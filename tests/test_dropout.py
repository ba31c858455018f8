"""Pins what `EmbeddingDropout` is, by itself: four properties that no impostor has, `nn.Embedding`'s options, persistence.

The impostors (drops per position; never drops; zeroes everything; forgets 1/(1-p)) must be rejected here and by the
lesson cells of `nbs/00_dropout.ipynb`.
"""
import copy, json, pickle, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai_embdrop.dropout import EmbeddingDropout

V,D = 4000,3
words = torch.arange(V).repeat(3,1)

def check(cls, p):
    "The four properties, over 4,000 words that stand three times each"
    torch.manual_seed(0)
    m = cls(nn.Embedding(V, D), p)
    w,out = m.emb.weight.detach(),m(words).detach()
    kept = out.abs().sum(-1)>0
    assert torch.equal(out, out[:1].expand_as(out)), 'one fate per word'
    assert abs((~kept[0]).float().mean()-p) <= 5*(p*(1-p)/V)**.5, 'rate'
    assert_close(out[0][kept[0]], w[kept[0]]/(1-p)), 'scale'
    assert torch.equal(m.eval()(words), m.emb(words)), 'identity in evaluation'

class PerPosition(EmbeddingDropout):
    def _fate(self, words, w): return self.dropout_mask(w.detach(), (*words.shape,1), self.embed_p)
class NeverDrops(EmbeddingDropout):
    def _fate(self, words, w): return torch.ones(*words.shape,1)
class ZeroesAll(EmbeddingDropout):
    def _fate(self, words, w): return torch.zeros(*words.shape,1)
class NoRescale(EmbeddingDropout):
    def _fate(self, words, w):
        fate = super()._fate(words, w)
        return fate if fate is None else (fate>0).float()
impostors = [PerPosition, NeverDrops, ZeroesAll, NoRescale]

@pytest.mark.parametrize('p', [.02, .1, .5, .9])
def test_is_embedding_dropout(p): check(EmbeddingDropout, p)

@pytest.mark.parametrize('cls', impostors)
def test_impostor_rejected(cls):
    with pytest.raises(AssertionError): check(cls, .5)

def run_lessons(cls=None):
    "Run the code cells of the notebook; `cls`, if any, takes the place of `EmbeddingDropout` once that is defined"
    nb,ns = json.loads((Path(__file__).parent.parent/'nbs/00_dropout.ipynb').read_text()),{}
    for src in (''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code'):
        exec(src, ns)
        if 'class EmbeddingDropout' in src and cls: ns['EmbeddingDropout'] = cls

def test_lessons_hold(): run_lessons()

@pytest.mark.parametrize('cls', impostors)
def test_impostor_fails_lessons(cls):
    with pytest.raises(AssertionError): run_lessons(cls)

def small(p=.5, **kw):
    torch.manual_seed(0)
    return EmbeddingDropout(nn.Embedding(10, D, **kw), p)
some = torch.tensor([[1,2,3,1],[2,2,9,0]])

def test_imports_torch_alone():
    code = "import sys, fastai_embdrop.dropout; print([m for m in ('fastai','fastcore','pandas','matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'

def test_sparse_gradients():
    m = small(sparse=True)
    m(some).sum().backward()
    assert m.emb.weight.grad.is_sparse

def test_scale_grad_by_freq():
    m = small(1e-9, scale_grad_by_freq=True)
    m(some).sum().backward()
    assert_close(m.emb.weight.grad[2], torch.ones(D)) # three occurrences, each a third

def test_padding_row_gets_no_gradient():
    m = small(1e-9, padding_idx=2)
    m(some).sum().backward()
    assert m.emb.weight.grad[2].eq(0).all() and m.emb.weight.grad[1].ne(0).all()

@pytest.mark.parametrize('bad', [torch.tensor([10]), torch.tensor([-1]), torch.tensor([[1,10]])])
@pytest.mark.parametrize('max_norm', [None, .1])
def test_bad_index_changes_nothing(bad, max_norm):
    m,rng = small(max_norm=max_norm),torch.get_rng_state()
    before = m.emb.weight.detach().clone()
    with pytest.raises((IndexError,RuntimeError)): m(bad)
    assert torch.equal(m.emb.weight, before) and torch.equal(torch.get_rng_state(), rng)

def test_float_words_are_torchs_error():
    with pytest.raises(RuntimeError): small()(torch.tensor([1.]))

@pytest.mark.parametrize('shape', [(0,), (0,5), (3,0)])
def test_empty_batch(shape): assert small()(torch.zeros(shape, dtype=torch.long)).shape==(*shape, D)

def test_scale_of_each_word_of_two():
    m,scale = EmbeddingDropout(nn.Embedding(2, D), 0),torch.tensor([[1.],[2.]])
    assert_close(m(torch.tensor([1,1,0]), scale=scale), (m.emb.weight*scale)[[1,1,0]])

@pytest.mark.parametrize('idx', [torch.int32, torch.int64])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(idx, dtype):
    out = small(dtype=dtype)(some.to(idx))
    assert out.dtype==dtype and out.isfinite().all()

copies = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)), half=lambda m: m.half(),
              to=lambda m: m.to('cpu', torch.float64))
@pytest.mark.parametrize('f', copies.values(), ids=copies)
def test_embed_p_kept(f): assert f(small(.02)).embed_p==.02

def test_torch_save(tmp_path):
    torch.save(small(.02), tmp_path/'m.pt')
    m = torch.load(tmp_path/'m.pt', weights_only=False)
    assert m.embed_p==.02 and torch.equal(m.eval()(some), small().eval()(some))

def test_state_dict_is_fastais(): assert list(small().state_dict())==['emb.weight']
