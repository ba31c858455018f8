"""A training step of fastai's default AWD-LSTM language model: fastai's learner against ours, with and without logits.

The command first times decoder and loss alone, over chunk sizes, and ends with where the time goes. Each step is timed
from the batch to the zeroed gradients, all callbacks included, in a process that trains one learner and nothing else;
the processes of a round run one after another. `extra_mb` is the peak of the process's memory during the training steps
above what it held before the first: gradients and Adam's state are in it, as both need them. `system_s` is the
processor time of a step in the kernel, over all threads, in seconds: on a CPU, for pages of memory.
"""
import json, os, re, subprocess, sys, time
from collections import Counter
from statistics import median
import torch
from torch import nn
from torch.nn import functional as F
from fastai.text.all import AWD_LSTM, Callback, DataLoader, DataLoaders, language_model_learner
from fastai_embdrop.awdlstm import awd_lstm_learner
from benchmarks.common import Memory, arguments, interleave, report, sync

kinds = {'fastai':lambda dls: language_model_learner(dls, AWD_LSTM, pretrained=False),
         'with logits':lambda dls: awd_lstm_learner(dls, keep_logits=True),
         'ours':awd_lstm_learner}

class Watch(Callback):
    "Seconds of each training step, how many the kernel took, and the peak of memory over them"
    run_valid = False
    def __init__(self, device): self.device,self.memory,self.secs,self.system,self.peak = device,Memory(device),[],[],0.
    def before_fit(self): self.base = self.memory.now()
    def before_batch(self):
        sync(self.device)
        self.memory.reset()
        self.began,self.in_kernel = time.perf_counter(),os.times().system
    def after_batch(self):
        sync(self.device)
        self.secs.append(time.perf_counter()-self.began)
        self.system.append(os.times().system-self.in_kernel)
        self.peak = max(self.peak, self.memory.peak()-self.base)

def loaders(V, bs, seq_len, n, device):
    "`n` batches of random ids"
    items = [tuple(torch.randint(V, (2, bs, seq_len))) for _ in range(n)]
    def loader(k): return DataLoader(range(k), bs=None, create_item=items.__getitem__, num_workers=0)
    dls = DataLoaders(loader(n), loader(1), device=device)
    dls.vocab = [f'w{i}' for i in range(V)]
    return dls

def one_process(kind, V, bs, seq_len, steps, device):
    "Train `kind` for a warm-up step and `steps` more, in bf16 on a card; print median seconds, the kernel's, peak MB"
    learn,watch = kinds[kind](loaders(V, bs, seq_len, steps+1, device)),Watch(device)
    if device.startswith('cuda'): learn.to_bf16()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=watch)
    print(json.dumps([median(watch.secs[1:]), median(watch.system[1:]), watch.peak]))

def step_rows(V, args):
    "One row for each kind: medians over the rounds"
    res = {k:[] for k in kinds}
    for _ in range(args.rounds):
        for k in kinds:
            one = f'{k},{V},{args.bs},{args.seq_len},{args.steps}'
            cmd = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.lm_step', '--one', one, '--device', args.device]
            printed = subprocess.run(cmd, stdout=subprocess.PIPE, text=True, check=True).stdout
            res[k].append(json.loads(printed.splitlines()[-1]))
    def medians(i): return {k:median(o[i] for o in v) for k,v in res.items()}
    s,system,mb = medians(0),medians(1),medians(2)
    slowest = {k:max(o[0] for o in v) for k,v in res.items()}
    return [dict(V=V, tokens=args.bs*args.seq_len, learner=k,
                 step_s=f'{s[k]:.3f}', time_over_fastai=f"{s[k]/s['fastai']:.2f}",
                 slowest_s=f'{slowest[k]:.3f}', system_s=f'{system[k]:.2f}',
                 extra_mb=f'{mb[k]:.0f}', memory_over_fastai=f"{mb[k]/mb['fastai']:.2f}") for k in kinds]

def loss_rows(V, args, D=400):
    """Decoder and loss alone, forward and backward: one row for each number of rows at a time

    `logits` computes all logits first, as fastai does; `auto` is torch's choice."""
    if not hasattr(F, 'linear_cross_entropy'): return []
    dtype = torch.bfloat16 if args.device.startswith('cuda') else torch.float32
    n,make = args.bs*args.seq_len,dict(device=args.device, dtype=dtype, requires_grad=True)
    x,w,b = torch.randn(n, D, **make),torch.randn(V, D, **make),torch.zeros(V, **make)
    y = torch.randint(V, (n,), device=args.device)
    chunks = {c:nn.LinearCrossEntropyOptions(batch_chunk_size=c) for c in (128,256,512,1024,2048)}
    options = {'logits':None, 'auto':nn.LinearCrossEntropyOptions(), **chunks}
    def step(o):
        x.grad = w.grad = b.grad = None
        F.linear_cross_entropy(x, w, y, linear_bias=b, options=o).backward()
    ms = interleave({k:lambda o=o: step(o) for k,o in options.items()}, args.runs, args.device, warmup=1)
    return [dict(V=V, tokens=n, chunk=k, ms=f'{ms[k]:.0f}', over_logits=f"{ms[k]/ms['logits']:.2f}") for k in options]

class Profile(Callback):
    "torch's profile of the second training batch"
    run_valid = False
    def before_batch(self):
        self.prof = torch.profiler.profile()
        self.prof.start()
    def after_batch(self): self.prof.stop()

parts = {'products of the decoder':'aten::(mm|addmm_?)',
         'LSTMs':'aten::mkldnn_rnn.*|aten::_cudnn_rnn.*',
         'all else':'.*'}

def flops(model, tokens):
    """Floating-point operations of the products in a step, by part

    Two for each weight and token, forward and twice backward."""
    decoder = model[1].decoder
    lstms = [m for m in model[0].rnns.modules() if isinstance(m, nn.LSTM)]
    weights = sum(4*m.hidden_size*(m.input_size+m.hidden_size) for m in lstms)
    return {'products of the decoder':6*tokens*decoder.weight.numel(), 'LSTMs':6*tokens*weights}

def part_of(operation): return next(k for k,o in parts.items() if re.fullmatch(o, operation))

def square_gflops(n, device):
    "What a product of two square matrices reaches"
    a = torch.randn(n, n, device=device)
    return 2*n**3/interleave({'':lambda: a@a}, 9, device)['']/1e6

def profile_rows(V, args):
    "Where the time of our step goes, by the operations themselves, and how fast the products are"
    learn,watch = kinds['ours'](loaders(V, args.bs, args.seq_len, 2, args.device)),Profile()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=watch)
    ms,fs = Counter(),flops(learn.model, args.bs*args.seq_len)
    own = 'self_device_time_total' if args.device.startswith('cuda') else 'self_cpu_time_total'
    for e in watch.prof.key_averages(): ms[part_of(e.key)] += getattr(e, own)/1000
    gflops = {k:f'{fs[k]/ms[k]/1e6:.0f}' for k in fs}
    rows = [dict(V=V, part=k, ms=f'{ms[k]:.0f}', share=f'{ms[k]/ms.total():.2f}', gflops=gflops.get(k, ''))
            for k in parts]
    square = f'{square_gflops(2048, args.device):.0f}'
    return rows + [dict(V=V, part='a product of 2048 x 2048 by itself', ms='', share='', gflops=square)]

def main():
    args = arguments(__doc__.splitlines()[0], rounds=3, steps=4, runs=5, bs=64, seq_len=72, sizes='33000,60000',
                     only='', one='')
    if args.one:
        kind,*sizes = args.one.split(',')
        return one_process(kind, *map(int, sizes), args.device)
    sizes = [int(o) for o in args.sizes.split(',')]
    for what,f in dict(loss=loss_rows, step=step_rows, profile=profile_rows).items():
        if args.only not in ('', what): continue
        rows = [r for V in sizes for r in f(V, args)]
        if rows: report(f'lm_{what}', rows, args.device)

if __name__=='__main__': main()
