"""Pins the message for each misuse that a review of the library in use has tried.

The tables spell out what a message must name; the rest of its wording is free. Wrong files and wrong command lines are
in `tests/run/`. One misuse is left as in fastai: `ParamScheduler({'embed_p': ...})` records values and moves no
probability.
"""
import math, re
from collections import Counter
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos, SchedExp, SchedNo
from fastai.text.models.awdlstm import AWD_LSTM as FastaiAWD
from fastai_embdrop.all import (
    AnnealDropMult, AnnealEmbedP, Checkpoint, DropoutScheduler, EmbeddingDropout, SchedEarly, SchedLate, Settings,
    add_embedding_dropout, awd_lstm_clas_config, awd_lstm_learner, load_run, tokenize, train_lm)
from conftest import SMALL, random_tokens

emb = nn.Embedding(10, 4)
def drop(**kwargs): return EmbeddingDropout(emb, **{'embed_p':.5, **kwargs})

# Where a value is given

VALUES = {
    'above 1':              (lambda: drop(embed_p=1.2), 'embed_p=1.2: a probability is a number in [0, 1]'),
    'a percentage':         (lambda: drop(embed_p=80), 'embed_p=80: a probability is a number in [0, 1]'),
    'nan':                  (lambda: drop(embed_p=math.nan), 'embed_p=nan: a probability'),
    'yes':                  (lambda: drop(embed_p=True), 'embed_p=True: a probability'),
    'text':                 (lambda: drop(embed_p='0.5'), "embed_p='0.5': a probability"),
    'assigned below 0':     (lambda: setattr(drop(), 'embed_p', -.1), 'embed_p=-0.1: a probability'),
    'unknown per':          (lambda: drop(per='word'), "per='word': it is 'batch', 'sequence' or 'token'"),
    'held tokens':          (lambda: drop(per='token', hold=True), "hold=True needs words that share a mask"),
    'sizes, no embedding':  (lambda: EmbeddingDropout(10000, 50), 'emb=10000: use an nn.Embedding'),
    'an EmbeddingBag':      (lambda: EmbeddingDropout(nn.EmbeddingBag(10, 4), .5), 'use an nn.Embedding'),
    'no embedding':         (lambda: add_embedding_dropout(nn.Linear(2, 2), .1), 'no nn.Embedding without dropout'),
    'only of nothing':      (lambda: add_embedding_dropout(nn.Sequential(emb), .1, only='user'), "only='user' matches"),
    'only of a list':       (lambda: add_embedding_dropout(nn.Sequential(emb), .1, only=['0']), "only=['0']: a glob"),
    'start above 1':        (lambda: AnnealEmbedP(1.5, .05), 'start=1.5: a probability'),
    'no epochs':            (lambda: AnnealEmbedP(.5, .05, epochs=0), 'epochs=0: a positive number'),
    'SchedEarly as shape':  (lambda: AnnealEmbedP(.5, .05, SchedEarly), "shapes['early']"),
    'SchedLate as shape':   (lambda: AnnealEmbedP(.05, .5, SchedLate), "shapes['late']"),
    'a name as shape':      (lambda: AnnealEmbedP(.5, .05, 'cos'), "sched='cos': not a function of a start and an end"),
    'a schedule as shape':  (lambda: AnnealEmbedP(.5, .05, SchedCos(.5, .05)), "DropoutScheduler({'embed_p': ...})"),
    'SchedExp to 0':        (lambda: AnnealEmbedP(.5, 0, SchedExp), 'use SchedCos or SchedLin'),
    'SchedExp to 0 by key': (lambda: DropoutScheduler({'embed_p':SchedExp(.5, 0)}), 'use SchedCos or SchedLin'),
    'one string':           (lambda: tokenize('one string'), 'texts is one string, not a list of texts'),
    'unknown tokenizer':    (lambda: tokenize(['a b'], tok='nltk'), "tok='nltk': not one of spacy, split"),
    'setting above 1':      (lambda: Settings(embed_p=1.5), 'embed_p=1.5: a probability'),
    'unknown shape':        (lambda: Settings(sched='cosine'), "sched='cosine': not one of cos, lin, exp"),
    'exp to 0 as setting':  (lambda: Settings(sched='exp', embed_p=.5, embed_p_end=0.), 'must be above 0'),
    'our config, their net':(lambda: FastaiAWD(10, **awd_lstm_clas_config), 'unexpected keyword argument')}

@pytest.mark.parametrize('what', VALUES)
def test_a_wrong_value_is_named_where_it_is_given(what):
    misuse,message = VALUES[what]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)): misuse()

# Where a fit begins

class ReadsTheOutput(Callback):
    run_valid = False
    def after_pred(self): self.pred.argmax(-1)

FITS = {
    'two schedulers':          ([AnnealEmbedP(.5, .4), AnnealEmbedP(.1, 0)], 'both move embed_p of EmbeddingDropout'),
    'embed_p and drop_mult':   ([AnnealEmbedP(.5, .4), AnnealDropMult(1, 0)], "AnnealDropMult ('drop_mult') both move"),
    'drop_mult and embed_p':   ([AnnealDropMult(1, .5), AnnealEmbedP(.5, .4)], "AnnealEmbedP ('embed_p') both move"),
    'a key of no module':      ([DropoutScheduler({'input_p':SchedNo(.5, .5)})], "no module of LazyLM has 'input_p'"),
    'reads learn.pred':        ([ReadsTheOutput()], 'keep_logits=True')}

@pytest.mark.parametrize('what', FITS)
def test_a_wrong_callback_is_named_as_the_fit_begins(what, dls):
    cbs,message = FITS[what]
    learn = awd_lstm_learner(dls, SMALL)
    before = learn.model[0].encoder.weight.clone()
    with pytest.raises((ValueError, AttributeError), match=re.escape(message)): learn.fit(1, cbs=cbs)
    assert torch.equal(before, learn.model[0].encoder.weight), 'nothing is trained'

# Training continues, but not as expected

def with_adapter(learn):
    "A decoder that is not fastai's plain `nn.Linear`"
    learn.model[1].decoder = nn.Sequential(learn.model[1].decoder)

def with_hook(learn): learn.model[1].decoder.register_forward_hook(lambda *args: None)

WARNINGS = {
    'an adapter for a decoder': (with_adapter, 'logits are kept'),
    'a hook on the decoder':    (with_hook, 'logits are kept in training: the decoder has hooks')}

@pytest.mark.parametrize('what', WARNINGS)
def test_one_line_says_why_it_is_not_as_usual(what, dls):
    change,message = WARNINGS[what]
    learn = awd_lstm_learner(dls, SMALL)
    change(learn)
    with pytest.warns(UserWarning, match=message): learn.fit(1)

def test_a_mask_held_in_a_language_model(dls):
    with pytest.warns(UserWarning, match='nothing resets it'): awd_lstm_learner(dls, {**SMALL, 'hold':True}).fit(1)

class Remembers(Callback):
    "With a state that a checkpoint cannot hold"
    def before_fit(self): self.seen = Counter()
    def after_batch(self): self.seen[self.training] += 1

def test_a_callback_whose_state_is_no_plain_data(dls, tmp_path):
    learn = awd_lstm_learner(dls, SMALL)
    with pytest.warns(UserWarning, match='not in the checkpoint.*Remembers.seen') as said:
        learn.fit(1, cbs=[Checkpoint(tmp_path, every=5), Remembers()])
    assert len(said)==1

# Where a run is loaded for prediction

@pytest.mark.parametrize('call', [lambda l: l.validate(), lambda l: l.fit(1), lambda l: l.get_preds()])
def test_a_loaded_run_has_nothing_to_validate_on(run_folder, call):
    with pytest.raises(ValueError, match='no text to train or validate on'): call(load_run(run_folder))

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('misuse')
    (folder/'a.txt').write_text('\n\n'.join(' '.join(random_tokens(30, i)) for i in range(40)))
    sizes = dict(emb_sz=4, n_hid=4, n_layers=1, bs=4, seq_len=8, tok='split', min_freq=1)
    train_lm(Settings(data=str(folder/'a.txt'), out=str(folder/'run'), epochs=1, **sizes))
    return folder/'run'
