"""Pins what our AWD-LSTM must do at least as well as fastai's: quantization, `summary`, loading on `meta`, autocast, a
decoder that drops everything, held masks. It also leaves Python's record of warnings alone."""
import copy, inspect, pickle, re, warnings
import pytest, torch
from torch import nn
from fastai.text.all import awd_lstm_clas_config as fastai_clas_config, get_text_classifier, language_model_learner
from fastai.text.models import awdlstm as fastai_awdlstm
from fastai_embdrop.awdlstm import (AWD_LSTM, RNNDropout, WeightDropout, awd_lstm_learner, awd_lstm_lm,
                                    awd_lstm_lm_config)
from conftest import SMALL

X = torch.arange(10).reshape(2, 5)

# The recurrent weight has two owners

QUIET = pytest.mark.filterwarnings(*(f'ignore::{o}Warning' for o in ('Deprecation', 'Future', 'User'))) # of torch.ao

@QUIET
@pytest.mark.parametrize('inplace', [True, False])
def test_quantized_lstms_agree_with_the_model(inplace):
    "The usual way to deploy an LSTM on a CPU; the weights of the decoder and of the embedding stay"
    model = awd_lstm_lm(50, SMALL).eval()
    want = model(X)[0]
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8, inplace=inplace)
    quantized.reset()
    got = quantized(X)[0]
    assert not isinstance(quantized[0].rnns[0].module, nn.LSTM)
    assert 0 < (got-want).abs().max() < .05*want.abs().max()

@QUIET
def test_quantization_sees_the_weights_that_were_loaded():
    source,model = AWD_LSTM(50, 8, 12, 2).eval(),AWD_LSTM(50, 8, 12, 2).eval()
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    q1,q2 = (torch.ao.quantization.quantize_dynamic(m, {nn.LSTM}, dtype=torch.qint8) for m in (source,model))
    assert torch.equal(q1(X), q2(X))

def shared(m): return m.module.weight_hh_l0.data_ptr()==m.weight_hh_l0_raw.data_ptr()

def change_nothing(m): return m
def assign(m):
    m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    return m
def pickled(m): return pickle.loads(pickle.dumps(m))
def to_empty(m): return m.to('meta').to_empty(device='cpu')

@pytest.mark.parametrize('change', [change_nothing, copy.deepcopy, pickled, assign, to_empty, torch.nn.Module.double])
def test_the_lstm_shows_the_raw_weight(change):
    m = change(WeightDropout(nn.LSTM(3, 4, bidirectional=True), .5))
    assert shared(m)
    assert m.module.weight_hh_l0.dtype==m.module.weight_hh_l0_reverse.dtype
    assert len(list(m.parameters()))==8 and 'module.weight_hh_l0' not in m.state_dict()

def test_the_lstm_shows_the_weight_of_its_last_call():
    "As fastai's does, whose notebook reads it; in evaluation it is the raw weight at once, which quantization reads"
    m = WeightDropout(nn.LSTM(3, 4), .5)
    m(torch.randn(2, 5, 3))[0].sum().backward()
    shown,raw = m.module.weight_hh_l0,m.weight_hh_l0_raw
    dropped = shown==0
    assert 0 < dropped.sum() < dropped.numel()
    assert (raw.grad[dropped]==0).all() and torch.equal(shown[~dropped], 2*raw[~dropped])
    assert not shown.requires_grad, 'or the module could not be copied'
    assert shared(m.eval())

def test_the_lstm_keeps_no_tensor_of_a_transform():
    "Such a tensor is dead after the transform"
    m,x = WeightDropout(nn.LSTM(3, 4), .5),torch.randn(2, 5, 3)
    def loss(params): return torch.func.functional_call(m, params, (x,))[0].sum()
    grads = torch.func.grad(loss)(dict(m.named_parameters()))
    assert grads.keys()==dict(m.named_parameters()).keys()
    assert shared(m)

def test_reset_is_fastais():
    m = WeightDropout(nn.LSTM(3, 4), .5)
    m.module.weight_hh_l0 = torch.zeros(16, 4)
    m.reset()
    assert shared(m)

# What counts and what warns

def test_summary_counts_the_embedding_once(dls):
    learn = awd_lstm_learner(dls, SMALL)
    summary = str(learn.summary())
    lines = [o.split() for o in summary.split('\n') if o.startswith('Embedding ')]
    assert [int(o[1]) for o in lines]==[learn.model[0].encoder.weight.numel()]
    decoder = sum(p.numel() for p in learn.model[1].parameters()) # tied, but fastai counts it
    total = re.search(r'Total params: ([\d,]+)', summary)[1].replace(',', '')
    assert int(total)==learn.model[0].encoder.weight.numel()+decoder, 'fastai counts no LSTM'

def test_no_module_is_left_out_by_children():
    "`train`, `apply` and `.to` go by `children`"
    m = AWD_LSTM(20, 6, 8, 2)
    seen = []
    m.apply(seen.append)
    assert set(seen)==set(m.modules()) and len(seen)==len(set(seen))
    m.encoder_dp = nn.Identity()
    seen.clear()
    m.apply(seen.append)
    assert m.encoder in seen

def test_a_warning_of_others_comes_once():
    "As long as nobody changes the filters, Python remembers which warnings it has shown"
    model,shown = AWD_LSTM(20, 6, 8, 2),[]
    code = compile("warnings.warn('shown once by default')", 'elsewhere', 'exec')
    space = dict(warnings=warnings)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.showwarning = lambda *args, **kwargs: shown.append(args)
        for _ in range(5):
            model(X)
            exec(code, space)
    assert len(shown)==1

# Dropouts at 1

def lm(dls, config): return awd_lstm_lm(len(dls.vocab), config)
def learner(dls, config): return awd_lstm_learner(dls, config, keep_logits=True).model
def fastais_learner(dls, config):
    learn = language_model_learner(dls, AWD_LSTM, config={**awd_lstm_lm_config, **config}, pretrained=False)
    learn.create_opt() # as `fit` does
    return learn.model

@pytest.mark.parametrize('make', [lm, learner, fastais_learner])
def test_a_decoder_that_drops_everything_is_finite(dls, make):
    model = make(dls, {**SMALL, 'output_p':1.}).train()
    logits = model(X)[0]
    assert type(model[1].output_dp) is RNNDropout and model[1].output_dp.p==1
    torch.testing.assert_close(logits, model[1].decoder.bias.expand_as(logits))

# Autocast

@pytest.mark.parametrize('kwargs', [{}, dict(bidirectional=True)])
def test_bfloat16_autocast_leaves_the_lstm_in_float32(kwargs):
    "cuDNN's wrapper would take float16 on a GPU"
    m = WeightDropout(nn.LSTM(3, 4, batch_first=True, **kwargs), .5).eval()
    x = torch.randn(2, 5, 3)
    want,(h,c) = m(x)
    with torch.autocast('cpu', torch.bfloat16):
        for got,hx in (m(x), m(x, None)):
            assert torch.equal(got, want) and got.dtype==hx[0].dtype==torch.float32
        again,_ = m(x.bfloat16(), (h.bfloat16(), c.bfloat16()))
    assert again.dtype==torch.float32
    torch.testing.assert_close(again, m(x, (h, c))[0], rtol=0, atol=.02)

def test_bfloat16_autocast_trains():
    m = awd_lstm_lm(50, SMALL).train()
    with torch.autocast('cpu', torch.bfloat16): m(X)[0].float().logsumexp(-1).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype==torch.float32 for p in m.parameters())

def test_float16_autocast_is_left_to_autocast(monkeypatch):
    "Its loss is scaled"
    m,seen = WeightDropout(nn.LSTM(3, 4), .5),[]
    monkeypatch.setattr(m.module, 'forward', lambda x, hx: seen.append(torch.is_autocast_enabled('cpu')))
    for dtype in torch.float16,torch.bfloat16:
        with torch.autocast('cpu', dtype): m(torch.randn(2, 5, 3))
    assert seen==[True, False]

# Signatures and defaults

def test_the_learner_names_all_its_parameters():
    names = inspect.signature(awd_lstm_learner).parameters
    assert {'config','alpha','beta','cbs','metrics','path','backwards','pretrained_fnames'} <= set(names)
    assert not {'kwargs','arch','splitter'} & set(names)

def test_held_masks_are_one_per_batch_or_one_per_document():
    def masks(**config):
        torch.manual_seed(0)
        config = {**SMALL, 'n_layers':1, 'embed_p':.5, **config}
        encoder,seen = get_text_classifier(AWD_LSTM, 40, 2, seq_len=12, config=config)[0].train(),[]
        encoder.module.encoder_dp.register_forward_hook(lambda m, i, o: seen.append((o==0).all(-1)))
        encoder(torch.arange(10, 22).repeat(2, 4))
        return torch.stack(seen)
    a,b = masks(),masks(per='sequence')
    assert all(torch.equal(m, ms[0]) for ms in (a,b) for m in ms), 'all chunks drop the same words'
    assert torch.equal(a[0,0], a[0,1]) and not torch.equal(b[0,0], b[0,1])

def test_without_hold_a_classifier_is_fastais():
    outs = []
    for arch,config in (AWD_LSTM, dict(SMALL, hold=False)),(fastai_awdlstm.AWD_LSTM, {**fastai_clas_config, **SMALL}):
        torch.manual_seed(0)
        model = get_text_classifier(arch, 40, 2, seq_len=12, config=config).train()
        torch.manual_seed(1)
        outs.append(model(torch.arange(10, 22).repeat(2, 4))[0])
    assert torch.equal(*outs)
