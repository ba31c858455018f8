"""What do the measurements of `AdaptEmbedP` cost? Fits with and without them, in turn, on random words

A rule that returns 0 makes the two fits the same except for the measurements. Times are processor time, so other work
on the machine counts little. Run it with `python -m experiments.overhead`."""
import argparse, time
from statistics import median
import numpy as np
from fastai.text.all import set_seed, torch
from fastai_embdrop.adapt import AdaptEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.corpus import lm_dataloaders
from benchmarks.common import hardware

def zero(history): return 0.

def seconds(dls, units, epochs, cbs):
    "Time of the process for one fit"
    set_seed(0)
    learn = awd_lstm_learner(dls, dict(emb_sz=units, n_hid=units, n_layers=1), keep_logits=True)
    with learn.no_bar(), learn.no_logging():
        t = time.process_time()
        learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return time.process_time()-t

def main(argv=None):
    p = argparse.ArgumentParser('python -m experiments.overhead', description=__doc__.splitlines()[0])
    for name,value in dict(batches=500, units=128, words=2000, runs=5).items():
        p.add_argument(f'--{name}', type=int, default=value)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    epochs,bs,seq_len = 10,16,35
    rng = np.random.default_rng(0)
    def text(n): return [f'w{i}' for i in rng.integers(0, args.words, n)]
    n = args.batches//epochs*bs*seq_len + 1
    dls = lm_dataloaders([text(n)], [text(12_000)], tok='split', min_freq=1, bs=bs, seq_len=seq_len, device='cpu')
    def pair(): return [seconds(dls, args.units, epochs, cbs) for cbs in ([], [AdaptEmbedP(rule=zero)])]
    pair() # to warm up
    times = [pair() for _ in range(args.runs)]
    without,with_it = map(median, zip(*times))
    share = median(b/a-1 for a,b in times)
    print(f'{epochs*len(dls.train)} batches: {without:.2f} s without, {with_it:.2f} s with, '
          f'{share:+.1%} (median of {args.runs} pairs); {hardware("cpu")}')

if __name__=='__main__': main()
