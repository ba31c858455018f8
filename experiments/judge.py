"""What the rows of `experiments.adapt` say, by the criteria that its docstring fixed before any run

The page nbs/results/adapt shows it."""
import math
from pathlib import Path
import pandas as pd
from scipy.stats import t as student
from experiments.adapt import arms, ceiling_cells, ceilings, cells, constants, is_lm, rates

def planned():
    "Runs of the whole grid"
    lr_runs = len(rates)*sum(map(is_lm, cells))
    return len(cells)*3*len(arms) + lr_runs + len(cells)*2*4 + len(ceiling_cells)*3*len(ceilings)

def load(path=Path(__file__).parent/'results'/'adapt.csv'):
    "Rows with `cell` as `domain/cell`"
    df = pd.read_csv(path)
    return df.assign(cell=df.domain+'/'+df.cell)

labels = {'E3cap':'AdaptEmbedP', 'E2':'slower rule'}
def label(arm):
    "The name of an arm for readers"
    return labels.get(arm, arm)

def outcomes(df, cell, column='outcome'):
    "A table of `column`: a line for each seed, a column for each arm"
    return df[df.cell==cell].pivot(index='seed', columns='arm', values=column)

def is_whole(df, cell):
    "Are three seeds of all arms done?"
    table = outcomes(df, cell).reindex(index=range(3), columns=list(arms))
    return bool(table.notna().all().all())

def best_constant(df, cell):
    "The constant with the lowest mean over the three seeds that all arms have"
    return outcomes(df, cell).loc[range(3), list(constants)].mean().idxmin()

def regret(df, cell, arm, column='outcome'):
    "Percent by which `column` of `arm` is above the last epoch of the best constant: mean, half of its 95% interval"
    ref = outcomes(df, cell)[best_constant(df, cell)]
    pct = 100*(outcomes(df, cell, column)[arm]/ref - 1).dropna()
    half = student.ppf(.975, len(pct)-1)*pct.std()/math.sqrt(len(pct))
    return pct.mean(),half

def worst(df, names, arm, column='outcome'):
    "The highest regret of `arm` over the cells `names`"
    return max(regret(df, c, arm, column)[0] for c in names)

kinds = dict(sentiment='the classifier', movielens='the recommender')
def kind(cell): return 'language models' if is_lm(cell) else kinds[cell.split('/')[0]]

def domain_verdict(df, name):
    """Whether the candidate succeeds in a domain, its mean regret, its worst, and half of the worst one's interval

    None while a cell lacks rows."""
    names = [c for c in cells if kind(c)==name]
    if not all(is_whole(df, c) for c in names): return None
    regrets = [regret(df, c, 'E3cap') for c in names]
    means = [m for m,_ in regrets]
    if name=='language models': ok = sum(means)/len(means)<=1 and max(means)<=3
    else: ok = all(m-half<=0 for m,half in regrets)
    high,half = max(regrets)
    return ok,sum(means)/len(means),high,half

def mean_and_worst(df, names, arm, column='outcome'):
    "Mean regret and worst regret of `arm` over the cells `names`, as text"
    means = [regret(df, c, arm, column)[0] for c in names]
    mean,high = (round(o, 1)+0 for o in (sum(means)/len(means), max(means))) # + 0: no `-0.0`
    return f'{mean:.1f}, {high:.1f}'

def lower_worst(df):
    "Rivals whose worst regret is not above the candidate's, over the whole cells"
    names = [c for c in cells if is_whole(df, c)]
    return [a for a in (*constants, 'switch', 'epochs') if worst(df, names, a)<=worst(df, names, 'E3cap')]

def verdicts(df):
    "A sentence on the domains that can be judged, and one on those that cannot"
    found = {name:domain_verdict(df, name) for name in dict.fromkeys(map(kind, cells))}
    waiting = [name for name,verdict in found.items() if verdict is None]
    judged = {name:verdict for name,verdict in found.items() if verdict is not None}
    said = [f"{'succeeds' if ok else 'fails'} for {name} (mean regret {mean:.1f}%, worst {high:.1f} ± {half:.1f}%)"
            for name,(ok,mean,high,half) in judged.items()]
    sentences = []
    if said: sentences.append(f"{label('E3cap')} {'; it '.join(said)}.")
    if waiting: sentences.append(f"Not yet judged: {', '.join(waiting)}.")
    return sentences

def against_rivals(df, whole):
    "Sentences on the worst regrets over the cells `whole`"
    rivals = ', '.join(lower_worst(df)) or 'none'
    own = worst(df, whole, 'E3cap')
    return [f"Over the cells with all arms, the worst regret of {label('E3cap')} is {own:.1f}%.",
            f'Constants and rules with no higher one: {rivals}.']

def summary(df):
    "What is known, in a few sentences; the first one gives the verdicts"
    whole = [c for c in cells if is_whole(df, c)]
    has = 'has' if len(whole)==1 else 'have'
    done = f'{len(df)} of {planned()} runs are done, and {len(whole)} of {len(cells)} cells {has} all arms.'
    return ' '.join([*verdicts(df), done, *(against_rivals(df, whole) if whole else [])])
