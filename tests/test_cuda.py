"""Pins what must hold on an NVIDIA card: the module, annealing in a Learner, half precision, no host synchronization, the command.

Every test here is marked `cuda` and skipped, with that reason, where there is no card.
"""
import pandas as pd, pytest, torch
from torch import nn
from torch.testing import assert_close
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner, awd_lstm_lm
from fastai_embdrop.dropout import EmbeddingDropout
from fastai_embdrop.run.train import main
from conftest import SMALL, compiling, graphs, random_tokens, small_dls

pytestmark = pytest.mark.cuda

@pytest.mark.parametrize('p', [.02, .5, .9])
def test_is_embedding_dropout(p):
    m = EmbeddingDropout(nn.Embedding(4000, 3), p).cuda()
    words = torch.arange(4000, device='cuda').repeat(3,1)
    out = m(words).detach()
    kept = out.abs().sum(-1)>0
    assert torch.equal(out, out[:1].expand_as(out))
    assert abs((~kept[0]).float().mean().item()-p) <= 5*(p*(1-p)/4000)**.5
    assert_close(out[0][kept[0]], m.emb.weight.detach()[kept[0]]/(1-p))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    m = awd_lstm_lm(50, SMALL).cuda().to(dtype)
    out = m(torch.randint(0, 50, (2,5), device='cuda'))[0]
    out.sum().backward()
    assert out.dtype==dtype and out.isfinite().all()

def test_no_host_synchronization():
    m = EmbeddingDropout(nn.Embedding(1000, 8), .1).cuda()
    words = torch.randint(0, 1000, (4,9), device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        for i in range(5):
            m.embed_p = .1*i
            m(words).sum().backward()
    finally: torch.cuda.set_sync_debug_mode('default')

@compiling
def test_cuda_graphs_read_the_new_p(dynamo):
    m,words = EmbeddingDropout(nn.Embedding(5000, 2), .5).cuda(),torch.arange(5000, device='cuda').view(50,100)
    f = torch.compile(m, fullgraph=True, mode='reduce-overhead')
    for p in (.5, .5, .5, .9, .1, .02, 0, 1):
        m.embed_p = p
        rate = (f(words)==0).all(-1).float().mean().item()
        assert abs(rate-p) <= 5*(p*(1-p)/5000)**.5
    assert graphs()==1

@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16'])
def test_learner_anneals(precision):
    learn = awd_lstm_learner(small_dls(device='cuda'), SMALL)
    if precision!='fp32': getattr(learn, f'to_{precision}')()
    learn.fit_one_cycle(1, 1e-2, cbs=AnnealEmbedP(.5, .05))
    hps = learn.recorder.hps
    assert hps['embed_p'][0]==.5 and len(hps['embed_p'])==len(hps['lr'])
    assert learn.recorder.losses[-1].isfinite()

def test_command(tmp_path):
    (tmp_path/'t.txt').write_text(' '.join(random_tokens(4000)))
    main(['--data', str(tmp_path/'t.txt'), '--out', str(tmp_path/'run'), '--tok', 'split', '--device', 'cuda', '--precision', 'fp16',
          '--emb_sz', '12', '--n_hid', '16', '--n_layers', '1', '--bs', '8', '--seq_len', '16', '--epochs', '1', '--min_freq', '1'])
    assert len(pd.read_csv(tmp_path/'run'/'history.csv'))==1
