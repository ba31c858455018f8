"""Bring what nbdev-export writes into the sidebar's order: the modules in the package's docstring, and nbs/llms.txt.

`python tools/order.py` is part of `make export`. The order is written down in one place, nbs/sidebar.yml.
"""
import json, re
from pathlib import Path
from textwrap import fill
import yaml
from nbdev.config import get_config

config = get_config()
nbs = Path(config.nbs_path)

def sections():
    "The sidebar's pages by section: (title, [page, ...]) pairs, pages as paths below nbs/"
    contents = yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents']
    res,loose = [],[]
    for item in contents:
        if isinstance(item, dict) and 'section' in item:
            res.append((item['section'], [href(o) for o in item['contents']]))
        else: loose.append(href(item))
    return [('Overview', loose), *res]

def href(item): return item['href'] if isinstance(item, dict) else item

def cells(page): return json.loads((nbs/page).read_text())['cells']

def title(page):
    "A page's H1 and its `>` subtitle"
    text = next(''.join(c['source']) for c in cells(page) if c['cell_type']=='markdown')
    return re.match(r'# (.+)\n+> (.+)', text).groups()

def module(page):
    "The module that a page exports, `run.files` say; None for a page without one"
    found = re.search(r'#\| default_exp (\S+)', ''.join(cells(page)[0]['source']))
    return found and found[1]

def url(page):
    "The address of a page, `run/00_files.ipynb` say: nbdev leaves the number of a file's name out"
    path = Path(page)
    name = re.sub(r'^\d+\w?_', '', path.stem)
    return f'{config.doc_host}{config.doc_baseurl}/{path.with_name(name).as_posix()}.html'

def llms():
    "The text of llms.txt: every page of the site, by section"
    parts = [f'# {config.title}', f'> {config.description}']
    for name,pages in sections():
        lines = [f'- [{title(p)[0]}]({url(p)}.md): {title(p)[1]}' for p in pages]
        parts.append('\n'.join([f'## {name}', '', *lines]))
    return '\n\n'.join(parts) + '\n'

def wrapped(item):
    "An item of a list in lines of 120 characters at most"
    return fill(' '.join(item.split()), 120, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)

def reorder(init):
    "The package's `__init__.py` with its modules in the sidebar's order"
    modules = [module(p) for _,pages in sections() for p in pages]
    place = {f'- `fastai_embdrop.{m}`':i for i,m in enumerate(modules)}
    start = init.index('- `fastai_embdrop.')
    end = init.index('"""', start)
    items = re.split(r'\n(?=- )', init[start:end])
    items.sort(key=lambda o: place[o.split(':')[0]])
    return init[:start] + '\n'.join(map(wrapped, items)) + init[end:]

if __name__=='__main__':
    init = Path(config.lib_path)/'__init__.py'
    init.write_text(reorder(init.read_text()))
    (nbs/'llms.txt').write_text(llms())
