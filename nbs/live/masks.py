"The live figure of `explain.ipynb`: masks that the real modules draw, and the page fragment that shows them."
import json
from functools import cache
from pathlib import Path
import torch
from torch import nn
from fastai_embdrop.dropout import EmbeddingDropout

sentences = ['the cat saw the dog', 'the dog saw the cat and ran']
words = [sentence.split() for sentence in sentences]
vocab = sorted({w for sentence in words for w in sentence})
dims = 4
seeds = range(5, 105) # the first one drops "the"
ps = [i/10 for i in range(11)]

def ids():
    "The two sentences as ids, the shorter one padded with -1: (2, T)"
    longest = max(map(len, words))
    rows = [[vocab.index(w) for w in sentence] + [-1]*(longest-len(sentence)) for sentence in words]
    return torch.tensor(rows)

def kept(kind, p, seed):
    "Which numbers `kind` of dropout keeps under `seed`: bool, a row of `dims` for each word of the sentences"
    emb = nn.Embedding(len(vocab), dims, _weight=torch.ones(len(vocab), dims))
    if kind=='number': drop = nn.Sequential(emb, nn.Dropout(p))
    else: drop = EmbeddingDropout(emb, p, per=kind)
    batch = ids()
    torch.manual_seed(seed)
    return (drop(batch.clamp(min=0))!=0)[batch>=0]

def bits(mask):
    "A mask as text: a character for each row, its `dims` numbers the bits of a hexadecimal digit"
    powers = torch.tensor([2**i for i in range(dims)])
    return ''.join(f'{row:x}' for row in (mask*powers).sum(1).tolist())

def masks_of(kind):
    "The masks of `kind` as text: for each p, one for each seed"
    return [[bits(kept(kind, p, seed)) for seed in seeds] for p in ps]

@cache
def data():
    "All that the figure shows: the sentences, and of each kind and p the mask of each seed"
    masks = {kind:masks_of(kind) for kind in ('batch','sequence','token','number')}
    return dict(sentences=words, dims=dims, ps=ps, masks=masks)

def still(masks, p=.3):
    "The first mask of the figure as a plain SVG, which stays where scripts do not run"
    titles = dict(batch='word type', token='position', number='number')
    flat = [w for sentence in words for w in sentence]
    parts = []
    for i,(kind,title) in enumerate(titles.items()):
        left = 20 + 160*i
        parts.append(f'<text x="{left+45}" y="14">{title}</text>')
        for row,(word,digit) in enumerate(zip(flat, masks['masks'][kind][ps.index(p)][0])):
            y = 22 + 16*row + (8 if row>=len(words[0]) else 0)
            parts.append(f'<text x="{left+38}" y="{y+11}" text-anchor="end">{word}</text>')
            for col in range(dims):
                on = int(digit, 16)>>col & 1
                paint = 'fill="#2171b5"' if on else 'fill="none" stroke="#888" stroke-dasharray="2 2"'
                parts.append(f'<rect x="{left+45+16*col}" y="{y}" width="14" height="14" {paint}/>')
    label = 'Three grids of twelve words by four numbers. Left, whole words are dropped and copies agree. ' \
            'Middle, whole words are dropped and copies differ. Right, single numbers are dropped.'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 230" width="500" font-size="12" role="img" '
            f'aria-label="{label}" fill="currentColor">{"".join(parts)}</svg>')

def figure():
    "The figure as an HTML fragment that needs nothing from elsewhere"
    here = Path(__file__).parent
    style,script = ((here/f'masks.{o}').read_text() for o in ('css','js'))
    masks = data()
    return f"""<div class="masks-figure">{still(masks)}</div>
<style>{style}</style>
<script>(() => {{
const data = {json.dumps(masks, separators=(',', ':'))};
{script}
for (const root of document.querySelectorAll('.masks-figure')) if (!root.dataset.ready) masksFigure(root, data);
}})();</script>"""
