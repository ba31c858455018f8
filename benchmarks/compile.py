"""Graphs and time under `torch.compile` while embed_p moves: ours against fastai's class, 30 values of p."""
import time
import torch
from torch import nn
from fastai.text.models.awdlstm import EmbeddingDropout as Fastai
from fastai_embdrop.dropout import EmbeddingDropout
from benchmarks.common import arguments, report, sync

def anneal(cls, V, steps, device):
    "One row per step: how many graphs there are by then, and the step's time"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    m,words = cls(nn.Embedding(V, 400), .5).to(device),torch.randint(0, V, (64,72), device=device)
    f,rows = torch.compile(m),[]
    for i in range(steps):
        m.embed_p = .5*(1-i/steps)
        sync(device)
        t = time.perf_counter()
        f(words).sum().backward()
        sync(device)
        ms = 1000*(time.perf_counter()-t)
        graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
        rows.append(dict(step=i, p=round(m.embed_p, 4), graphs=graphs, ms=f'{ms:.1f}'))
        m.emb.weight.grad = None
    return rows

def main():
    args = arguments(__doc__, vocab_sz=10_000, steps=30)
    rows = []
    for name,cls in dict(ours=EmbeddingDropout, fastai=Fastai).items():
        steps = anneal(cls, args.vocab_sz, args.steps, args.device)
        rows += [dict(cls=name, V=args.vocab_sz, **step) for step in steps]
    report('compile', rows, args.device)

if __name__=='__main__': main()
