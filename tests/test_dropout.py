"""Pins what `EmbeddingDropout` is: five properties that no impostor has, `nn.Embedding`'s options, persistence.

An impostor is a module that looks right. Here, and by the five lesson cells of `nbs/00_dropout.ipynb`, it is rejected
by exactly the properties that it lacks. Each property is the only one that rejects some impostor.
"""
import copy, json, pickle, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from fastai_embdrop.dropout import EmbeddingDropout

V,D = 4000,3
words = torch.arange(V).repeat(3,1)

class Reference(nn.Module):
    "Embedding dropout from its definition; impostors change one line"
    def __init__(self, emb, embed_p):
        super().__init__()
        self.emb,self.embed_p = emb,embed_p
    def kept(self, words): return (torch.rand(len(self.emb.weight)) >= self.embed_p)[words]
    def factor(self): return 1/(1-self.embed_p)
    def is_dropping(self): return self.training
    def forward(self, words):
        res = self.emb(words)
        return res*self.kept(words)[...,None]*self.factor() if self.is_dropping() else res

class PerPosition(Reference):
    def kept(self, words): return torch.rand(words.shape) >= self.embed_p
class HalfTheRate(Reference):
    def kept(self, words): return (torch.rand(len(self.emb.weight)) >= self.embed_p/2)[words]
class NoRescale(Reference):
    def factor(self): return 1.
class AlsoInEvaluation(Reference):
    def is_dropping(self): return True
class SameWordsEachTime(Reference):
    def kept(self, words):
        draws = torch.rand(len(self.emb.weight), generator=torch.Generator().manual_seed(0))
        return (draws >= self.embed_p)[words]
class NeverDrops(Reference):
    def forward(self, words): return self.emb(words)
class ZeroesAll(Reference):
    def kept(self, words): return torch.zeros(words.shape, dtype=torch.bool)

rejected_by = {Reference:set(), PerPosition:{'shared'}, HalfTheRate:{'rate'}, NoRescale:{'scale'},
               AlsoInEvaluation:{'identity'}, SameWordsEachTime:{'changing'}, NeverDrops:{'rate','scale','changing'},
               ZeroesAll:{'rate','identity','changing'}}

def lacks(cls, p):
    "Names of the properties that `cls` lacks, over 4,000 words that occur three times each"
    torch.manual_seed(0)
    m = cls(nn.Embedding(V, D), p)
    w,out,again = m.emb.weight.detach(),m(words).detach(),m(words).detach()
    in_evaluation = m.eval()(words)
    m.train().embed_p = 0
    at_zero,gone = m(words),(out[0]==0).all(-1)
    has = dict(shared=torch.equal(out, out[:1].expand_as(out)),
               rate=abs(gone.float().mean()-p) <= 5*(p*(1-p)/V)**.5,
               scale=torch.allclose(out[0][~gone], w[~gone]/(1-p)),
               identity=torch.equal(in_evaluation, w[words]) and torch.equal(at_zero, w[words]),
               changing=not torch.equal(out, again))
    return {name for name,ok in has.items() if not ok}

@pytest.mark.parametrize('p', [.02, .1, .5, .9])
def test_is_embedding_dropout(p): assert lacks(EmbeddingDropout, p)==set()


@pytest.mark.parametrize('cls', rejected_by)
def test_impostor_rejected(cls): assert lacks(cls, .5)==rejected_by[cls]

# from the comment in a cell to the property
lessons = {'# 1: ':'shared', '# 2: ':'rate', '# 3: ':'scale', '# 4: ':'identity', '# 5: ':'changing'}

def cells():
    nb = json.loads((Path(__file__).parent.parent/'nbs/00_dropout.ipynb').read_text())
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']

def failed_lessons(cls):
    "Names of the lessons that fail where `cls` is in the place of `EmbeddingDropout`"
    ns,failed = {},set()
    for src in cells():
        name = next((name for comment,name in lessons.items() if comment in src), None)
        if name=='shared': ns['EmbeddingDropout'] = cls
        try: exec(src, ns)
        except AssertionError:
            if name is None: raise
            failed.add(name)
        if name=='changing': return failed
    raise LookupError('the page has no fifth lesson')

def test_lessons_hold():
    ns = {}
    for src in cells(): exec(src, ns)

@pytest.mark.parametrize('cls', rejected_by)
def test_impostor_fails_lessons(cls): assert failed_lessons(cls)==rejected_by[cls]

def test_each_property_alone_rejects_an_impostor():
    alone = [names for names in rejected_by.values() if len(names)==1]
    assert set().union(*alone)=={*lessons.values()}

def small(p=.5, **kw):
    torch.manual_seed(0)
    return EmbeddingDropout(nn.Embedding(10, D, **kw), p)
some = torch.tensor([[1,2,3,1],[2,2,9,0]])

def test_imports_torch_alone():
    code = """import sys, fastai_embdrop.dropout
print([m for m in ('fastai','fastcore','pandas','matplotlib') if m in sys.modules])"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert r.stdout.strip()=='[]'

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

no_embeddings = [(10, 'emb=10: use an nn.Embedding'), (nn.EmbeddingBag(10, D), 'it sums the words'),
                 (nn.LayerNorm(D), r'emb=LayerNorm.* with a weight of shape'), (torch.zeros(10, D), 'an nn.Embedding'),
                 (nn.Conv1d(D, 10, 3), r'emb=Conv1d.* with a weight of shape')]
@pytest.mark.parametrize('emb,msg', no_embeddings)
def test_what_is_no_embedding_is_refused(emb, msg):
    with pytest.raises(TypeError, match=msg): EmbeddingDropout(emb, .5)

class Tripled(nn.Module):
    def forward(self, w): return 3*w

class Lookup(nn.Module):
    "Has the weight and the forward of `nn.Embedding`, and nothing else of it"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, D))
    def forward(self, words): return self.weight[words]

def parametrized():
    emb = nn.Embedding.from_pretrained(torch.ones(10, D), freeze=False)
    torch.nn.utils.parametrize.register_parametrization(emb, 'weight', Tripled())
    return emb

@pytest.mark.parametrize('make', [parametrized, Lookup])
def test_what_looks_words_up_like_an_embedding_will_do(make):
    m = EmbeddingDropout(make(), .5)
    out,w = m(torch.arange(10)),m.emb.weight.detach()
    assert {*out.flatten().tolist()}=={0., 2*w[0,0].item()} and torch.equal(m.eval()(torch.arange(10)), w)

@pytest.mark.parametrize('shape', [(0,), (0,5), (3,0)])
def test_empty_batch(shape): assert small()(torch.zeros(shape, dtype=torch.long)).shape==(*shape, D)

def test_scale_of_each_word_of_two():
    m,scale = EmbeddingDropout(nn.Embedding(2, D), 0),torch.tensor([[1.],[2.]])
    assert_close(m(torch.tensor([1,1,0]), scale=scale), (m.emb.weight*scale)[[1,1,0]])

@pytest.mark.parametrize('idx', [torch.int32, torch.int64])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(idx, dtype):
    m = EmbeddingDropout(nn.Embedding(V, D, dtype=dtype), .3)
    out = m(torch.arange(V, dtype=idx))
    gone = (out==0).all(-1)
    assert out.dtype==dtype and abs(gone.float().mean()-.3) <= 5*(.21/V)**.5
    assert_close(out[~gone], m.emb.weight[~gone]/.7)

copies = dict(deepcopy=copy.deepcopy, pickle=lambda m: pickle.loads(pickle.dumps(m)), half=lambda m: m.half(),
              to=lambda m: m.to('cpu', torch.float64))
@pytest.mark.parametrize('f', copies.values(), ids=copies)
def test_embed_p_kept(f): assert f(small(.02)).embed_p==.02

def test_torch_save(tmp_path):
    torch.save(small(.02), tmp_path/'m.pt')
    m = torch.load(tmp_path/'m.pt', weights_only=False)
    assert m.embed_p==.02 and torch.equal(m.eval()(some), small().eval()(some))

def test_state_dict_is_fastais(): assert list(small().state_dict())==['emb.weight']

choices = [dict(per='batch'), dict(per='sequence'), dict(per='token'), dict(per='batch', hold=True),
           dict(per='sequence', hold=True)]

@pytest.mark.parametrize('kw', choices, ids=str)
@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing_changes_nothing(kw, reentrant):
    "The dropout behind finds the same random state when the call is repeated"
    grads = []
    for use in (False,True):
        torch.manual_seed(0)
        m = nn.Sequential(EmbeddingDropout(nn.Embedding(50, 8), .5, **kw), nn.Dropout(.5), nn.Linear(8, 1))
        x,scale = torch.randint(0, 50, (4,6)),torch.ones((), requires_grad=True) # for reentrant
        f = lambda x, scale: m(x)*scale
        for _ in range(2): # the second call has a mask to hold
            y = checkpoint(f, x, scale, use_reentrant=reentrant) if use else f(x, scale)
            y.pow(2).sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for a,b in zip(*grads): assert torch.equal(a, b)

@pytest.mark.parametrize('kw', choices, ids=str)
@pytest.mark.parametrize('how', ['assign', 'assign, then move', 'to_empty', 'weight replaced'])
def test_made_on_meta_it_works(kw, how):
    source,m = nn.Embedding(V, D),EmbeddingDropout(nn.Embedding(V, D, device='meta'), .3, **kw)
    if how.startswith('assign'): m.load_state_dict({'emb.weight':source.weight.detach()}, assign=True)
    if how=='assign, then move': m.to('cpu')
    if how=='to_empty': m.to_empty(device='cpu').load_state_dict({'emb.weight':source.weight.detach()})
    if how=='weight replaced': m.emb.weight = source.weight
    out = m(torch.arange(V))
    gone = (out==0).all(-1)
    assert abs(gone.float().mean()-.3) <= 5*(.21/V)**.5
    assert_close(out[~gone], source.weight[~gone]/.7)
    m.half()
    assert m(torch.arange(V)).dtype==torch.half

def test_no_tensor_of_its_own_is_broadcast_or_saved():
    m = small()
    assert [n for n,_ in m.named_buffers()]==[] and [n for n,_ in m.named_parameters()]==['emb.weight']

def kept_by(register):
    "What a hook got to see and kept, and the result of the module"
    m,kept = small(),[]
    handle = register(m.emb, lambda mod, args, res: kept.append(res))
    try: return m,m(some),kept[0]
    finally: handle.remove()

def forward_hook(emb, f): return emb.register_forward_hook(f)
def global_forward_hook(emb, f):
    g = lambda mod, args, res: f(mod, args, res) if mod is emb else None
    return nn.modules.module.register_module_forward_hook(g)

@pytest.mark.parametrize('register', [forward_hook, global_forward_hook])
def test_what_a_hook_has_kept_is_not_changed(register):
    m,out,kept = kept_by(register)
    assert torch.equal(kept, m.emb(some)) and not torch.equal(out, kept)

class Cached(nn.Embedding):
    "Returns the same tensor each time"
    def forward(self, words): return vars(self).setdefault('cache', super().forward(words))

def test_what_another_forward_has_kept_is_not_changed():
    for m in (EmbeddingDropout(Cached(10, D), .5), small()):
        if type(m.emb) is nn.Embedding:
            cache = m.emb(some)
            m.emb.forward = lambda words: cache
        before = m.emb(some).detach().clone()
        assert (m(some)==0).all(-1).any() and torch.equal(m.emb(some), before)

@pytest.mark.filterwarnings('ignore:Full backward hook is firing:UserWarning') # ids have no gradient
@pytest.mark.parametrize('register', ['register_full_backward_hook', 'register_full_backward_pre_hook'])
def test_backward_hooks_see_the_gradient(register):
    m,seen = small(),[]
    getattr(m.emb, register)(lambda mod, *grads: seen.append(grads[-1][0]))
    out = m(some)
    out.sum().backward()
    assert_close(seen[0], torch.where(out==0, 0., 2.))

def test_one_batch_many_masks_by_vmap():
    m = EmbeddingDropout(nn.Embedding(10, D), .5, per='token')
    outs = torch.func.vmap(lambda _: m(some), randomness='different')(torch.zeros(100))
    assert .3 < (outs==0).all(-1).float().mean() < .7 and not torch.equal(outs[0], outs[1])
