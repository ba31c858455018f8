"""Pins `add_embedding_dropout`: it adds a child and two hooks to an embedding and changes nothing else.

On random models: state-dict keys, parameters, ties, optimizer state, hooks, options, copies, pickles, exports, and the
way back. One training run for each family of models.
"""
import copy, pickle, re, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.testing import assert_close
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.layers import Embedding
from fastai.learner import load_learner
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import language_model_learner
from fastai.text.models import awdlstm as fastai_awdlstm
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.dropout import EmbeddingDropout, RowDropout
from fastai_embdrop.embeddings import add_embedding_dropout, remove_embedding_dropout
from conftest import SMALL, compiling, graphs

class Net(nn.Module):
    "Embeddings with the given options, the first tied to a linear layer, some of them twice in the tree"
    def __init__(self, specs, share):
        super().__init__()
        embs = [Embedding(v, 4) if of_fastai else nn.Embedding(v, 4, **kw) for v,of_fastai,kw in specs]
        self.embs = nn.ModuleList(embs)
        self.out = nn.Linear(4, self.embs[0].num_embeddings, bias=False)
        self.out.weight = self.embs[0].weight
        if share: self.again = self.embs[-1]
    def forward(self, x): return self.out(sum(e(x%e.num_embeddings) for e in self.embs))

optional = dict(padding_idx=st.integers(0, 2), max_norm=st.floats(.5, 2), scale_grad_by_freq=st.booleans())
specs = st.tuples(st.integers(3, 30), st.booleans(), st.fixed_dictionaries({}, optional=optional))
nets = st.builds(Net, st.lists(specs, min_size=1, max_size=4), st.booleans())

def facts(m):
    options = [(o.padding_idx, o.max_norm, o.scale_grad_by_freq, o.sparse, tuple(o.weight.shape)) for o in m.embs]
    tied,types = m.out.weight is m.embs[0].weight,[type(o) for o in m.embs]
    return list(m.state_dict()),[id(p) for p in m.parameters()],list(m.named_buffers()),tied,types,options

def attributes(emb):
    "The attributes of an embedding, in their order, with copies of the dicts that hold hooks and children"
    return [(k, dict(v) if isinstance(v, dict) else v) for k,v in vars(emb).items()]

def all_attributes(m): return [attributes(o) for o in m.embs]

@given(nets, st.floats(0, 1), st.sampled_from(['batch','sequence','token']))
def test_nothing_but_hooks_and_a_child_is_added(m, p, per):
    before,attrs = facts(m),all_attributes(m)
    changed = add_embedding_dropout(m, p, per)
    assert [*changed.values()]==[o.row_dropout for o in m.embs]
    assert all(o.embed_p==p and o.per==per for o in changed.values())
    assert facts(m)==before
    m(torch.randint(0, 30, (2,5))).sum().backward()
    assert sorted(remove_embedding_dropout(m))==sorted(changed)
    assert facts(m)==before and all_attributes(m)==attrs

@given(nets, st.floats(0, 1))
def test_state_dicts_load_both_ways(m, p):
    plain = copy.deepcopy(m)
    add_embedding_dropout(m, p)
    m.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(m.state_dict(), strict=True)
    x = torch.randint(0, 30, (2,5))
    assert torch.equal(m.eval()(x), plain.eval()(x))

@given(nets, st.floats(.01, 1))
def test_copies_and_pickles_drop(m, p):
    add_embedding_dropout(m, p)
    for m2 in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert [type(o) for o in m2.embs]==[type(o) for o in m.embs] and all(o.row_dropout.embed_p==p for o in m2.embs)
        assert list(m2.state_dict())==list(m.state_dict()) and m2.out.weight is m2.embs[0].weight
        first = m2.embs[0]
        first.row_dropout.embed_p = 1
        assert not first(torch.zeros(2, dtype=torch.long)).any()
        remove_embedding_dropout(m2)
        assert torch.equal(first(torch.zeros(2, dtype=torch.long)), first.weight[[0,0]])
        plain = {k:v for k,v in vars(nn.Embedding(1, 4)).items() if 'hooks' in k or k=='_modules'}
        for o in m2.embs: assert {k:vars(o)[k] for k in plain}==plain

def net(): return Net([(20, False, {}), (10, True, {})], False)
words = torch.arange(20).repeat(3,1)

def test_rows_are_dropped_like_embedding_dropout_does():
    m = net()
    emb = EmbeddingDropout(m.embs[0], .4)
    torch.manual_seed(0)
    want = emb(words)
    add_embedding_dropout(m, .4)
    torch.manual_seed(0)
    assert torch.equal(m.embs[0](words), want)
    assert torch.equal(m.eval().embs[0](words), m.embs[0].weight[words])

def test_twice_is_not_double():
    m = net()
    add_embedding_dropout(m, .4)
    add_embedding_dropout(m, .2)
    w,out = m.embs[0].weight.detach(),m.embs[0](words)[0].detach()
    kept = out.abs().sum(-1)>0
    assert_close(out[kept], w[kept]/.8) # not /.8/.6
    assert len(m.embs[0]._forward_hooks)==1 and m.embs[0].row_dropout.embed_p==.2
    remove_embedding_dropout(m)
    assert type(m.embs[0]) is nn.Embedding and type(m.embs[1]) is Embedding and remove_embedding_dropout(m)==[]

def test_inside_an_embedding_dropout_is_left_alone():
    m = nn.Sequential(EmbeddingDropout(nn.Embedding(5, 2), .1), nn.Embedding(3, 2))
    assert list(add_embedding_dropout(m, .3))==['1'] and m[0].embed_p==.1

def test_hooks_optimizer_and_dtype_stay():
    m,seen = net().double(),[]
    m.embs[0].register_forward_hook(lambda *_: seen.append(1))
    opt = torch.optim.Adam(m.parameters())
    for add in (lambda: None, lambda: add_embedding_dropout(m, .5)):
        add()
        m(words).sum().backward()
        opt.step()
    assert seen==[1,1] and m.embs[0](words).dtype==torch.float64 and opt.state[m.embs[0].weight]['step']==2

@pytest.mark.parametrize('when', ['before', 'after'])
def test_hooks_see_the_dropped_rows(when):
    emb,seen = nn.Embedding(9, 2),[]
    def see(mod, args, res): seen.append(res.clone())
    if when=='before': emb.register_forward_hook(see)
    add_embedding_dropout(nn.Sequential(emb), 1)
    if when=='after': emb.register_forward_hook(see)
    emb(torch.arange(9))
    assert len(seen)==1 and not seen[0].any()

def test_a_hook_registered_in_another_process_replaces_none(tmp_path):
    "Torch numbers hooks from 0 in each process, so a model that was loaded must not share a number with a new hook"
    m = nn.Sequential(nn.Embedding(9, 2))
    add_embedding_dropout(m, 1)
    torch.save(m, tmp_path/'m.pt')
    code = f"""import torch
m = torch.load(r'{tmp_path/'m.pt'}', weights_only=False)
for _ in range(20): m[0].register_forward_hook(lambda *_: None)
assert not m(torch.arange(9)).any()"""
    subprocess.run([sys.executable, '-c', code], check=True)

def test_ids_by_keyword():
    emb = nn.Embedding(9, 2, max_norm=.1)
    add_embedding_dropout(nn.Sequential(emb), 1)
    assert not emb(input=torch.arange(9)).any()

def test_a_bad_id_changes_nothing():
    emb = nn.Embedding(9, 2, max_norm=.1)
    add_embedding_dropout(nn.Sequential(emb), .5)
    before,rng = emb.weight.detach().clone(),torch.get_rng_state()
    with pytest.raises(IndexError): emb(torch.tensor([1,9]))
    assert torch.equal(emb.weight, before) and torch.equal(torch.get_rng_state(), rng)

def test_embed_p_assigned_to_the_embedding_is_an_error():
    m = nn.Sequential(nn.Embedding(9, 2))
    add_embedding_dropout(m, .5)
    m[0].embed_p = .1
    with pytest.raises(AttributeError, match='row_dropout'): m(torch.arange(9))

def test_evaluation_is_kept():
    m = nn.Sequential(nn.Embedding(9, 2)).eval()
    add_embedding_dropout(m, 1)
    assert torch.equal(m(torch.arange(9)), m[0].weight) and not m.train()(torch.arange(9)).any()

def test_a_parametrization_added_later_stays():
    m = nn.Sequential(nn.Embedding(9, 2))
    add_embedding_dropout(m, .5)
    nn.utils.parametrizations.weight_norm(m[0], 'weight', dim=0)
    m(torch.arange(9)).sum().backward()
    assert remove_embedding_dropout(m)==['0']
    assert torch.equal(m(torch.arange(9)), m[0].weight) and nn.utils.parametrize.is_parametrized(m[0], 'weight')

@pytest.mark.parametrize('how', ['assign', 'to_empty'])
def test_a_model_made_on_meta_works(how):
    m,w = nn.Sequential(nn.Embedding(9, 2, device='meta')),torch.ones(9, 2)
    add_embedding_dropout(m, .5, per='token')
    if how=='to_empty': m.to_empty(device='cpu')
    m.load_state_dict({'0.weight':w}, assign=how=='assign')
    assert {*m(torch.zeros(100, dtype=torch.long)).flatten().tolist()}=={0., 2.}

@compiling
def test_one_graph_for_every_p(dynamo):
    m,ids = nn.Sequential(nn.Embedding(5000, 2)),torch.arange(5000)
    drop, = add_embedding_dropout(m, 0).values()
    f = torch.compile(m, fullgraph=True, backend='eager')
    for p in (0, .3, .7, 1):
        drop.embed_p = p
        assert abs((f(ids)==0).all(-1).float().mean()-p) <= 5*(p*(1-p)/5000)**.5
    assert graphs()==1

def test_sparse_gradients_stay():
    m = nn.Sequential(nn.Embedding(9, 2, sparse=True))
    add_embedding_dropout(m, .5)
    m(torch.tensor([1,2])).sum().backward()
    assert m[0].weight.grad.is_sparse

def test_torch_save(tmp_path):
    m = net()
    add_embedding_dropout(m, .3)
    torch.save(m, tmp_path/'m.pt')
    m2 = torch.load(tmp_path/'m.pt', weights_only=False)
    assert m2.embs[0].row_dropout.embed_p==.3 and torch.equal(m2.eval()(words), m.eval()(words))

names = [('embs.0', ['embs.0']), ('embs.*', ['embs.0','embs.1']), (re.compile('1$'), ['embs.1']),
         (lambda n: n.endswith('0'), ['embs.0']), (None, ['embs.0','embs.1'])]
@pytest.mark.parametrize('only,want', names)
def test_only(only, want): assert list(add_embedding_dropout(net(), .1, only=only))==want

def test_one_column_is_left_alone_unless_named():
    m = nn.ModuleDict(dict(u_weight=nn.Embedding(5,2), u_bias=nn.Embedding(5,1)))
    assert list(add_embedding_dropout(m, .1))==['u_weight']
    assert list(add_embedding_dropout(m, .1, only='u_*'))==['u_weight','u_bias']
    with pytest.raises(ValueError, match=re.escape("['0'] have one column each")):
        add_embedding_dropout(nn.Sequential(nn.Embedding(5,1)), .1)

def test_no_match_lists_what_there_is():
    names = re.escape("['embs.0', 'embs.1']")
    with pytest.raises(ValueError, match=names): add_embedding_dropout(net(), .1, only='emb')
    with pytest.raises(ValueError, match='no nn.Embedding'): add_embedding_dropout(nn.Linear(2,2), .1)

@pytest.mark.parametrize('kw', [dict(embed_p=1.5), dict(embed_p=.1, per='word')])
def test_bad_arguments_change_nothing(kw):
    m = net()
    with pytest.raises(ValueError): add_embedding_dropout(m, **kw)
    assert not [o for o in m.modules() if isinstance(o, RowDropout)]

@pytest.mark.parametrize('name', ['pos', 'pos_emb', 'position_embeddings', 'wpe', 'encoder.wpos'])
def test_position_embeddings_warn(name):
    m = nn.ModuleDict({name.split('.')[-1]:nn.Embedding(5,2), 'tok':nn.Embedding(5,2)})
    with pytest.warns(UserWarning, match='look like position'): add_embedding_dropout(m, .1)
    add_embedding_dropout(m, .1, only='tok')

def test_fastais_own_is_replaced(dls):
    config = {**fastai_awdlstm.awd_lstm_lm_config, **SMALL}
    learn = language_model_learner(dls, fastai_awdlstm.AWD_LSTM, config=config, pretrained=False)
    keys = list(learn.model.state_dict())
    assert list(add_embedding_dropout(learn.model, .3))==['0.encoder_dp']
    assert isinstance(learn.model[0].encoder_dp, EmbeddingDropout) and list(learn.model.state_dict())==keys
    learn.fit(1, 1e-2, cbs=AnnealEmbedP(.5, .05))
    assert learn.model[0].encoder_dp.embed_p < .06

def test_fastais_own_comes_back():
    theirs = fastai_awdlstm.EmbeddingDropout(nn.Embedding(9, 2), .02)
    m = nn.Sequential(theirs)
    add_embedding_dropout(m, .5)
    m[0].embed_p = .3
    m = pickle.loads(pickle.dumps(m.eval()))
    assert remove_embedding_dropout(m)==['0'] and remove_embedding_dropout(m)==[]
    assert type(m[0]) is type(theirs) and m[0].embed_p==.02 and not m[0].training
    assert list(m.state_dict())==['0.emb.weight'] and torch.equal(m[0].emb.weight, theirs.emb.weight)

# one training run with annealing for each family of models

@pytest.fixture
def sales():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(shop=rng.integers(0, 9, 400), item=rng.integers(0, 9, 400), price=rng.random(400)))
    return df.assign(sold=(df['shop']%3 + df['item']%2).astype('float32'))

# fastai's tables, under pandas 3
not_writable = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable:UserWarning')

def trains(learn, tmp_path, epochs=6):
    add_embedding_dropout(learn.model, .1)
    learn.fit_one_cycle(epochs, 2e-2, cbs=AnnealEmbedP(.3, 0))
    losses = [v[1] for v in learn.recorder.values]
    assert losses[-1] < .8*losses[0] and learn.recorder.hps['embed_p'][0]==.3
    learn.path = tmp_path
    learn.export('m.pkl')
    other = load_learner(tmp_path/'m.pkl')
    def changed(learn): return [m for m in learn.model.modules() if hasattr(m, 'row_dropout')]
    ours,theirs = changed(learn),changed(other)
    assert len(ours)==len(theirs)>0
    for a,b in zip(ours, theirs):
        assert torch.equal(a.weight, b.weight) and a.row_dropout.embed_p==b.row_dropout.embed_p

@not_writable
def test_tabular_learner(sales, tmp_path):
    columns = dict(cat_names=['shop','item'], cont_names=['price'], y_names='sold', procs=[Categorify, Normalize])
    dls = TabularDataLoaders.from_df(sales, **columns, bs=32, valid_idx=list(range(80)), device='cpu')
    trains(tabular_learner(dls, layers=[16]), tmp_path)

@not_writable
@pytest.mark.parametrize('use_nn', [False, True], ids=['EmbeddingDotBias','EmbeddingNN'])
def test_collab_learner(sales, tmp_path, use_nn):
    ratings = sales.rename(columns=dict(shop='user', sold='rating'))[['user','item','rating']]
    dls = CollabDataLoaders.from_df(ratings, bs=32, seed=0, device='cpu')
    trains(collab_learner(dls, n_factors=8, use_nn=use_nn, y_range=(-.5,3.5)), tmp_path)

class TinyTransformer(nn.Module):
    def __init__(self, V=30, D=16):
        super().__init__()
        self.tok,self.pos = nn.Embedding(V, D),nn.Embedding(12, D)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 32, dropout=0., batch_first=True), 1)
        self.out = nn.Linear(D, V)
    def forward(self, x): return self.out(self.enc(self.tok(x)+self.pos(torch.arange(x.shape[1]))))

def copy_task(m, forward, steps=120):
    "Teach `m` to repeat its input while its dropout falls; first and last loss"
    torch.manual_seed(0)
    opt,losses = torch.optim.Adam(m.parameters(), 1e-2),[]
    drops = [o for o in m.modules() if isinstance(o, RowDropout)]
    for i in range(steps):
        for o in drops: o.embed_p = .5*(1-i/steps)
        x = torch.randint(0, 30, (8,10))
        loss = nn.functional.cross_entropy(forward(m, x).flatten(0,1), x.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses[0],losses[-1]

def test_transformer_encoder():
    m = TinyTransformer()
    assert list(add_embedding_dropout(m, .5, only='tok'))==['tok']
    first,last = copy_task(m, lambda m,x: m(x))
    assert last < .5*first

@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning') # raised inside transformers
def test_hugging_face_causal_lm(tmp_path, monkeypatch):
    # transformers would import torchvision, which fails beside torch's CPU build
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    from transformers import GPT2Config, GPT2LMHeadModel
    sizes = dict(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config = GPT2Config(**sizes, attn_pdrop=0., resid_pdrop=0., embd_pdrop=0.)
    m = GPT2LMHeadModel(config)
    assert list(add_embedding_dropout(m, .5, only='*.wte'))==['transformer.wte']
    assert m.lm_head.weight is m.transformer.wte.weight
    first,last = copy_task(m, lambda m,x: m(x).logits)
    assert last < .6*first
    x = torch.tensor([[1,2,3]])
    out = m.eval().generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0)
    m.save_pretrained(tmp_path)
    m2 = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(m2.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=0), out)
    assert type(m2.transformer.wte) is nn.Embedding and m2.lm_head.weight is m2.transformer.wte.weight
