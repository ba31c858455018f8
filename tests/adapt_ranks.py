"""What each process of tests/test_adapt.py does: a fit whose processes would measure different losses

The argument is the folder for the results."""
import sys
from pathlib import Path
import torch
from fastai.torch_core import rank_distrib, set_seed
from fastai_embdrop import adapt
from fastai_embdrop.adapt import AdaptEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
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
res = dict(history=cb.history, ps=ps, own=own, refused=refused)
torch.save(res, Path(sys.argv[1])/f'{rank_distrib()}.pth')
