"Forward + backward of embedding dropout against fastai's class and plain `nn.Embedding`, over vocabulary sizes, time and extra memory; then the pieces of a step with sparse gradients."
import json, subprocess, sys
from statistics import median
import torch
from torch import nn
from fastai.text.models.awdlstm import EmbeddingDropout as Fastai
from fastai_embdrop.dropout import EmbeddingDropout, splitmix64
from benchmarks.common import Memory, arguments, interleave, report

# V, D, batch, sparse, with fastai's class?
sizes = [(10_000,400,(64,72),False,True), (60_000,400,(64,72),False,True), (268_000,1024,(8,128),False,True), (1_000_000,64,(64,72),False,True),
         (10_000_000,16,(64,72),False,True), (1_000_000,64,(64,72),True,False), (20_000_000,64,(64,72),True,False)]

def kinds(emb, fastai):
    return {'ours':EmbeddingDropout(emb, .1), **({'fastai':Fastai(emb, .1)} if fastai else {}), 'plain':emb}

def stepper(m, emb, words):
    "Forward and backward of `m`, from a gradient like one that arrives in training"
    grad = torch.randn(*words.shape, emb.embedding_dim, device=words.device)
    def step():
        emb.weight.grad = None
        m(words).backward(grad)
    return step

def table(V, D, sparse, device):
    emb = nn.Embedding(1, D, sparse=sparse, device=device)
    emb.weight,emb.num_embeddings = nn.Parameter(torch.rand(V, D, device=device)),V
    return emb

def steps(V, D, shape, sparse, fastai, device):
    "The step of each kind; embedding and word ids are shared"
    emb,words = table(V, D, sparse, device),torch.randint(0, V, shape, device=device)
    return {k:stepper(m, emb, words) for k,m in kinds(emb, fastai).items()}

def peak_mb(step, device):
    "Peak memory of one step above what is held before it, MB"
    memory = Memory(device)
    memory.reset()
    base = memory.peak()
    step()
    return memory.peak()-base

def measure(spec, args):
    "Print what `spec` asks for: the milliseconds of each kind, or the megabytes of one, in this process"
    what,*sizes = spec.split(',')
    V,D,b,t,sparse,fastai = map(int, sizes)
    steps(9, 2, (2,2), bool(sparse), False, args.device)['plain']() # what the first backward of a process takes
    fs = steps(V, D, (b,t), bool(sparse), bool(fastai), args.device)
    print(json.dumps(interleave(fs, args.runs*(20 if sparse else 1), args.device) if what=='ms' else peak_mb(fs[what], args.device)))

def asked(what, size, args):
    "What a process of its own measures"
    V,D,shape,sparse,fastai = size
    spec = ','.join(map(str, (what, V, D, *shape, int(sparse), int(fastai))))
    cmd = [sys.executable, '-m', 'benchmarks.op', '--measure', spec, '--runs', str(args.runs if V*D<1e8 or sparse else max(5, args.runs//3)), '--device', args.device]
    return json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout)

def profile_row(V, D, shape, sparse, fastai, args):
    "Milliseconds of a whole step with a mask that is at hand, and of the mask and the hash in it alone, beside `nn.Embedding` and ours"
    emb,words = table(V, D, sparse, args.device),torch.randint(0, V, shape, device=args.device)
    drop = EmbeddingDropout(emb, .1)
    mask,seed = drop._row_mask(words, emb.weight),drop._draw_seed()
    whole = {k:stepper(m, emb, words) for k,m in dict(plain=emb, masked=lambda words: emb(words)*mask, ours=drop).items()}
    ms = interleave({**whole, 'mask':lambda: drop._row_mask(words, emb.weight), 'hash':lambda: splitmix64(words, seed)}, 20*args.runs, args.device)
    return dict(V=V, D=D, tokens=words.numel(), **{f'{k}_ms':f'{v:.3f}' for k,v in ms.items()})

def op_rows(args):
    "One row for each of `sizes`: medians over the rounds"
    rows = []
    for size in sizes:
        V,D,shape,sparse,fastai = size
        rounds = [asked('ms', size, args) for _ in range(args.rounds)]
        ms = {k:median(r[k] for r in rounds) for k in rounds[0]}
        mem = {k:asked(k, size, args) for k in ms}
        rows.append(dict(V=V, D=D, tokens=shape[0]*shape[1], sparse=sparse, **{f'{k}_ms':f'{ms[k]:.3f}' if k in ms else '' for k in ('ours','fastai','plain')},
                         over_plain=f"{ms['ours']/ms['plain']:.2f}", faster_than_fastai=f"{ms['fastai']/ms['ours']:.2f}" if fastai else '',
                         extra_ms=f"{ms['ours']-ms['plain']:.3f}", **{f'{k}_mb':f'{mem[k]:.1f}' if k in mem else '' for k in ('ours','fastai','plain')}))
        print(rows[-1], flush=True)
    return rows

def main():
    args = arguments(__doc__, runs=15, rounds=3, only='', measure='')
    if args.measure: return measure(args.measure, args)
    if args.only in ('','op'): report('op', op_rows(args), args.device)
    if args.only in ('','profile'): report('op_profile', [profile_row(*size, args) for size in sizes if size[3]], args.device)

if __name__=='__main__': main()
