"""What the rows of `experiments.adapt` say, by the criteria that its docstring fixed before they were run. Used by the page on the results."""
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
    "Mean percent by which `column` of `arm` is above the last epoch of the best constant, paired by seed, and half of its 95 % interval"
    ref = outcomes(df, cell)[best_constant(df, cell)]
    pct = 100*(outcomes(df, cell, column)[arm]/ref - 1).dropna()
    half = student.ppf(.975, len(pct)-1)*pct.std()/math.sqrt(len(pct))
    return pct.mean(),half

def worst(df, names, arm): return max(regret(df, c, arm)[0] for c in names)

def kind(cell): return 'language models' if is_lm(cell) else {'sentiment':'the classifier','movielens':'the recommender'}[cell.split('/')[0]]

def domain_verdict(df, name):
    "Whether the candidate succeeds in a domain, and its figures; None while a cell lacks rows"
    names = [c for c in cells if kind(c)==name]
    if not all(is_whole(df, c) for c in names): return None
    regrets = [regret(df, c, 'E3cap') for c in names]
    means = [m for m,_ in regrets]
    if name=='language models': ok = sum(means)/len(means)<=1 and max(means)<=3
    else: ok = all(m-half<=0 for m,half in regrets)
    return ok,sum(means)/len(means),max(means)

def lower_worst(df):
    "Rivals whose worst regret is not above the candidate's, over the whole cells"
    names = [c for c in cells if is_whole(df, c)]
    return [a for a in (*constants, 'switch', 'epochs') if worst(df, names, a)<=worst(df, names, 'E3cap')]

def summary(df):
    "What is known, in a few sentences"
    whole = [c for c in cells if is_whole(df, c)]
    done = f'{len(df)} of {planned()} runs are done'
    names = list(dict.fromkeys(map(kind, cells)))
    verdicts = {n:domain_verdict(df, n) for n in names}
    said = [f"In {n} E3cap {'succeeds' if v[0] else 'fails'}: its mean regret is {v[1]:.1f} %, the worst {v[2]:.1f} %." for n,v in verdicts.items() if v]
    has = 'has' if len(whole)==1 else 'have'
    first = f'Judged in all three domains: {done}.' if all(verdicts.values()) else f'Not yet judged: {done}, {len(whole)} of {len(cells)} cells {has} all arms.'
    if not whole: return first
    rivals = lower_worst(df)
    over = f"Where all arms are done the worst regret of E3cap is {worst(df, whole, 'E3cap'):.1f} %; "
    over += f"no worse is that of {', '.join(rivals)}." if rivals else 'every constant, the switch and the epochs rule have a higher one.'
    return ' '.join([first, *said, over])
