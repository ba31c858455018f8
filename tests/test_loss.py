"""Pins the training step without logits: fastai's loss and gradients, what turns it off, what stays as it was, torch without the function."""
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile
from fastai.text.all import (AWD_LSTM as FastaiAWD_LSTM, Callback, CancelFitException, CrossEntropyLossFlat, Perplexity, accuracy,
                             awd_lstm_lm_config, language_model_learner, load_learner, set_seed)
from fastai_embdrop.anneal import AnnealEmbedP
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.loss import Decoder, Hidden, LMLoss, NoLogits, linear_loss, without_logits
from conftest import SMALL, small_dls

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
@given(st.integers(1, 5), st.integers(1, 300), st.integers(1, 9), st.integers(2, 1500), st.booleans(), st.integers(0, 2**31))
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
    assert isinstance(a.pred_kept, torch.Tensor) and isinstance(b.pred_kept, Hidden)
    assert b.loss_kept==pytest.approx(a.loss_kept, rel=1e-6)
    assert a.grads.keys()==b.grads.keys()
    for k in a.grads: torch.testing.assert_close(b.grads[k], a.grads[k], rtol=1e-4, atol=1e-6)

def test_the_penalties_on_activations_count(dls):
    assert one_step(dls, alpha=2., beta=1.)[0].loss_kept > one_step(dls, alpha=0., beta=0.)[0].loss_kept + 1e-3

def test_hidden_gives_the_logits_on_demand(dls):
    pred = one_step(dls)[0].pred_kept
    torch.testing.assert_close(LMLoss()(pred, y := torch.zeros(pred.x.shape[:2], dtype=torch.long)), LMLoss()(pred.logits(), y).as_subclass(torch.Tensor))

# What turns it off

class Reader(Callback): reads_pred = True

def sum_loss(pred, targ): return F.cross_entropy(pred.flatten(0, 1), targ.flatten(), reduction='sum')

@pytest.mark.parametrize('kwargs,cbs', [(dict(keep_logits=True), []), (dict(loss_func=sum_loss), []), (dict(loss_func=CrossEntropyLossFlat(label_smoothing=.1)), []),
                                        ({}, [Reader()])])
def test_switches_that_keep_the_logits(dls, kwargs, cbs):
    assert one_step(dls, cbs, **kwargs)[0].pred_kept.shape[-1]==len(dls.vocab)

def test_a_loss_func_that_is_assigned_gets_the_logits(dls):
    learn,step = awd_lstm_learner(dls, SMALL),OneStep()
    learn.loss_func = sum_loss
    learn.fit(1, cbs=step)
    assert step.pred_kept.shape[-1]==len(dls.vocab)

def test_training_metrics_get_the_logits(dls):
    learn = awd_lstm_learner(dls, SMALL, metrics=[accuracy, Perplexity()])
    learn.recorder.train_metrics = True
    learn.fit(1)
    assert len(learn.recorder.values[-1])==6 and 0 <= learn.recorder.values[-1][1] <= 1

def test_a_switch_holds_for_its_fit_alone(dls):
    learn,first,second = awd_lstm_learner(dls, SMALL),OneStep(),OneStep()
    learn.fit(1, cbs=[first, Reader()])
    learn.fit(1, cbs=second)
    assert isinstance(first.pred_kept, torch.Tensor) and isinstance(second.pred_kept, Hidden)

# What stays as it was

def test_validation_and_prediction_are_fastais(dls):
    learn = awd_lstm_learner(dls, SMALL, metrics=[accuracy, Perplexity()])
    learn.fit(1, cbs=AnnealEmbedP(.5, 0))
    loss,acc,_ = learn.validate()
    learn.loss_func = CrossEntropyLossFlat()
    assert learn.validate()[:2]==[loss,acc]
    preds,targs = learn.get_preds(reorder=False)
    assert preds.shape==(*targs.shape, len(dls.vocab))

def test_an_interrupt_in_the_forward_pass_leaves_a_model_with_logits(dls):
    learn = awd_lstm_learner(dls, SMALL)
    def stop(*_): raise KeyboardInterrupt
    handle = learn.model[0].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    handle.remove()
    x = torch.zeros(2, 3, dtype=torch.long)
    assert learn.model.eval()(x)[0].shape[-1]==len(dls.vocab)
    learn.fit(1)
    assert learn.model.train()(x)[0].shape[-1]==len(dls.vocab)

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
    learn,step = without_logits(language_model_learner(dls, FastaiAWD_LSTM, {**awd_lstm_lm_config, **SMALL}, pretrained=False)),OneStep()
    learn.fit(1, cbs=step)
    assert isinstance(step.pred_kept, Hidden) and isinstance(learn.model[1], Decoder)

@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf')
def test_a_compiled_model_trains_without_logits(dls):
    torch._dynamo.reset()
    learn,step = awd_lstm_learner(dls, SMALL),OneStep()
    learn.model.compile(backend='eager')
    learn.fit(1)
    learn.fit(1, cbs=step)
    assert isinstance(step.pred_kept, Hidden) and learn.validate()[0]>0

def test_autocast_casts_what_the_function_gets():
    lin,x,y = nn.Linear(8, 20),torch.randn(2, 3, 8),torch.zeros(2, 3, dtype=torch.long)
    with torch.autocast('cpu', torch.bfloat16): low = linear_loss(x, lin, y)
    assert low.dtype==torch.bfloat16 and linear_loss(x, lin, y).dtype==torch.float32
    torch.testing.assert_close(low.float(), linear_loss(x, lin, y), rtol=1e-2, atol=0)

def test_torch_without_the_function_says_so_and_holds_the_logits(dls, monkeypatch):
    monkeypatch.delattr(F, 'linear_cross_entropy')
    with pytest.warns(UserWarning, match='no F.linear_cross_entropy'): learn = awd_lstm_learner(dls, SMALL)
    step = OneStep()
    learn.fit(1, cbs=step)
    assert step.pred_kept.shape[-1]==len(dls.vocab) and not any(isinstance(cb, NoLogits) for cb in learn.cbs)

@pytest.mark.cuda
def test_low_precision_kernels_under_autocast():
    "The products of a bf16 step run as bf16 kernels on the card"
    lin,x,y = nn.Linear(256, 5000, device='cuda'),torch.randn(8, 128, 256, device='cuda'),torch.zeros(8, 128, dtype=torch.long, device='cuda')
    with profile(record_shapes=True) as prof, torch.autocast('cuda', torch.bfloat16): linear_loss(x, lin, y)
    products = [e for e in prof.events() if e.name.startswith('aten::') and 'mm' in e.name]
    assert products and any('bf16' in k.name.lower() or 'bfloat16' in k.name.lower() for e in products for k in e.kernels)
