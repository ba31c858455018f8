"What each process of tests/run/test_distrib.py does; `torchrun` starts it with the folder to write its results to."
import random, sys
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy, perplexity
from fastai.torch_core import get_model, rank_distrib, set_seed
from fastcore.xtras import modified_env
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.corpus import lm_dataloaders
from conftest import SMALL, random_tokens

def dls(bs):
    "Thirty texts, whose order matters; an odd number of batches for 2 x 4 rows and for 8"
    train,valid = [random_tokens(27, i) for i in range(30)],[random_tokens(101, 99)]
    return lm_dataloaders(train, valid, tok='split', min_freq=1, bs=bs, seq_len=6, device='cpu')

class Seen(Callback):
    "The ids that were read, `embed_p` and the words that were dropped, batch by batch"
    def before_fit(self):
        self.read,self.ps,self.dropped = [],[],[]
        enc = get_model(self.model)[0]
        self.hook = enc.encoder_dp.register_forward_hook(self._look)
    def _look(self, m, inp, out):
        if not self.training: return
        words = inp[0].as_subclass(torch.Tensor)
        self.read.append(words.clone())
        self.ps.append(m.embed_p)
        self.dropped.append(set(words[(out==0).all(-1)].tolist()))
    def after_fit(self): self.hook.remove()

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def dropped_out(ctx):
    "50 steps with every kind of dropout, begun with other weights, order and seed on each rank"
    set_seed(rank_distrib())
    learn = awd_lstm_learner(dls(4), {**SMALL, 'embed_p':.5}, metrics=[perplexity, accuracy])
    seen = Seen()
    with ctx(learn), learn.no_logging(): learn.fit(3, 1e-2, cbs=[AnnealEmbedP(.6, .1), seen])
    return dict(steps=learn.train_iter, read=seen.read, ps=seen.ps, dropped=seen.dropped, weights=weights(learn),
                values=list(learn.recorder.values))

def without_dropout(ctx, bs=4):
    "A fit that one process can repeat with twice the rows, and a validation after it"
    set_seed(3)
    learn = awd_lstm_learner(dls(bs), SMALL, drop_mult=0., metrics=perplexity)
    with ctx(learn), learn.no_logging(), learn.no_bar():
        random.seed(5)
        learn.fit(1, 1e-2)
        return dict(hidden=learn.no_logits.left_out, weights=weights(learn), values=list(learn.recorder.values),
                    validated=list(learn.validate()))

def held(ctx):
    "The seed of a mask that is held over a fit"
    set_seed(0)
    learn = awd_lstm_learner(dls(4), {**SMALL, 'hold':True})
    class Seed(Callback):
        def after_train(self): self.learn.held = get_model(self.model)[0].encoder_dp._seed.item()
    with ctx(learn), learn.no_logging(): learn.fit(1, 1e-2, cbs=Seed())
    return learn.held

def alone(ctx):
    "A prediction that no other rank takes part in"
    if rank_distrib(): return
    with modified_env('WORLD_SIZE'): return awd_lstm_learner(dls(4), SMALL).predict('w1 w2', n_words=3, no_bar=True)

if __name__=='__main__':
    from fastai_embdrop.run.distrib import lm_distrib_ctx
    res = {f.__name__:f(lm_distrib_ctx) for f in (dropped_out, without_dropout, held, alone)}
    torch.save(res, f'{sys.argv[1]}/{rank_distrib()}.pt')
