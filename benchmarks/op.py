"""Embedding dropout, forward and backward, beside fastai's class and `nn.Embedding`: ratios, time and memory over
sizes; then the pieces of a step with sparse gradients."""
import json, os, subprocess, sys
from dataclasses import astuple, dataclass
from statistics import median
import torch
from torch import nn
from fastai.text.models.awdlstm import EmbeddingDropout as Fastai
from fastai_embdrop.dropout import EmbeddingDropout, splitmix64
from benchmarks.common import Memory, allocator, arguments, interleave, report

@dataclass
class Size:
    "A table of V x D, a batch of words, the kind of gradient, and whether freed memory is kept by the allocator"
    V:int
    D:int
    bs:int
    seq_len:int
    sparse:int = 0
    kept:int = 0

sizes = [Size(10_000, 400, 64, 72), Size(10_000, 400, 64, 72, kept=1), Size(60_000, 400, 64, 72),
         Size(268_000, 1024, 8, 128), Size(1_000_000, 64, 64, 72), Size(10_000_000, 16, 64, 72),
         Size(1_000_000, 64, 64, 72, sparse=1), Size(20_000_000, 64, 64, 72, sparse=1)]

# glibc then keeps what is freed, up to 1 GB, instead of fetching it from the kernel again at each step
keep_memory = dict(MALLOC_TRIM_THRESHOLD_=str(2**30), MALLOC_MMAP_THRESHOLD_=str(2**30))

names = 'ours','fastai','plain'

def kinds(emb, sparse):
    "Modules by name; fastai's class has no sparse gradients"
    res = dict(ours=EmbeddingDropout(emb, .1), plain=emb)
    return res if sparse else {**res, 'fastai':Fastai(emb, .1)}

def stepper(m, emb, words):
    "Forward and backward of `m`, from a gradient like one that arrives in training"
    grad = torch.randn(*words.shape, emb.embedding_dim, device=words.device)
    def step():
        emb.weight.grad = None
        m(words).backward(grad)
    return step

def table(V, D, sparse, device):
    emb = nn.Embedding(1, D, sparse=bool(sparse), device=device)
    emb.weight,emb.num_embeddings = nn.Parameter(torch.rand(V, D, device=device)),V
    return emb

def steps(size, device):
    "The step of each kind; embedding and word ids are shared"
    emb = table(size.V, size.D, size.sparse, device)
    words = torch.randint(0, size.V, (size.bs, size.seq_len), device=device)
    return {k:stepper(m, emb, words) for k,m in kinds(emb, size.sparse).items()}

def peak_mb(step, device):
    "Peak memory of one step above what is held before it, MB"
    memory = Memory(device)
    memory.reset()
    base = memory.peak()
    step()
    return memory.peak()-base

def runs_of(size, runs):
    "How many runs are timed: many of a sparse step, few of a large table"
    if size.sparse: return 20*runs
    if size.V*size.D < 1e8: return runs
    return max(5, runs//3)

def measure(spec, args):
    "In this process: the milliseconds of each kind, or the megabytes of one"
    what,*numbers = spec.split(',')
    size = Size(*map(int, numbers))
    steps(Size(9, 2, 2, 2, size.sparse), args.device)['plain']() # what the first backward of a process takes
    fs = steps(size, args.device)
    if what=='ms': res = interleave(fs, runs_of(size, args.runs), args.device)
    else: res = peak_mb(fs[what], args.device)
    print(json.dumps(res))

def asked(what, size, args):
    "What a process of its own measures"
    spec = ','.join(map(str, (what, *astuple(size))))
    cmd = [sys.executable, '-m', 'benchmarks.op', '--measure', spec, '--runs', str(args.runs), '--device', args.device]
    env = {**os.environ, **(keep_memory if size.kept else {})}
    return json.loads(subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)

def settings_of(size, args):
    "Columns that say what was measured"
    kept = ' '.join(f'{k}={v}' for k,v in keep_memory.items())
    return dict(V=size.V, D=size.D, tokens=size.bs*size.seq_len, sparse=bool(size.sparse),
                allocator=kept if size.kept else allocator(args.device))

def columns(values, unit, places):
    "A column for each kind: empty for one that was not measured"
    return {f'{k}_{unit}':f'{values[k]:.{places}f}' if k in values else '' for k in names}

def op_row(size, args):
    "Medians over the rounds, each a process: ratios of what was measured in turn, and milliseconds"
    rounds = [asked('ms', size, args) for _ in range(args.rounds)]
    def ratio(a, b):
        if a not in rounds[0]: return ''
        return f'{median(r[a]/r[b] for r in rounds):.2f}'
    ms = {k:median(r[k] for r in rounds) for k in rounds[0]}
    ratios = dict(over_plain=ratio('ours', 'plain'), fastai_over_plain=ratio('fastai', 'plain'))
    return {**settings_of(size, args), **ratios, **columns(ms, 'ms', 3)}

def memory_row(size, args):
    "Megabytes of one step of each kind, above what was held before it"
    measured = [k for k in names if not (size.sparse and k=='fastai')]
    mb = {k:asked(k, size, args) for k in measured}
    return {**settings_of(size, args), **columns(mb, 'mb', 1)}

def rows_of(f, args):
    res = []
    for size in sizes:
        if size.kept and args.device.startswith('cuda'): continue # glibc's setting
        res.append(f(size, args))
        print(res[-1], flush=True)
    return res

def profile_row(size, args):
    "Milliseconds of a step with a mask that is at hand, and of the mask and its hash alone, beside the whole step"
    emb = table(size.V, size.D, size.sparse, args.device)
    words = torch.randint(0, size.V, (size.bs, size.seq_len), device=args.device)
    drop = EmbeddingDropout(emb, .1)
    mask,seed = drop._row_mask(words, emb.weight),drop._draw_seed()
    modules = dict(plain=emb, masked=lambda words: emb(words).mul_(mask), ours=drop)
    parts = dict(mask=lambda: drop._row_mask(words, emb.weight), hash=lambda: splitmix64(words, seed))
    whole = {k:stepper(m, emb, words) for k,m in modules.items()}
    ms = interleave({**whole, **parts}, 20*args.runs, args.device)
    shown = {f'{k}_ms':f'{v:.3f}' for k,v in ms.items()}
    return dict(V=size.V, D=size.D, tokens=words.numel(), **shown)

def main():
    args = arguments(__doc__, runs=15, rounds=3, only='', measure='')
    if args.measure: return measure(args.measure, args)
    if args.only in ('','op'): report('op', rows_of(op_row, args), args.device)
    if args.only in ('','memory'): report('op_memory', rows_of(memory_row, args), args.device)
    if args.only in ('','profile'):
        report('op_profile', [profile_row(size, args) for size in sizes if size.sparse], args.device)

if __name__=='__main__': main()
