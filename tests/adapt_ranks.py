"""Runs in each process of tests/test_adapt.py: a fit whose processes would measure different losses, and one
whose batches are divided

The argument is the folder for the results."""
import sys
from pathlib import Path
import torch
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib, set_seed
from fastai_embdrop import adapt
from fastai_embdrop.adapt import AdaptEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.distrib import lm_distrib_ctx
from conftest import SMALL, small_dls

torch.distributed.init_process_group('gloo')
set_seed(rank_distrib())
measured,own = adapt.eval_loss,[]

def eval_loss(learn, batches):
    own.append(measured(learn, batches))
    return own[-1]

adapt.eval_loss = eval_loss
cb = AdaptEmbedP(rule=lambda history: history[-1][3]/100)
learn = awd_lstm_learner(small_dls(), SMALL)
with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
ps = learn.recorder.hps['embed_p']
try: learn.fit(1, cbs=AdaptEmbedP(control=.5))
except ValueError as e: refused = 'in several processes' in str(e)

shapes = set()
class Shapes(Callback):
    "Of the batches of the samples"
    def before_train(self):
        batches = [*among.samples.train, *among.samples.control]
        shapes.update(tuple(x.shape) for x,_ in batches)

among = AdaptEmbedP(rule=lambda history: history[-1][3]/100)
learn = awd_lstm_learner(small_dls(), SMALL)
with lm_distrib_ctx(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[among, Shapes()])
divided = learn.recorder.hps['embed_p']
res = dict(history=cb.history, ps=ps, own=own, refused=refused, divided=divided, shapes=shapes)
torch.save(res, Path(sys.argv[1])/f'{rank_distrib()}.pth')
