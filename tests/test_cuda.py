"""Pins what must hold on an NVIDIA card: the draw, a host that never waits, CUDA graphs, mixed precision, the command.

Every test here is marked `cuda` and skipped, with that reason, where there is no card. `python -m benchmarks.gpu` has
the functions that some of them call, and checks more.
"""
import sys
from pathlib import Path
import pandas as pd, pytest, torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.callback.core import Callback
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner, awd_lstm_lm
from fastai_embdrop.dropout import EmbeddingDropout
from fastai_embdrop.run.train import main
from conftest import SMALL, compiling, graphs, random_tokens, small_dls

sys.path.insert(0, str(Path(__file__).parent.parent)) # `benchmarks` is no part of the installed package
from benchmarks import gpu_checks
from benchmarks.gpu import missing

card = torch.device('cuda')
no_fused_loss = missing('fused loss', card)
needs_fused_loss = pytest.mark.skipif(no_fused_loss is not None, reason=no_fused_loss or '')
# a learner warns; a colon would end the message here, so a dot matches it
before_2_13 = pytest.mark.filterwarnings('ignore:The logits are kept in training. torch')
pytestmark = [pytest.mark.cuda, before_2_13]
setting = gpu_checks.Setting(card, small=False)

ways = [dict(), dict(hold=True), dict(per='sequence'), dict(per='token')]

def near(rate, p, n): assert abs(rate-p) <= 5*(p*(1-p)/n)**.5

@pytest.mark.parametrize('p', [.02, .5, .9])
def test_is_embedding_dropout(p):
    m = EmbeddingDropout(nn.Embedding(4000, 3), p).cuda()
    words = torch.arange(4000, device=card).repeat(3,1)
    out = m(words).detach()
    kept = out.abs().sum(-1)>0
    assert torch.equal(out, out[:1].expand_as(out)) and not torch.equal(out, m(words))
    near((~kept[0]).float().mean().item(), p, 4000)
    assert_close(out[0][kept[0]], m.emb.weight.detach()[kept[0]]/(1-p))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kw', ways, ids=str)
def test_half_precision(kw, dtype):
    m = EmbeddingDropout(nn.Embedding(4000, 3), .3, **kw).cuda().to(dtype)
    words = torch.arange(4000, device=card)[None]
    out = m(words)
    kept = (out!=0).any(-1)
    near(1-kept.float().mean().item(), .3, 4000)
    assert_close(out[kept], m.emb(words)[kept]/.7, rtol=1e-2, atol=1e-4)
    lm = awd_lstm_lm(50, {**SMALL, **kw}).cuda().to(dtype)
    res = lm(words[:,:40])[0]
    res.sum().backward()
    assert res.dtype==dtype and all(p.grad.isfinite().all() for p in lm.parameters())

@pytest.mark.parametrize('V', [1000, 2**19+1])
@pytest.mark.parametrize('sparse', [False, True], ids=['dense','sparse'])
@pytest.mark.parametrize('kw', ways, ids=str)
def test_no_wait_of_the_host(kw, sparse, V): gpu_checks.no_wait_in_the_module(setting, dict(kw, V=V), sparse)

def test_a_wait_is_an_error_there():
    total = torch.ones(3, device=card).sum()
    with gpu_checks.sync_debug('error'), pytest.raises(RuntimeError, match='synchronizing'): total.item()

@compiling
@pytest.mark.parametrize('hold', [False, True])
def test_cuda_graphs_read_the_new_p(hold, dynamo):
    m,words = EmbeddingDropout(nn.Embedding(5000, 2), .5, hold=hold).cuda(),torch.arange(5000, device=card).view(50,100)
    f = torch.compile(m, fullgraph=True, mode='reduce-overhead')
    for p in (.5, .5, .5, .9, .1, .02, 0, 1)*2:
        m.embed_p,m.emb.weight.grad = p,None
        m.reset()
        out = f(words)
        out.sum().backward()
        dropped = (out.detach()==0).all(-1)
        near(dropped.float().mean().item(), p, 5000)
        scale = 1/(1-p) if p<1 else 0.
        assert_close(m.emb.weight.grad, (~dropped).view(-1,1).expand(-1, 2)*scale)
    assert graphs() <= 1+hold

@needs_fused_loss
@pytest.mark.parametrize('precision', gpu_checks.numbers)
def test_loss_without_logits(precision): gpu_checks.loss(setting, n=2048, V=20_000, **gpu_checks.numbers[precision])

@needs_fused_loss
@pytest.mark.parametrize('precision', gpu_checks.precisions)
def test_learner_with_and_without_logits(precision): gpu_checks.with_and_without_logits(setting, precision)

class Products(TorchDispatchMode):
    "The number formats of the matrices that are multiplied, whatever the names of a card's kernels"
    def __init__(self):
        super().__init__()
        self.seen = set()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split('::')[1].split('.')[0]
        if name in ('mm','addmm','addmm_') or 'linear_cross_entropy' in name:
            self.seen |= {t.dtype for t in args if isinstance(t, torch.Tensor) and t.ndim==2}
        return func(*args, **(kwargs or {}))

class InTraining(Callback):
    "`products` sees the training batches"
    def __init__(self, products): self.products = products
    def before_train(self): self.products.__enter__()
    def after_train(self): self.products.__exit__(None, None, None)

@pytest.mark.parametrize('keep_logits', [False, True])
@pytest.mark.parametrize('precision, dtype', [('fp32',torch.float32), ('fp16',torch.float16), ('bf16',torch.bfloat16)])
def test_learner_anneals(precision, dtype, keep_logits):
    learn = awd_lstm_learner(small_dls(device=card), SMALL, keep_logits=keep_logits)
    if precision!='fp32': getattr(learn, f'to_{precision}')()
    products = Products()
    learn.fit_one_cycle(1, 1e-2, cbs=[AnnealEmbedP(.5, .05), InTraining(products)])
    hps = learn.recorder.hps
    assert hps['embed_p'][0]==.5 and hps['embed_p'][-1]<.1 and len(hps['embed_p'])==len(hps['lr'])
    assert learn.recorder.losses[-1].isfinite() and dtype in products.seen

def test_command(tmp_path):
    (tmp_path/'t.txt').write_text(' '.join(random_tokens(4000)))
    settings = dict(data=tmp_path/'t.txt', out=tmp_path/'run', tok='split', device='cuda', precision='fp16', emb_sz=12,
                    n_hid=16, n_layers=1, bs=8, seq_len=16, epochs=3, min_freq=1)
    assert not main([str(o) for k,v in settings.items() for o in (f'--{k}', v)])
    losses = pd.read_csv(tmp_path/'run'/'history.csv').valid_loss
    assert len(losses)==3 and losses.iloc[-1]<losses.iloc[0]
