"""Does annealing embedding dropout help? Schedules x seeds x corpora, one row per finished run in
results/schedules.csv

Written before any run with a moving schedule. What had been seen: probes of other model and text sizes by which
these were chosen, all at p = 0 but three (a constant .2 hurt after three epochs on docstrings; on wikitext without
other dropouts .3 hurt a model that did not overfit and .2 helped one that did), and a first look at a 64/128/1
model, 14 epochs, two seeds, other dropouts on, where nothing beat p = 0 by more than the seeds differ.

Question. A language model is trained with a p of embedding dropout that moves in the course of the training. Is it
better than with a constant p? A moving schedule differs from a constant in how much it drops and in when. Only the
second is annealing, so each moving schedule is compared with the constant of equal mean p and with the constant of
equal final p (`controls`). All schedules of a seed start from the same weights and see the same batches, and
differences are paired by seed. (wikitext is one text, so its batches come in one order and its seeds differ in
weights and masks alone.) The outcome is the perplexity of the held-out text after the last epoch. The best epoch's
is recorded beside it, but an epoch chosen by the text that judges it flatters every schedule that overfits.

Regimes (perplexities of the probes at p = 0, seed 0, docstrings and wikitext).
few   100,000 words, 3 epochs, the other dropouts at fastai's defaults. Underfits: the held-out loss falls to the
      last epoch.
many  20,000 words, 20 epochs, the same dropouts. Overfits: from 29.9 at the best epoch to 32.7 at the last, and from
      47.8 to 54.9.
only  20,000 words, 20 epochs, no other dropout, penalty on activations or weight decay. Overfits most: 34.5 to 48.4,
      49.7 to 58.5.

Model: one LSTM layer of 128 units, 2,000 words at most, one-cycle, highest rate .01. A run takes 30 to 70 s on one
core, two at a time, and says nothing about large models. The rate rises and falls too, so "late" is also "when the
rate is small".

What the literature predicts, for each regime:
Merity et al. 2017 (constant p)                 many, only: a small constant p beats none, as without it WikiText-2
    went from 68.6 to 71.1. few: nothing said.
Rennie et al. 2014 (falling to 0)               all: "fall" beats the constant of its mean, and none, for it starts
    as an ensemble and ends as the plain model.
Liu et al. 2023 (early for underfitting models) few: "early" beats none, and constants are worse than none. many,
    only: no help from "early".
Liu et al. 2023 (late for overfitting models)   many, only: "late" beats none and the constant of its mean. few: it
    hurts, as every regularizer.
Morerio et al. 2017 (rising)                    all: "rise" and "curriculum" beat the constants of their mean and of
    their end. few: least, as little is overfitted.
O'Neill & Bollegala 2018 (rising, LSTM LMs)     the same for language models; many and only are closest to theirs.
Kaldi (up, then down to 0)                      few, many: "up-down" beats the constant of its mean. only: nothing
    said.
Gugger 2018 (regularization relaxed at high rates, AWD-LSTM) many: no schedule beats its controls.

Comparisons. A full cell has 7 moving schedules with two controls each, 14 differences: at a level of .05 a false
alarm among them is about as likely as not. Two cells are full, docstrings/few and wikitext/only: three seeds, and at
the end of the grid two more of all schedules, so that none is singled out by its first seeds. The other four cells
have three seeds of the schedules that their predictions are most about."""
import math, time
from functools import lru_cache
from fastai.text.all import SchedCos, SchedNo, set_seed, torch
from fastai_embdrop.anneal import DropoutScheduler
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.schedules import SchedCurriculum, SchedEarly, SchedLate, SchedPiecewise
from fastai_embdrop.run.corpus import Corpus, fingerprint, first_words, lm_dataloaders, read_corpus, tokenize
from benchmarks.common import provenance
from experiments.grid import Grid, matching, parser, print_list

lr,held_out = 1e-2,12_000
model = dict(emb_sz=128, n_hid=128, n_layers=1)
no_other = dict(hidden_p=0., input_p=0., output_p=0., weight_p=0.)
# words of training text, epochs, what differs in the configuration and in the learner
regimes = dict(
    few=(100_000, 3, {}, {}),
    many=(20_000, 20, {}, {}),
    only=(20_000, 20, no_other, dict(alpha=0., beta=0., wd=0.)),
)

# Schedules

# gamma=10 is Morerio et al.'s: the end is reached but for exp(-10)
moving = {
    'fall':SchedCos(.4, 0.),
    'fall-to-.1':SchedCos(.4, .1),
    'early':SchedEarly(.4, 1/3),
    'rise':SchedCos(0., .4),
    'late':SchedLate(.2, .5),
    'curriculum':SchedCurriculum(.4, 10),
    'up-down':SchedPiecewise([(0,0), (.5,.4), (1,0)]),
}

def mean_p(f, n=10_000): return sum(f((i+.5)/n) for i in range(n))/n
def const(p): return f'const-{p:.3g}' if p>=.001 else 'none'

def controls(name):
    "The constants with the mean p and with the final p of a moving schedule, to three decimals"
    return tuple(const(round(p, 3)) for p in (mean_p(moving[name]), moving[name](1.)))

constants = 'none','const-0.02','const-0.1','const-0.2','const-0.4'
all_controls = [c for m in moving for c in controls(m)]
names = tuple(dict.fromkeys([*constants, *all_controls, *moving]))
def p_of(name): return 0. if name=='none' else float(name.removeprefix('const-'))
edge = 'const-0.5','const-0.6' # beyond the grid: see `experiments.edge`
scheds = {n:moving.get(n) or SchedNo(p_of(n), p_of(n)) for n in (*names, *edge)}

# The grid

def with_controls(*ms):
    "The constants, the schedules `ms` and their controls, in the order of `names`"
    their_controls = [c for m in ms for c in controls(m)]
    return [n for n in names if n in (*constants, *ms, *their_controls)]

full = 'docstrings/few','wikitext/only'
parts = dict(
    few=with_controls('fall', 'early', 'rise'),
    many=with_controls('fall', 'rise', 'late'),
    only=with_controls('fall', 'rise', 'late'),
)
def names_in(cell): return names if cell in full else parts[cell.split('/')[1]]

def grid(wikitext=True):
    "Keys `corpus/regime/schedule/seed` in the order of the runs: cut anywhere, what is finished is nearly paired"
    others = [f'{c}/{r}' for r in regimes for c in ('docstrings','wikitext') if f'{c}/{r}' not in full]
    stages = [(range(3), full), (range(3), others), (range(3,5), full)]
    keys = []
    for seeds,cells in stages:
        for s in seeds:
            for c in cells: keys += [f'{c}/{n}/{s}' for n in names_in(c)]
    return [k for k in keys if wikitext or not k.startswith('wikitext/')]

# A run

@lru_cache
def tokens(corpus, words, wikitext):
    "Tokens of training, held-out and maybe test text, and the texts' fingerprint; the held-out text is always the same"
    c = read_corpus(wikitext if corpus=='wikitext' else corpus, max(words, 10*held_out))
    c = Corpus(first_words(c.train, words), *(first_words(o, held_out) for o in c[1:]))
    return [tokenize(o, tok_of(corpus), n_workers=0) for o in c],fingerprint(c)[:16]

def tok_of(corpus): return 'split' if corpus=='wikitext' else 'spacy'

def learner(key, wikitext=None):
    "The untrained learner of a run: it depends on corpus, regime and seed, not on the schedule"
    corpus,regime,_,seed = key.split('/')
    words,_,config,kwargs = regimes[regime]
    toks,_ = tokens(corpus, words, wikitext)
    set_seed(int(seed), reproducible=True)
    dls = lm_dataloaders(*toks, tok=tok_of(corpus), min_freq=2, max_vocab=2000, bs=16, seq_len=35, device='cpu')
    return awd_lstm_learner(dls, {**model, **config}, keep_logits=True, **kwargs)

def train(key, wikitext=None, cbs=()):
    "The trained learner of a run, and the seconds that its training took"
    learn,(_,regime,name,_) = learner(key, wikitext),key.split('/')
    t = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(regimes[regime][1], lr, cbs=[DropoutScheduler({'embed_p':scheds[name]}), *cbs])
    return learn,time.perf_counter()-t

key_columns = 'corpus','regime','schedule','seed'
columns = (*key_columns, 'train_loss', 'valid_loss', 'best_perplexity', 'final_perplexity', 'test_perplexity', 'mean_p',
           'final_p', 'tokens', 'tokens_per_s', 'seconds', 'threads', 'hardware', 'commit', 'versions', 'date',
           'fingerprint')

def run(key, wikitext=None):
    "The row of a run, which depends on `key` and the texts alone (but for times and provenance)"
    torch.set_num_threads(1)
    learn,seconds = train(key, wikitext)
    corpus,regime,*_ = key.split('/')
    words,epochs,*_ = regimes[regime]
    toks,data = tokens(corpus, words, wikitext)
    losses,valid,*_ = zip(*learn.recorder.values)
    n,ps = sum(map(len, toks[0])),learn.recorder.hps['embed_p']
    prov = provenance('cpu')
    with learn.no_bar(): test = math.exp(learn.validate(2)[0]) if toks[2] else ''
    return dict(
        zip(key_columns, key.split('/')), train_loss=joined(losses), valid_loss=joined(valid),
        best_perplexity=math.exp(min(valid)), final_perplexity=math.exp(valid[-1]), test_perplexity=test,
        mean_p=f'{sum(ps)/len(ps):.4f}', final_p=f'{ps[-1]:.4f}',
        tokens=n, tokens_per_s=round(n*epochs/seconds), seconds=f'{seconds:.1f}', threads=torch.get_num_threads(),
        fingerprint=data, **{k:prov[k] for k in ('hardware','commit','versions','date')})

def joined(values): return ';'.join(map(str, values))

# Running the grid

def check_data(keys, stored, wikitext):
    "Stop if stored rows come from another text than the runs to come: they could not be paired"
    for corpus,regime in dict.fromkeys(tuple(k.split('/')[:2]) for k in keys):
        old = {r['fingerprint'] for r in stored.values() if (r['corpus'],r['regime'])==(corpus,regime)}
        if not old: continue
        here = tokens(corpus, regimes[regime][0], wikitext)[1]
        if old!={here}: raise SystemExit(f'{corpus}/{regime}: stored rows come from another text')

grid_of = Grid(run, key_columns, columns, 'final_perplexity', check_data)

def main(argv=None):
    args = parser('schedules', __doc__, 'schedules.csv').parse_args(argv)
    keys = matching(grid(bool(args.wikitext)), args.only)
    if args.once:
        if args.once not in keys: raise SystemExit(f'{args.once}: not in the grid (runs on wikitext need --wikitext)')
        return 0 if grid_of.once(args.once, args.out, args.wikitext) else 1
    if args.list: print_list(keys, grid_of.stored_rows(args.out))
    else: grid_of.run_keys(keys, args.out, args.workers, args.wikitext)

if __name__=='__main__': raise SystemExit(main())
