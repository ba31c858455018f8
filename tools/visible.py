"""Runs the visible code of processed pages, as a reader who copies it would: `python tools/visible.py PAGE...`

Each page runs in a fork of its own, in an empty folder and with no names, so its imports must be visible too.
fastai is imported before the forks, because that takes seconds and hides nothing: a page still has to import its names.
"""
import json, os, re, sys, tempfile, types
from functools import partial
from pathlib import Path
import fastai.text.all
from forks import forks

# torchvision does not import beside torch's CPU build, and transformers does without it
sys.modules.setdefault('torchvision', None)

unseen = re.compile(r'^#\|\s*(echo|eval|include):\s*false', re.M)

def visible(page):
    "The code cells of the processed `page` that show their code and are evaluated"
    cells = json.loads(page.read_text())['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    return [s for s in sources if not unseen.search(s)]

def run(page):
    "Run the visible cells of `page` in order, as the module `__main__`"
    reader = sys.modules['__main__'] = types.ModuleType('__main__')
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for i,source in enumerate(visible(page)):
            exec(compile(source, f'<{page.name}, visible cell {i}>', 'exec'), vars(reader))
    return 0

def main(paths):
    pages = [Path(p).resolve() for p in paths]
    failed = []
    for name,status,out in forks({p:partial(run, p) for p in pages}, os.cpu_count()):
        if status: failed.append(f'{name}\n{out}')
    print(*failed, f'visible: {len(pages)} pages, {len(pages)-len(failed)} ran', sep='\n')
    return bool(failed)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
