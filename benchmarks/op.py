"Forward + backward of embedding dropout against fastai's class and plain `nn.Embedding`, over vocabulary sizes, time and extra memory; then the pieces of a step with sparse gradients."
import re, subprocess, sys
from pathlib import Path
import torch
from torch import nn
from fastai.text.models.awdlstm import EmbeddingDropout as Fastai
from fastai_embdrop.dropout import EmbeddingDropout, hash_int64
from benchmarks.common import arguments, interleave, report

# V, D, batch, sparse, with fastai's class?
sizes = [(10_000,400,(64,72),False,True), (60_000,400,(64,72),False,True), (268_000,1024,(8,128),False,True), (1_000_000,64,(64,72),False,True),
         (10_000_000,16,(64,72),False,True), (1_000_000,64,(64,72),True,False), (20_000_000,64,(64,72),True,False)]

def kinds(emb, fastai):
    return {'ours':EmbeddingDropout(emb, .1), **({'fastai':Fastai(emb, .1)} if fastai else {}), 'plain':emb}

def step(m, emb, words):
    emb.weight.grad = None
    m(words).sum().backward()

def table(V, D, sparse, device):
    emb = nn.Embedding(1, D, sparse=sparse, device=device)
    emb.weight,emb.num_embeddings = nn.Parameter(torch.rand(V, D, device=device)),V
    return emb

def time_row(V, D, shape, sparse, fastai, device, runs):
    emb = table(V, D, sparse, device)
    words = torch.randint(0, V, shape, device=device)
    return interleave({k:lambda m=m: step(m, emb, words) for k,m in kinds(emb, fastai).items()}, runs, device)

def profile_row(V, D, shape, device, runs):
    "Milliseconds of a whole step with a mask that is at hand, and of the mask and the hash in it alone, beside `nn.Embedding` and ours"
    emb = table(V, D, True, device)
    words,drop = torch.randint(0, V, shape, device=device),EmbeddingDropout(emb, .1)
    mask,seed = drop._fate(words, emb.weight),drop._draw_seed(device)
    steps = dict(plain=emb, masked=lambda words: emb(words)*mask, ours=drop)
    ms = interleave({**{k:lambda m=m: step(m, emb, words) for k,m in steps.items()},
                     'mask':lambda: drop._fate(words, emb.weight), 'hash':lambda: hash_int64(words, seed)}, runs, device)
    return dict(V=V, D=D, tokens=words.numel(), **{f'{k}_ms':f'{v:.3f}' for k,v in ms.items()})

def peak_mb(kind, V, D, shape, sparse, fastai, device):
    "Peak memory of one step of `kind` above the table itself, MB: on a CPU in a process of its own"
    if device.startswith('cuda'):
        emb = table(V, D, sparse, device)
        m,words = kinds(emb, fastai)[kind],torch.randint(0, V, shape, device=device)
        base = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
        step(m, emb, words)
        return (torch.cuda.max_memory_allocated()-base)/2**20
    out = subprocess.run([sys.executable, '-m', 'benchmarks.op', '--peak', f'{kind},{V},{D},{shape[0]},{shape[1]},{int(sparse)},{int(fastai)}'],
                         capture_output=True, text=True, check=True).stdout
    return float(out)

def peak(spec):
    kind,*rest = spec.split(',')
    V,D,b,t,sparse,fastai = map(int, rest)
    emb = table(V, D, bool(sparse), 'cpu')
    m,small = kinds(emb, bool(fastai))[kind],nn.Embedding(9, D, sparse=bool(sparse))
    step(small, small, torch.zeros(2,2, dtype=torch.long)) # what the first backward of a process takes
    Path('/proc/self/clear_refs').write_text('5') # resets the high-water mark
    base = high_water()
    step(m, emb, torch.randint(0, V, (b,t)))
    print(high_water()-base)

def high_water(): return int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])/1024

def op_rows(args):
    rows = []
    for V,D,shape,sparse,fastai in sizes:
        ms = time_row(V, D, shape, sparse, fastai, args.device, 20*args.runs if sparse else args.runs if V*D<1e8 else max(5, args.runs//3))
        mem = {k:peak_mb(k, V, D, shape, sparse, fastai, args.device) for k in ms}
        rows.append(dict(V=V, D=D, tokens=shape[0]*shape[1], sparse=sparse, **{f'{k}_ms':f'{ms[k]:.3f}' if k in ms else '' for k in ('ours','fastai','plain')},
                         over_plain=f"{ms['ours']/ms['plain']:.2f}", faster_than_fastai=f"{ms['fastai']/ms['ours']:.2f}" if fastai else '',
                         extra_ms=f"{ms['ours']-ms['plain']:.3f}", **{f'{k}_mb':f'{mem[k]:.1f}' if k in mem else '' for k in ('ours','fastai','plain')}))
        print(rows[-1], flush=True)
    return rows

def main():
    args = arguments(__doc__, runs=15, peak='', only='')
    if args.peak: return peak(args.peak)
    if args.only in ('','op'): report('op', op_rows(args), args.device)
    if args.only in ('','profile'): report('op_profile', [profile_row(V, D, shape, args.device, 20*args.runs) for V,D,shape,sparse,_ in sizes if sparse], args.device)

if __name__=='__main__': main()
