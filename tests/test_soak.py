"""Pins that 2,000 annealed training steps, eager and compiled, end with the memory, files, tensors and graphs of
the first 500.

Eight fits of 250 steps under one schedule: fastai's `Recorder` keeps the losses of a fit, so tensors are counted
between fits.
"""
import gc, psutil, pytest, torch
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from conftest import SMALL, compiling, graphs, needs_compiler, small_dls

fits,steps,most = 8,250,8 # the bound on growth is in MiB; a tensor leaked at each step would be caught by their number

def census():
    gc.collect()
    me = psutil.Process()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return dict(tensors=tensors, files=me.num_fds(), graphs=graphs()), me.memory_info().rss/2**20

@pytest.mark.long
@compiling
@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=needs_compiler)])
def test_two_thousand_steps_leave_nothing_behind(dynamo, compiled, capsys):
    dls = small_dls(n=4*8*steps+1)
    learn,cb,seen = awd_lstm_learner(dls, SMALL),AnnealEmbedP(.5, .05, epochs=fits),[]
    if compiled: learn.model.compile()
    for _ in range(fits):
        learn.fit(1, cbs=cb)
        seen.append(census())
    (counts,rss),(last,last_rss) = seen[1],seen[-1]
    how = 'compiled' if compiled else 'eager'
    with capsys.disabled(): print(f'\nsoak: {fits*len(dls.train)} steps, {how}: {last_rss-rss:+.1f} MiB, {last}')
    assert len(dls.train)==steps and learn.recorder.hps['embed_p'][-1] < .051
    assert all(o==counts for o,_ in seen[1:])
    assert last_rss-rss < most
    assert bool(counts['graphs'])==compiled
