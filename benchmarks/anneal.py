"CPU time of a scheduler for each batch, for one module and for thirty, beside a callback that does nothing."
import time
from statistics import median
from torch import nn
from fastai.basics import Callback, Learner
from fastai.callback.schedule import SchedCos
from fastai_embdrop.anneal import AnnealDropMult, AnnealEmbedP, DropoutScheduler
from fastai_embdrop.dropout import EmbeddingDropout
from benchmarks.common import arguments, report

calls = 200 # batches in a timed run

class Nothing(Callback):
    "The two events of a scheduler, without its work"
    run_valid = False
    def before_batch(self): pass
    def after_batch(self): pass

def embeddings(n): return nn.ModuleList(EmbeddingDropout(nn.Embedding(10, 2), .1) for _ in range(n))
def dropouts(n): return nn.ModuleList(nn.Dropout(.1) for _ in range(n))

def kinds():
    "By name: how many probabilities, their modules and the callback that moves them"
    return {'no scheduler':(0, dropouts(1), Nothing()),
            'AnnealEmbedP':(1, embeddings(1), AnnealEmbedP(.5, .05)),
            'AnnealEmbedP, epochs=4':(1, embeddings(1), AnnealEmbedP(.5, .05, epochs=4)),
            'AnnealEmbedP, 30 modules':(30, embeddings(30), AnnealEmbedP(.5, .05)),
            'DropoutScheduler, 30 nn.Dropout':(30, dropouts(30), DropoutScheduler({'*.p':SchedCos(.5, .05)})),
            'AnnealDropMult, 30 nn.Dropout':(30, dropouts(30), AnnealDropMult(1, .1))}

def batches(model, cb, device):
    "A function that calls the events of `cb` for some batches of a fit of `model`"
    learn = Learner(None, model.to(device), loss_func=nn.CrossEntropyLoss(), cbs=cb, default_cbs=False)
    learn.n_epoch,learn.epoch,learn.training = 1,0,True
    learn('before_fit')
    def run():
        for i in range(calls):
            learn.pct_train = i/calls
            cb('before_batch')
            cb('after_batch')
        for values in getattr(cb, 'applied', {}).values(): values.clear()
    return run

def cpu_us(fs, runs):
    "Median microseconds a batch of each of `fs`, run in turn, of this process: waiting for the others does not count"
    times = {k:[] for k in fs}
    for _ in range(runs):
        for k,f in fs.items():
            start = time.process_time()
            f()
            times[k].append(1e6*(time.process_time()-start)/calls)
    return {k:median(v) for k,v in times.items()}

def main():
    args = arguments(__doc__, runs=41)
    found = kinds()
    us = cpu_us({name:batches(model, cb, args.device) for name,(_,model,cb) in found.items()}, args.runs)
    rows = [dict(scheduler=name, moves=n, us_per_batch=f'{us[name]:.1f}') for name,(n,*_) in found.items()]
    report('anneal', rows, args.device)

if __name__=='__main__': main()
