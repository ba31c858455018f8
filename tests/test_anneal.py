"""Pins where a schedule runs and where it does not: kinds of fit, interruptions, cancelled fits, wrappers, the record.

Also: what is refused, and in which words; configured values follow their module; no value is read from a device. The
plan is recomputed here from `pct_train`'s definition, (epoch + batch/n)/epochs, and not read from the callback.
"""
import copy, re
from functools import partial
import cloudpickle
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedExp, SchedNo
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Recorder
from fastai.text.all import language_model_learner
from fastai.text.models import awdlstm as fastai_awdlstm
from fastai_embdrop.anneal import AnnealDropMult, AnnealEmbedP, DropoutScheduler, _base_p, drop_attrs, find_dropouts
from fastai_embdrop.awdlstm import awd_lstm_learner, awd_lstm_lm, awd_lstm_lm_config
from fastai_embdrop.run.checkpoint import Checkpoint, last_checkpoint
from fastai_embdrop.schedules import SchedCurriculum, SchedEarly, SchedLate, SchedPiecewise, shapes
from conftest import SMALL, small_dls

f = SchedCos(.5, .05)

@pytest.fixture
def dls(): return small_dls(300)

@pytest.fixture
def learn(dls, tmp_path): return awd_lstm_learner(dls, SMALL, path=tmp_path)

def plan(n_batches, epochs=1, start=0):
    return [f((e+i/n_batches)/epochs) for e in range(start, epochs) for i in range(n_batches)]

def applied(learn, key='embed_p'): return learn.recorder.hps[key]

FITS = dict(fit=lambda l,cb: l.fit(2, cbs=cb), fit_one_cycle=lambda l,cb: l.fit_one_cycle(2, cbs=cb),
            fit_flat_cos=lambda l,cb: l.fit_flat_cos(2, cbs=cb), fit_sgdr=lambda l,cb: l.fit_sgdr(1, 2, cbs=cb))

@pytest.mark.parametrize('fit', FITS.values(), ids=FITS)
def test_follows_the_plan(learn, fit):
    fit(learn, AnnealEmbedP(.5, .05))
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train), 2), atol=1e-9)
    assert learn.model[0].encoder_dp.embed_p==applied(learn)[-1]

def test_fine_tune_is_two_fits(learn):
    seen = []
    learn.fine_tune(2, cbs=[AnnealEmbedP(.5, .05), Watch(seen)])
    n = len(learn.dls.train)
    np.testing.assert_allclose(seen, plan(n) + plan(n, 2), atol=1e-9)

class Watch(Callback):
    "What the model has in each forward pass of training"
    run_valid,order = False,99
    def __init__(self, seen): self.seen = seen
    def after_pred(self): self.seen.append(self.model[0].encoder_dp.embed_p)

@pytest.mark.parametrize('epochs', [None, 3])
@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle'])
def test_start_epoch_continues(learn, fit, epochs):
    getattr(learn, fit)(3, start_epoch=2, cbs=AnnealEmbedP(.5, .05, epochs=epochs))
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train), 3, start=2), atol=1e-9)

def test_gradient_accumulation(learn):
    learn.fit(1, cbs=[AnnealEmbedP(.5, .05), GradientAccumulation(8)])
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train)), atol=1e-9)

# mixed precision in bf16, whose gradient scaler is off: on a CPU fastai's `autocast('cuda')` does nothing
@pytest.mark.parametrize('cb', [MixedPrecision(amp_mode=AMPMode.BF16), GradientClip()])
def test_beside_other_callbacks(learn, cb):
    learn.fit(1, cbs=[AnnealEmbedP(.5, .05), cb])
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train)), atol=1e-9)

def test_model_sees_what_is_recorded(learn):
    seen = []
    learn.fit(2, cbs=[AnnealEmbedP(.5, .05), Watch(seen)])
    assert seen==applied(learn)

@pytest.mark.parametrize('first', [True, False])
def test_the_record_is_beside_lr_and_mom(learn, first):
    cb = AnnealEmbedP(.5, .05)
    if first: learn.add_cb(cb)
    learn.fit_one_cycle(1, cbs=None if first else cb)
    assert {k:len(v) for k,v in learn.recorder.hps.items()}==dict.fromkeys(['lr','mom','embed_p'], len(learn.dls.train))
    learn.recorder.plot_sched()

def test_two_schedulers_one_record(learn):
    learn.fit_one_cycle(1, cbs=[DropoutScheduler({'weight_p':f}), AnnealEmbedP(.5, .05)])
    assert list(learn.recorder.hps)==['lr','mom','weight_p','embed_p']

def test_plain_fit_shows_no_old_lr(learn):
    learn.add_cb(AnnealEmbedP(.5, .05))
    learn.fit_one_cycle(1)
    learn.fit(2)
    assert {k:len(v) for k,v in learn.recorder.hps.items()}=={'embed_p':2*len(learn.dls.train)}

def test_validation_and_prediction_leave_record_and_model(learn):
    learn.add_cb(AnnealEmbedP(.5, .05))
    learn.fit_one_cycle(1)
    hps,p = {k:list(v) for k,v in learn.recorder.hps.items()},learn.model[0].encoder_dp.embed_p
    learn.validate()
    learn.get_preds(reorder=False)
    learn.predict('w1 w2', no_bar=True)
    assert learn.recorder.hps==hps and learn.model[0].encoder_dp.embed_p==p

def test_lr_find_does_not_anneal(learn):
    seen = []
    learn.add_cbs([AnnealEmbedP(.5, .05), Watch(seen)])
    learn.lr_find(num_it=10, show_plot=False)
    assert set(seen)=={awd_lstm_lm_config['embed_p']} and 'embed_p' not in getattr(learn.recorder, 'hps', {})

def test_two_fits_are_two_equal_plans(learn):
    cb = AnnealEmbedP(.5, .05)
    learn.fit_one_cycle(1, cbs=cb)
    one = learn.recorder.hps
    learn.fit_one_cycle(1, cbs=cb)
    assert learn.recorder.hps==one and learn.recorder.hps is not one and list(one)==['lr','mom','embed_p']

class Stop(Callback):
    order,run_valid = 70,False
    def __init__(self, at, ex): self.at,self.ex = at,ex
    def before_batch(self):
        if self.train_iter==self.at: raise self.ex('stopped here')

def test_cancelled_fit_publishes(learn):
    learn.fit_one_cycle(1, cbs=[AnnealEmbedP(.5, .05), Stop(5, CancelFitException)])
    np.testing.assert_allclose(applied(learn)[:5], plan(len(learn.dls.train))[:5], atol=1e-9)
    assert 'lr' in learn.recorder.hps

@pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning') # fastai's LRFinder, when it crashes
@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('during', ['fit', 'lr_find'])
def test_crash_leaves_nothing_behind(learn, ex, during):
    learn.add_cb(AnnealEmbedP(.5, .05))
    if during=='fit':
        with pytest.raises(ex): learn.fit(1, cbs=Stop(5, ex))
    else:
        stop = Stop(5, ex)
        learn.add_cb(stop)
        with pytest.raises(ex): learn.lr_find(num_it=10, show_plot=False)
        learn.remove_cb(stop)
    learn.fit(1)
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train)), atol=1e-9)

def test_fastais_own_modules(dls):
    config = {**fastai_awdlstm.awd_lstm_lm_config, **SMALL}
    learn = language_model_learner(dls, fastai_awdlstm.AWD_LSTM, config=config, pretrained=False)
    learn.fit(1, cbs=DropoutScheduler({'embed_p':f, 'weight_p':f, '*hidden_dps.*.p':f}))
    assert list(learn.recorder.hps)==['embed_p','weight_p','*hidden_dps.*.p']
    assert {m.p for m in learn.model[0].hidden_dps}=={m.weight_p for m in learn.model[0].rnns}=={applied(learn)[-1]}

def test_through_ddp(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        m = awd_lstm_lm(30, SMALL)
        wrapped = nn.parallel.DistributedDataParallel(m)
        assert find_dropouts(wrapped, 'embed_p')==[m[0].encoder_dp]
        assert find_dropouts(wrapped, '*input_dp.p')==[m[0].input_dp]
    finally: torch.distributed.destroy_process_group()

def test_through_compile_and_data_parallel():
    m = awd_lstm_lm(30, SMALL)
    assert find_dropouts(torch.compile(m), 'embed_p')==find_dropouts(nn.DataParallel(m), 'embed_p')==[m[0].encoder_dp]

def test_glob_needs_the_whole_name():
    m = awd_lstm_lm(30, SMALL)
    with pytest.raises(ValueError, match="no module of SequentialRNN has 'input_dp.p'"): find_dropouts(m, 'input_dp.p')
    assert find_dropouts(m, '0.input_dp.p')==[m[0].input_dp]
    assert len(find_dropouts(m, 'p'))==1+SMALL['n_layers']+1

def test_no_match_names_attribute_and_model(learn):
    with pytest.raises(ValueError, match=f"no module of {type(learn.model).__name__} has 'drop_p'"):
        learn.fit(1, cbs=DropoutScheduler({'drop_p':f}))

@pytest.mark.parametrize('sched,msg', [(lambda pct: .5/pct, 'division by zero'), (lambda pct: 2., 'embed_p=2.0'),
                                       (lambda pct: float('nan'), 'embed_p=nan'), (lambda pct: None, 'NoneType')])
def test_bad_schedule_stops_before_the_batch(learn, sched, msg):
    w = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=f"schedule of 'embed_p' at pct=0: .*{msg}"):
        learn.fit(1, cbs=DropoutScheduler({'embed_p':sched}))
    assert all(torch.equal(a,b) for a,b in zip(w, learn.model.parameters()))
    assert learn.model[0].encoder_dp.embed_p==awd_lstm_lm_config['embed_p']

@pytest.mark.parametrize('start,end', [(-.1,.5), (.5,1.1), (float('nan'),0), ('.5',0)])
def test_bad_ends_refused_at_once(start, end):
    with pytest.raises(ValueError, match='start=|end='): AnnealEmbedP(start, end)

def test_without_recorder_and_without_an_end(learn):
    learn.remove_cb(Recorder)
    learn.fit(1, cbs=AnnealEmbedP(.5))
    assert 0 < learn.model[0].encoder_dp.embed_p < .02

def test_epochs_spread_over_fits(learn):
    cb,n,seen = AnnealEmbedP(.5, .05, epochs=4),len(learn.dls.train),[]
    learn.fine_tune(2, freeze_epochs=1, cbs=[cb, Watch(seen)])
    learn.fit(2, cbs=[cb, Watch(seen)])
    np.testing.assert_allclose(seen, plan(n, 4) + [.05]*n, atol=1e-9)

@pytest.mark.parametrize('ex', [RuntimeError, KeyboardInterrupt, CancelFitException])
def test_epochs_survive_an_interruption(learn, ex):
    cb,n = AnnealEmbedP(.5, .05, epochs=2),len(learn.dls.train)
    if ex is CancelFitException: learn.fit(2, cbs=[cb, Stop(5, ex)])
    else:
        with pytest.raises(ex): learn.fit(2, cbs=[cb, Stop(5, ex)])
    learn.validate()
    learn.fit(1, cbs=cb)
    np.testing.assert_allclose(applied(learn), [f((5+i)/n/2) for i in range(n)], atol=1e-9)

def test_epochs_continue_with_start_epoch(learn):
    cb,n = AnnealEmbedP(.5, .05, epochs=3),len(learn.dls.train)
    with pytest.raises(RuntimeError): learn.fit(3, cbs=[cb, Stop(n+5, RuntimeError)])
    learn.fit(3, start_epoch=1, cbs=cb)
    np.testing.assert_allclose(applied(learn), plan(n, 3, start=1), atol=1e-9)

@pytest.mark.parametrize('start', [0, 2])
def test_another_scheduler_counts_its_own_epochs(learn, start):
    learn.fit(1, cbs=AnnealEmbedP(.3, .1))
    learn.fit(3, start_epoch=start, cbs=AnnealEmbedP(.5, .05, epochs=3))
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train), 3, start), atol=1e-9)

def test_a_lower_value_that_is_assigned_later_counts_as_configured(learn):
    learn.fit(1, cbs=AnnealEmbedP(.5, .3))
    drop = learn.model[0].encoder_dp
    drop.embed_p = .1
    assert _base_p(drop, 'embed_p')==.1

def test_order_is_between_the_recorder_and_what_writes_its_values():
    assert Recorder.order < DropoutScheduler.order < CSVLogger.order

def test_epochs_start_again_with_another_learner(dls):
    "As in a loop over seeds; before, the second learner had the last value from its first batch on"
    cb,seen = AnnealEmbedP(.5, .05, epochs=1),[]
    for _ in range(2): awd_lstm_learner(dls, SMALL).fit(1, cbs=[cb, Watch(seen)])
    n = len(dls.train)
    assert seen[:n]==seen[n:] and seen[0]==.5

def test_epochs_continue_where_nothing_has_moved_yet(dls):
    "A late schedule from the configured value"
    cb,seen = AnnealEmbedP(None, .4, shapes['late'], epochs=2),[]
    learn = awd_lstm_learner(dls, SMALL)
    for _ in range(2): learn.fit(1, cbs=[cb, Watch(seen)])
    n = len(dls.train)
    assert cb.spent==pytest.approx(2) and set(seen[:n])=={.02}
    assert set(seen[n+1:])=={.4}, 'the batch in the middle is on either side, by rounding'

def test_epochs_may_be_a_fraction(learn):
    learn.fit(1, cbs=AnnealEmbedP(.5, .05, epochs=.5))
    n = len(learn.dls.train)
    np.testing.assert_allclose(applied(learn), [f(min(1, 2*i/n)) for i in range(n)], atol=1e-9)

def test_starts_from_the_configured_value(dls):
    learn = awd_lstm_learner(dls, {**SMALL, 'embed_p':.3})
    for _ in range(2):
        learn.fit(1, cbs=AnnealEmbedP(end=.1))
        assert applied(learn)[0]==.3 and abs(applied(learn)[-1]-.1)<.01
    learn.model[0].encoder_dp.embed_p = .6
    learn.fit(1, cbs=AnnealEmbedP(end=.1))
    assert applied(learn)[0]==.6

def test_drop_mult_scales_all_and_does_not_compound(learn):
    enc,n = learn.model[0],len(learn.dls.train)
    weights,hiddens = enc.rnns,enc.hidden_dps
    now = lambda: [enc.encoder_dp.embed_p, enc.input_dp.p, *(m.weight_p for m in weights), *(m.p for m in hiddens)]
    base = now()
    for _ in range(2): learn.fit(1, cbs=AnnealDropMult(1, .5))
    factors = [SchedCos(1, .5)(i/n) for i in range(n)]
    np.testing.assert_allclose(applied(learn, 'drop_mult'), factors)
    np.testing.assert_allclose(now(), np.array(base)*factors[-1])

def test_drop_mult_reaches_torchs_dropouts():
    with_p = nn.Dropout(.1),nn.Dropout2d(.2),nn.LSTM(2, 2, 2, dropout=.3),nn.MultiheadAttention(2, 1, dropout=.4)
    m = nn.Sequential(*with_p, nn.Dropout(0.), nn.PairwiseDistance(2.))
    assert [getattr(*o) for o in drop_attrs(m)]==[.1, .2, .3, .4]

def test_drop_mult_above_one_is_named(learn):
    with pytest.raises(ValueError, match="schedule of 'drop_mult' at pct=0: drop_mult=1.25"):
        learn.fit(1, cbs=AnnealDropMult(5, 1))

def test_drop_mult_needs_a_dropout(learn):
    for m,a in drop_attrs(learn.model): setattr(m, a, 0.)
    with pytest.raises(ValueError, match=f'no module of {type(learn.model).__name__} has a dropout probability'):
        learn.fit(1, cbs=AnnealDropMult(1, .5))

def test_history_file_has_a_column(learn, tmp_path):
    learn.fit_one_cycle(2, cbs=[CSVLogger(), AnnealEmbedP(.5, .05), DropoutScheduler({'*input_dp.p':f})])
    df = pd.read_csv(tmp_path/'history.csv')
    assert list(df.columns)==['epoch','train_loss','valid_loss','embed_p','*input_dp.p','time']
    n = len(learn.dls.train)
    np.testing.assert_allclose(df.embed_p, [applied(learn)[n-1], applied(learn)[2*n-1]])
    assert len(learn.validate())==1

@pytest.mark.parametrize('epochs', [0, -1, float('nan')])
def test_bad_epochs_refused(epochs):
    with pytest.raises(ValueError, match='epochs='): AnnealEmbedP(.5, .05, epochs=epochs)

# What would be silent

TWO = [
    (lambda: [AnnealEmbedP(.5, .4), AnnealEmbedP(.1, 0)],
     "AnnealEmbedP ('embed_p') and AnnealEmbedP ('embed_p') both move embed_p of EmbeddingDropout"),
    (lambda: [AnnealEmbedP(.5, .4), AnnealDropMult(1, 0)],
     "AnnealEmbedP ('embed_p') and AnnealDropMult ('drop_mult') both move embed_p of EmbeddingDropout"),
    (lambda: [AnnealDropMult(1, .5), AnnealEmbedP(.5, .4)],
     "AnnealDropMult ('drop_mult') and AnnealEmbedP ('embed_p') both move embed_p of EmbeddingDropout"),
    (lambda: [DropoutScheduler({'p':f}), DropoutScheduler({'*hidden_dps.0.p':f})],
     "DropoutScheduler ('p') and DropoutScheduler ('*hidden_dps.0.p') both move p of RNNDropout"),
    (lambda: DropoutScheduler({'*dp.p':f, '*input_dp.p':f}),
     "DropoutScheduler ('*dp.p') and DropoutScheduler ('*input_dp.p') both move p of RNNDropout"),
]

@pytest.mark.parametrize('cbs,msg', TWO)
def test_two_schedulers_of_one_attribute_are_refused(learn, cbs, msg):
    w = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=re.escape(msg)): learn.fit(1, cbs=cbs())
    assert all(torch.equal(a,b) for a,b in zip(w, learn.model.parameters()))
    assert learn.model[0].encoder_dp.embed_p==awd_lstm_lm_config['embed_p']

def test_one_scheduler_after_another_is_fine(learn):
    for cb in AnnealEmbedP(.5, .4), AnnealEmbedP(.1, 0), AnnealDropMult(1, .5), DropoutScheduler({'embed_p':f}):
        learn.fit(1, cbs=cb)
    assert applied(learn)[0]==.5

def test_two_schedulers_beside_each_other_are_fine(learn):
    learn.fit(1, cbs=[AnnealEmbedP(.5, .05), DropoutScheduler({'p':f}), DropoutScheduler({'weight_p':f})])
    assert list(learn.recorder.hps)==['embed_p','p','weight_p']

def test_after_a_refused_fit_the_next_one_runs(learn):
    cb = AnnealEmbedP(.5, .05)
    with pytest.raises(ValueError, match='both move'): learn.fit(1, cbs=[cb, AnnealEmbedP(.1, 0)])
    learn.fit(1, cbs=cb)
    np.testing.assert_allclose(applied(learn), plan(len(learn.dls.train)), atol=1e-9)

@pytest.mark.parametrize('cls', [AnnealEmbedP, AnnealDropMult])
@pytest.mark.parametrize('sched', [SchedEarly, SchedLate, SchedCurriculum, SchedPiecewise, 'cos', SchedCos(.5, .05)])
def test_what_is_no_shape_is_refused(cls, sched):
    name = re.escape(getattr(sched, '__name__', repr(sched)))
    with pytest.raises(ValueError, match=f'sched={name}: not a function of a start and an end'): cls(.5, .05, sched)

@pytest.mark.parametrize('make', [partial(AnnealEmbedP, .5, 0, SchedExp), partial(AnnealEmbedP, 0, .5, SchedExp),
                                  partial(AnnealEmbedP, .5, 0, shapes['exp']), partial(AnnealDropMult, 1, 0, SchedExp),
                                  partial(DropoutScheduler, {'embed_p':SchedExp(.5, 0)})])
def test_exp_to_or_from_0_is_refused(make):
    with pytest.raises(ValueError, match="schedule of '.*': SchedExp.*above 0; use SchedCos or SchedLin"): make()

def test_exp_from_a_configured_0_is_refused(dls):
    learn = awd_lstm_learner(dls, {**SMALL, 'embed_p':0.})
    cb = AnnealEmbedP(end=.1, sched=SchedExp)
    with pytest.raises(ValueError, match=r"SchedExp\(0.0, 0.1\)"): learn.fit(1, cbs=cb)

def test_lr_find_spends_no_epochs(learn):
    cb,n = AnnealEmbedP(.5, .05, epochs=2),len(learn.dls.train)
    learn.add_cb(cb)
    learn.lr_find(num_it=5, show_plot=False)
    learn.fit(1)
    np.testing.assert_allclose(applied(learn), [f(i/n/2) for i in range(n)], atol=1e-9)
    learn.lr_find(num_it=5, show_plot=False)
    learn.fit(1)
    np.testing.assert_allclose(applied(learn), [f((1+i/n)/2) for i in range(n)], atol=1e-9)

def test_lr_find_between_a_crash_and_start_epoch(learn):
    cb,n = AnnealEmbedP(.5, .05, epochs=3),len(learn.dls.train)
    learn.add_cb(cb)
    with pytest.raises(RuntimeError): learn.fit(3, cbs=Stop(n+5, RuntimeError))
    learn.lr_find(num_it=10, show_plot=False)
    learn.fit(3, start_epoch=1)
    np.testing.assert_allclose(applied(learn), plan(n, 3, start=1), atol=1e-9)

class Inner(Callback):
    "Validates or predicts inside an epoch, and puts back the counts that fastai sets to 0 then"
    order,run_valid = 80,False
    def __init__(self, at, how): self.at,self.how = at,how
    def after_batch(self):
        if self.train_iter!=self.at: return
        kept = {k:getattr(self.learn, k) for k in ('pct_train','train_iter','epoch','n_iter','dl','iter','xb','yb')}
        metric_names = self.recorder.metric_names
        self.how(self.learn)
        assert self.recorder.metric_names==metric_names
        for k,v in kept.items(): setattr(self.learn, k, v)
        self.learn.training = True
        self.model.train()

INNER = dict(validate=lambda l: l.validate(), get_preds=lambda l: l.get_preds(reorder=False))

@pytest.mark.parametrize('epochs', [None, 2, 4])
@pytest.mark.parametrize('how', INNER.values(), ids=INNER)
def test_a_validation_inside_an_epoch_counts_nothing_twice(learn, epochs, how):
    n,seen = len(learn.dls.train),[]
    learn.fit(2, cbs=[AnnealEmbedP(.5, .05, epochs=epochs), Watch(seen), Inner(5, how)])
    np.testing.assert_allclose(seen, [f(i/n/(epochs or 2)) for i in range(2*n)], atol=1e-9)
    assert applied(learn)==seen

@pytest.mark.parametrize('how', INNER.values(), ids=INNER)
def test_no_refusal_in_validate(learn, how):
    learn.add_cbs([AnnealEmbedP(.5, .4), AnnealEmbedP(.1, 0)])             # two of one attribute,
    learn.add_cbs([DropoutScheduler({'drop_p':f}), AnnealEmbedP(sched=SchedExp)]) # none of an attribute, and to 0
    how(learn)
    assert learn.model[0].encoder_dp.embed_p==awd_lstm_lm_config['embed_p']

class SkipFit(Callback):
    def before_fit(self): raise CancelFitException

@pytest.mark.parametrize('order', [-20, 51, 55, 70])
@pytest.mark.parametrize('cb', [partial(AnnealEmbedP, .5, .05), partial(AnnealDropMult, 1, 0, epochs=2),
                                partial(DropoutScheduler, {'p':f})])
def test_a_fit_that_is_cancelled_before_it_begins(learn, cb, order):
    learn.fit_one_cycle(1, cbs=cb())
    old,skip = {k:list(v) for k,v in learn.recorder.hps.items()},SkipFit()
    skip.order = order
    learn.fit(1, cbs=[ParamScheduler({'lr':SchedNo(1, 1)}), cb(), skip])
    assert learn.recorder.hps==old if order<51 else not any(learn.recorder.hps.values())

def test_after_fit_without_a_fit(learn):
    learn.add_cbs([AnnealEmbedP(.5, .05), AnnealDropMult(1, 0)])
    learn('after_fit')

# Configured values go where the module goes

COPIES = dict(deepcopy=copy.deepcopy, cloudpickle=lambda o: cloudpickle.loads(cloudpickle.dumps(o)))

@pytest.mark.parametrize('how', COPIES.values(), ids=COPIES)
def test_a_copied_learner_knows_what_was_configured(learn, how):
    learn.add_cb(AnnealDropMult(1, .5))
    learn.fit(1)
    new = how(learn)
    new.fit(1)
    assert applied(new, 'drop_mult')[0]==1 and new.model[0].encoder_dp.embed_p==learn.model[0].encoder_dp.embed_p < .02
    assert _base_p(new.model[0].encoder_dp, 'embed_p')==.02

def test_a_loaded_learner_knows_what_was_configured(learn):
    learn.fit(1, cbs=AnnealEmbedP(end=0))
    learn.save('model')
    learn.load('model')
    learn.fit(1, cbs=AnnealEmbedP(end=0))
    assert applied(learn)[0]==.02

class Break(Callback):
    order,run_valid,at = 70,False,7 # `at` in the class: a checkpoint does not restore it
    def before_batch(self):
        if self.train_iter==self.at: raise RuntimeError('broken off')

def test_a_resumed_fit_knows_what_was_configured(dls, tmp_path, monkeypatch):
    def fit(state):
        learn = awd_lstm_learner(dls, SMALL, path=tmp_path)
        learn.fit(1, cbs=[AnnealDropMult(1, .5), Checkpoint(tmp_path, 3, state), Break()])
        return learn
    with pytest.raises(RuntimeError, match='broken off'): fit(None)
    monkeypatch.setattr(Break, 'at', None)
    learn,n = fit(last_checkpoint(tmp_path)),len(dls.train)
    np.testing.assert_allclose(applied(learn, 'drop_mult'), [SchedCos(1, .5)(i/n) for i in range(n)])
    assert _base_p(learn.model[0].encoder_dp, 'embed_p')==.02

# What a batch costs the device

class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    "The operations of torch inside"
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})

@pytest.mark.parametrize('cb', [AnnealEmbedP(.5, .05), AnnealEmbedP(end=0, epochs=3), AnnealDropMult(1, 0)])
def test_no_value_is_read_and_nothing_moved(learn, cb):
    class Count(Callback):
        run_valid,order = False,1000
        def before_fit(self): self.ops = []
        def before_batch(self):
            with Ops() as o:
                cb('before_batch')
                cb('after_batch')
            self.ops += o.names
    count = Count()
    learn.fit(1, cbs=[cb, count])
    assert set(count.ops) <= {'aten.fill_.Scalar'}
