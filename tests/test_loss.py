"""Pins the training step without logits: fastai's loss and gradients, in half precision too; what keeps the logits, and
the warning that says so; what stays as it was; torch without the function."""
import contextlib, copy, warnings
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune
from fastai.text.all import (AWD_LSTM as FastaiAWD_LSTM, ActivationStats, Callback, CancelBatchException,
                             CancelFitException, CrossEntropyLossFlat, MixedPrecision, Perplexity, accuracy,
                             awd_lstm_lm_config, language_model_learner, load_learner, set_seed)
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.loss import LazyLM, LazyLogits, LMLoss, NoLogits, _why_not, linear_loss, without_logits
from conftest import SMALL, compiling, small_dls

class OneStep(Callback):
    "Stop after the backward pass of one batch and keep what it made"
    order = 90
    def before_step(self):
        self.pred_kept,self.loss_kept = self.pred,self.loss_grad.item()
        self.grads = {n:p.grad.clone() for n,p in self.model.named_parameters()}
        raise CancelFitException

def one_step(dls, cbs=(), **kwargs):
    "The state of one training batch, and the `Learner`"
    set_seed(3)
    learn,step = awd_lstm_learner(dls, SMALL, **kwargs),OneStep()
    set_seed(4)
    learn.fit(1, cbs=[step, *cbs])
    return step,learn

@settings(deadline=None, max_examples=25, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.integers(2, 1500), st.booleans(),
       st.integers(0, 2**31))
def test_loss_and_gradients_of_the_two_steps_in_float64(b, t, d, v, bias, seed):
    torch.manual_seed(seed)
    x,y,lin = torch.randn(b, t, d, requires_grad=True),torch.randint(v, (b,t)),nn.Linear(d, v, bias)
    x2,lin2 = x.detach().double().requires_grad_(),copy.deepcopy(lin).double()
    loss,ref = linear_loss(x, lin, y),F.cross_entropy(lin2(x2).flatten(0, 1), y.flatten())
    loss.backward(); ref.backward()
    torch.testing.assert_close(loss.double(), ref, rtol=1e-5, atol=1e-6)
    for got,want in [(x.grad, x2.grad), *((p.grad, p2.grad) for p,p2 in zip(lin.parameters(), lin2.parameters()))]:
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('reg', [dict(alpha=2., beta=1.), dict(alpha=0., beta=0.)])
def test_a_batch_has_the_loss_and_gradients_of_one_with_logits(dls, reg):
    (a,_),(b,_) = (one_step(dls, keep_logits=k, **reg) for k in (True,False))
    assert isinstance(a.pred_kept, torch.Tensor) and isinstance(b.pred_kept, LazyLogits)
    assert b.loss_kept==pytest.approx(a.loss_kept, rel=1e-6)
    assert a.grads.keys()==b.grads.keys()
    for k in a.grads: torch.testing.assert_close(b.grads[k], a.grads[k], rtol=1e-4, atol=1e-6)

def test_the_penalties_on_activations_count(dls):
    assert one_step(dls, alpha=2., beta=1.)[0].loss_kept > one_step(dls, alpha=0., beta=0.)[0].loss_kept + 1e-3

def test_lazy_logits_are_made_on_demand(dls):
    pred = one_step(dls)[0].pred_kept
    y = torch.zeros(pred.x.shape[:2], dtype=torch.long)
    torch.testing.assert_close(LMLoss()(pred, y), LMLoss()(pred.logits(), y).as_subclass(torch.Tensor))

def test_targets_of_minus_100_are_left_out():
    torch.manual_seed(0)
    lin,x,y = nn.Linear(8, 20),torch.randn(2, 700, 8),torch.randint(20, (2, 700))
    y[0,:600] = -100
    want = F.cross_entropy(lin(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(linear_loss(x, lin, y), want)
    with torch.autocast('cpu', torch.bfloat16): low = linear_loss(x, lin, y)
    torch.testing.assert_close(low, want, rtol=1e-3, atol=0)

# Half precision

def half_precision_grads(loss, x, lin, y, dtype, scale):
    "Value and gradients of `loss`, which autocast computes in `dtype` and a `GradScaler` multiplies by `scale`"
    x,lin = x.clone().requires_grad_(),copy.deepcopy(lin)
    with torch.autocast('cpu', dtype): value = loss(x, lin, y)
    (value*scale).backward()
    return value.item(),[p.grad.double()/scale for p in (x, *lin.parameters())]

def usual(x, lin, y): return F.cross_entropy(lin(x).flatten(0, -2), y.flatten())

@pytest.mark.parametrize('dtype,scale', [(torch.bfloat16, 1.), (torch.float16, 65536.)])
@pytest.mark.parametrize('tokens,words', [(8192, 700), pytest.param(2048, 20_000, marks=pytest.mark.long),
                                          pytest.param(4608, 60_000, marks=pytest.mark.long)])
def test_half_precision_loses_no_more_than_with_logits(tokens, words, dtype, scale):
    "Against float64; the scale is GradScaler's first. The chunks are the same on every device"
    torch.manual_seed(0)
    x,lin,y = torch.randn(1, tokens, 24)*.6,nn.Linear(24, words),torch.randint(words, (1, tokens))
    nn.init.uniform_(lin.weight, -.1, .1); nn.init.zeros_(lin.bias)
    x64,lin64 = x.double().requires_grad_(),copy.deepcopy(lin).double()
    right = usual(x64, lin64, y)
    right.backward()
    value,ours = half_precision_grads(linear_loss, x, lin, y, dtype, scale)
    _,theirs = half_precision_grads(usual, x, lin, y, dtype, scale)
    assert value==pytest.approx(right.item(), rel=1e-3)
    for a,b,ref in zip(ours, theirs, (x64.grad, *(p.grad for p in lin64.parameters()))):
        assert a.isfinite().all()
        assert (a-ref).norm() <= 1.5*(b-ref).norm()
    lost = theirs[1][ours[1]==0]
    assert lost.norm() <= 1e-6*theirs[1].norm()

def test_every_call_has_chunks_of_512_and_no_other_option(monkeypatch):
    "torch's own choice on a GPU is 16 rows; its other options differ between torch 2.13 and 2.14"
    seen = []
    function = F.linear_cross_entropy
    def spy(*args, options, **kwargs):
        seen.append(options)
        return function(*args, options=options, **kwargs)
    monkeypatch.setattr(F, 'linear_cross_entropy', spy)
    linear_loss(torch.randn(2, 3, 8), nn.Linear(8, 20), torch.zeros(2, 3, dtype=torch.long))
    assert seen==[nn.LinearCrossEntropyOptions(batch_chunk_size=512)]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_computes_the_products_in_its_dtype(monkeypatch, dtype):
    seen,linear = [],F.linear
    monkeypatch.setattr(F, 'linear', lambda x, w: seen.append((len(x), x.dtype, w.dtype)) or linear(x, w))
    lin,x,y = nn.Linear(8, 20),torch.randn(2, 300, 8),torch.zeros(2, 300, dtype=torch.long)
    with torch.autocast('cpu', dtype): linear_loss(x, lin, y).backward()
    assert seen==[(n, dtype, dtype) for n in (512, 88, 88, 512)], 'in the backward pass again'

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_a_float32_loss(dtype):
    torch.manual_seed(0)
    lin,x,y = nn.Linear(8, 20).to(dtype),torch.randn(2, 600, 8, dtype=dtype),torch.randint(20, (2, 600))
    loss = linear_loss(x, lin, y)
    assert loss.dtype==torch.float32
    torch.testing.assert_close(loss, usual(x.float(), copy.deepcopy(lin).float(), y), rtol=1e-3, atol=0)

@pytest.mark.filterwarnings('ignore:torch.cuda.amp.GradScaler is enabled')
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_fastais_mixed_precision_takes_lazy_logits(dls, mode):
    "Its callback casts `learn.pred`"
    assert isinstance(one_step(dls, [MixedPrecision(mode)])[0].pred_kept, LazyLogits)

# What turns it off

class Reader(Callback): reads_pred = True

def sum_loss(pred, targ): return F.cross_entropy(pred.flatten(0, 1), targ.flatten(), reduction='sum')

@pytest.mark.parametrize('kwargs,cbs', [(dict(keep_logits=True), []), (dict(loss_func=sum_loss), []), ({}, [Reader()]),
                                        (dict(loss_func=CrossEntropyLossFlat(label_smoothing=.1)), [])])
def test_switches_that_keep_the_logits(dls, kwargs, cbs):
    assert one_step(dls, cbs, **kwargs)[0].pred_kept.shape[-1]==len(dls.vocab)

class ReadsPred(Callback): "fastai makes a callback an attribute of its Learner: `learn.reads_pred`"

def test_the_name_of_a_callback_says_nothing(dls):
    assert isinstance(one_step(dls, [ReadsPred()])[0].pred_kept, LazyLogits)

def with_warning(learn, match, **kwargs):
    "What a training batch of `learn` left, with logits and one warning for the whole fit"
    step = OneStep()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn.fit(1, **kwargs)
        learn.fit(1, cbs=step)
    said = [str(w.message) for w in seen if 'logits are kept' in str(w.message)]
    assert len(said)==1 and match in said[0]
    assert step.pred_kept.shape[-1]==len(learn.dls.vocab)
    return step

OPTIONS = [dict(label_smoothing=.3), dict(ignore_index=9), dict(reduction='sum'), 'weight']

@pytest.mark.parametrize('option', OPTIONS, ids=str)
def test_options_of_the_loss_count(dls, option):
    options = dict(weight=torch.linspace(.1, 1, len(dls.vocab))) if option=='weight' else option
    want = one_step(dls, loss_func=CrossEntropyLossFlat(**options))[0]
    set_seed(3)
    learn,step = awd_lstm_learner(dls, SMALL),OneStep()
    learn.loss_func = LMLoss(**options)
    set_seed(4)
    with pytest.warns(UserWarning, match='the loss has options'): learn.fit(1, cbs=step)
    assert step.loss_kept==pytest.approx(want.loss_kept, rel=1e-5)

@pytest.mark.parametrize('loss,name', [(sum_loss, 'sum_loss'), (CrossEntropyLossFlat(), 'CrossEntropyLossFlat')])
def test_a_loss_func_that_is_assigned_gets_the_logits(dls, loss, name):
    learn = awd_lstm_learner(dls, SMALL)
    learn.loss_func = loss
    with_warning(learn, name)

class Swap(Callback):
    "Swap the loss at one event"
    def __init__(self, event): setattr(self, event, self._swap)
    def _swap(self): self.learn.loss_func = sum_loss

@pytest.mark.parametrize('event', ['before_train', 'before_batch'])
def test_a_loss_func_swapped_during_a_fit_gets_the_logits(dls, event):
    (a,_) = one_step(dls, [Swap(event)], keep_logits=True)
    with pytest.warns(UserWarning, match='sum_loss'): (b,_) = one_step(dls, [Swap(event)])
    assert b.pred_kept.shape[-1]==len(dls.vocab) and b.loss_kept==pytest.approx(a.loss_kept, rel=1e-6)

def test_a_learner_with_another_loss_stays_as_it_was(dls):
    loss = CrossEntropyLossFlat(label_smoothing=.3)
    learn = awd_lstm_learner(dls, SMALL, loss_func=loss)
    with pytest.warns(UserWarning, match='the loss is.*CrossEntropyLoss'): assert without_logits(learn) is learn
    assert learn.loss_func is loss and not learn.cbs.argfirst(lambda cb: isinstance(cb, NoLogits))

def test_twice_is_once(dls):
    learn = without_logits(awd_lstm_learner(dls, SMALL))
    assert sum(isinstance(cb, NoLogits) for cb in learn.cbs)==1
    assert isinstance(one_step(dls)[0].pred_kept, LazyLogits)

class Lora(nn.Module):
    "A decoder with an adapter, and with the attributes of a linear layer"
    def __init__(self, lin):
        super().__init__()
        self.lin,self.weight,self.bias = lin,lin.weight,lin.bias
        self.a,self.b = nn.Parameter(torch.randn(lin.in_features, 2)),nn.Parameter(torch.zeros(2, lin.out_features))
    def forward(self, x): return self.lin(x) + x@self.a@self.b

class OtherLinear(nn.Linear):
    def forward(self, x): return super().forward(x)*2

def adapter(head): head.decoder = Lora(head.decoder)
def subclass(head): head.decoder.__class__ = OtherLinear
def hook(head): head.decoder.register_forward_hook(lambda *_: None)
def hook_on_the_head(head): head.register_forward_hook(lambda *_: None)
def backward_hook(head): head.decoder.register_full_backward_hook(lambda *_: None)
def parametrized(head): parametrizations.weight_norm(head.decoder)
def pruned(head): prune.l1_unstructured(head.decoder, 'bias', .1)
def own_forward(head): head.decoder.forward = lambda x: 2*F.linear(x, head.decoder.weight, head.decoder.bias)

CHANGES = {adapter:'Lora', subclass:'OtherLinear', parametrized:'ParametrizedLinear', hook:'hooks', pruned:'hooks',
           hook_on_the_head:'hooks', backward_hook:'hooks', own_forward:'hooks'}

def agrees_with_logits(dls, change, match):
    "After `change(learn)`, a warning says `match`, and a batch is as with `keep_logits=True`"
    steps = []
    for keep in True,False:
        set_seed(3)
        learn,step = awd_lstm_learner(dls, SMALL, keep_logits=keep),OneStep()
        learn.splitter = lambda m: [list(m.parameters())]
        undo = change(learn)
        said = contextlib.nullcontext() if keep else pytest.warns(UserWarning, match=match)
        set_seed(4)
        try:
            with said: learn.fit(1, cbs=step)
        finally:
            if undo: undo.remove()
        steps.append(step)
    a,b = steps
    assert b.loss_kept==pytest.approx(a.loss_kept, rel=1e-6)
    for k in a.grads: torch.testing.assert_close(b.grads[k], a.grads[k])

@pytest.mark.parametrize('change,match', CHANGES.items(), ids=lambda o: getattr(o, '__name__', None))
def test_a_changed_decoder_is_called(dls, change, match):
    "Loss and gradients are then those of a Learner that keeps its logits"
    agrees_with_logits(dls, lambda learn: change(learn.model[1]), match)

def cooled(res):
    "What a language model returns, with half the logits"
    logits,*hidden = res
    return logits/2,*hidden

class Cooled(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm
    def forward(self, x): return cooled(self.lm(x))
    def reset(self): self.lm.reset()

def halved(grads): return tuple(g/2 for g in grads)

def wrapped(learn):
    learn.create_opt()
    learn.model = Cooled(learn.model)
def forward_of_the_model(learn):
    usual = learn.model.forward
    learn.model.forward = lambda x: cooled(usual(x))
def backward_pre_hook_on_the_model(learn): learn.model.register_full_backward_pre_hook(lambda m, grads: halved(grads))
def backward_hook_on_the_model(learn): learn.model.register_full_backward_hook(lambda *_: None)
def global_hook(learn):
    def halve(m, inp, out): return out/2 if type(m) is nn.Linear else out
    return register_module_forward_hook(halve)
def global_pre_hook(learn):
    def halve(m, inp): return halved(inp) if type(m) is nn.Linear else inp
    return register_module_forward_pre_hook(halve)

AROUND = {wrapped:'inside a Cooled', forward_of_the_model:'forward of its own', global_hook:'all modules',
          global_pre_hook:'all modules', backward_pre_hook_on_the_model:'model has hooks',
          backward_hook_on_the_model:'model has hooks'}

@pytest.mark.filterwarnings('ignore:Full backward hook is firing') # as word ids have no gradient
@pytest.mark.parametrize('change,match', AROUND.items(), ids=lambda o: getattr(o, '__name__', None))
def test_what_is_around_the_decoder_gets_the_logits(dls, change, match): agrees_with_logits(dls, change, match)

def test_parallel_and_compiled_models_leave_out_the_logits():
    lm = without_logits(awd_lstm_learner(small_dls(), SMALL)).model
    for model in lm,nn.DataParallel(lm),torch.compile(lm),nn.DataParallel(torch.compile(lm)):
        assert _why_not(model, LMLoss()) is None
    assert _why_not(nn.DataParallel(Cooled(lm)), LMLoss())=='the model is inside a Cooled'

def test_hooks_of_a_data_parallel_model_keep_the_logits():
    model = nn.DataParallel(without_logits(awd_lstm_learner(small_dls(), SMALL)).model)
    model.register_full_backward_pre_hook(lambda *_: None)
    assert _why_not(model, LMLoss())=='the model has hooks'

def test_accelerates_mixed_precision_leaves_out_the_logits(dls):
    "It replaces `forward`, once for each fit in `distrib_ctx`"
    accelerate = pytest.importorskip('accelerate', reason='accelerate is needed for several processes alone')
    learn = awd_lstm_learner(dls, SMALL)
    for _ in range(2):
        accelerator = accelerate.Accelerator(mixed_precision='bf16', cpu=True)
        accelerator.prepare_model(learn.model)
        assert 'forward' in vars(learn.model) and _why_not(learn.model, LMLoss()) is None
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    step = OneStep()
    learn.fit(1, cbs=step)
    assert isinstance(step.pred_kept, LazyLogits)

def test_accelerates_mixed_precision_hides_no_other_forward(dls):
    accelerate = pytest.importorskip('accelerate', reason='accelerate is needed for several processes alone')
    learn = awd_lstm_learner(dls, SMALL)
    forward_of_the_model(learn)
    accelerate.Accelerator(mixed_precision='bf16', cpu=True).prepare_model(learn.model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert 'forward of its own' in _why_not(learn.model, LMLoss())

def test_activation_stats_see_the_decoder(dls):
    learn = awd_lstm_learner(dls, SMALL)
    stats = ActivationStats(modules=[learn.model[1].decoder])
    with pytest.warns(UserWarning, match='hooks'): learn.fit(1, cbs=stats)
    assert len(stats.stats)==len(dls.train)

def test_a_warning_comes_once(dls):
    learn = awd_lstm_learner(dls, SMALL)
    hook(learn.model[1])
    with_warning(learn, 'hooks')

def test_float64_trains_with_logits(dls):
    learn = awd_lstm_learner(dls, SMALL)
    learn.model.double()
    with_warning(learn, 'float64')

def test_find_unused_parameters_keeps_the_logits(dls):
    learn = awd_lstm_learner(dls, SMALL)
    learn.model.find_unused_parameters = True # as DistributedDataParallel has it
    with_warning(learn, 'find_unused_parameters')

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_batch'])
def test_who_reads_the_predictions_is_told_what_to_do(dls, event):
    "At the default order too"
    class Reads(Callback):
        run_valid = False
    setattr(Reads, event, lambda self: self.pred.argmax(-1))
    with pytest.raises(AttributeError, match='keep_logits=True'): awd_lstm_learner(dls, SMALL).fit(1, cbs=Reads())
    awd_lstm_learner(dls, SMALL, keep_logits=True).fit(1, cbs=Reads())

READS = [lambda p: p.shape, lambda p: torch.softmax(p, -1), lambda p: p[0], lambda p: p+1, lambda p: p>0, len, list,
         lambda p: torch.ones(1)*p, lambda p: torch.ones(1)==p, lambda p: accuracy(p, torch.ones(1))]

@pytest.mark.parametrize('read', READS)
def test_lazy_logits_are_no_tensor(read):
    pred = LazyLogits(torch.ones(2, 3, 4), nn.Linear(4, 5))
    with pytest.raises((AttributeError, RuntimeError), match='keep_logits=True'): read(pred)

# What stays as it was

def test_validation_and_prediction_are_fastais(dls):
    learn = awd_lstm_learner(dls, SMALL, metrics=[accuracy, Perplexity()])
    learn.fit(1, cbs=AnnealEmbedP(.5, 0))
    loss,acc,_ = learn.validate()
    learn.loss_func = CrossEntropyLossFlat()
    assert learn.validate()[:2]==[loss,acc]
    preds,targs = learn.get_preds(reorder=False)
    assert preds.shape==(*targs.shape, len(dls.vocab))

@pytest.mark.parametrize('error', [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_the_forward_pass_leaves_a_model_with_logits(dls, error):
    learn = awd_lstm_learner(dls, SMALL)
    def stop(*_): raise error
    handle = learn.model[0].register_forward_hook(stop)
    with pytest.raises(error): learn.fit(1)
    handle.remove()
    x = torch.zeros(2, 3, dtype=torch.long)
    assert learn.model.training and learn.model(x)[0].shape[-1]==len(dls.vocab)
    assert learn.model.eval()(x)[0].shape[-1]==len(dls.vocab)
    learn.fit(1)
    assert learn.model.train()(x)[0].shape[-1]==len(dls.vocab)

def test_a_cancelled_batch_leaves_a_model_with_logits(dls):
    class Cancel(Callback):
        def before_batch(self): raise CancelBatchException
    learn = awd_lstm_learner(dls, SMALL)
    learn.fit(1, cbs=Cancel())
    assert learn.model.train()(torch.zeros(2, 3, dtype=torch.long))[0].shape[-1]==len(dls.vocab)

def test_without_the_callback_fastai_trains(dls):
    learn,step = awd_lstm_learner(dls, SMALL),OneStep()
    learn.fit(1)
    learn.remove_cb(NoLogits)
    learn.loss_func = CrossEntropyLossFlat()
    learn.fit(1, cbs=step)
    assert step.pred_kept.shape[-1]==len(dls.vocab)

def test_state_dict_export_and_copy(dls, tmp_path):
    learn = awd_lstm_learner(dls, SMALL, path=tmp_path)
    learn.fit(1)
    assert list(learn.model.state_dict())==list(awd_lstm_learner(dls, SMALL, keep_logits=True).model.state_dict())
    learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    x = torch.zeros(2, 3, dtype=torch.long)
    for model in again.model,copy.deepcopy(learn.model):
        learn.model.reset(); model.reset()
        assert torch.equal(model.eval()(x)[0], learn.model.eval()(x)[0])

def test_fastais_own_model_trains_without_logits(dls):
    set_seed(0)
    learn = language_model_learner(dls, FastaiAWD_LSTM, {**awd_lstm_lm_config, **SMALL}, pretrained=False)
    step = OneStep()
    without_logits(learn).fit(1, cbs=step)
    assert isinstance(step.pred_kept, LazyLogits) and isinstance(learn.model, LazyLM)

@compiling
def test_a_compiled_model_trains_without_logits(dls):
    torch._dynamo.reset()
    learn,step = awd_lstm_learner(dls, SMALL),OneStep()
    learn.model.compile(backend='eager')
    learn.fit(1)
    learn.fit(1, cbs=step)
    assert isinstance(step.pred_kept, LazyLogits) and learn.validate()[0]>0

def test_torch_without_the_function_says_so_and_holds_the_logits(dls, monkeypatch):
    monkeypatch.delattr(F, 'linear_cross_entropy')
    with pytest.warns(UserWarning, match='no F.linear_cross_entropy'): learn = awd_lstm_learner(dls, SMALL)
    step = OneStep()
    learn.fit(1, cbs=step)
    assert step.pred_kept.shape[-1]==len(dls.vocab) and not any(isinstance(cb, NoLogits) for cb in learn.cbs)
