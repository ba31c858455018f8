"""Make README.md from nbs/index.ipynb without Quarto: nbdev's own processing, then nbconvert.

`python tools/readme.py [FOLDER]` writes README.md and its images into FOLDER, the project's root by default.
"""
import os, re, sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from order import url

images = 'nbs/images/readme'

def directive(src, name):
    "The value of the line `#| name: value` of a cell's source"
    m = re.search(rf'^#\|\s*{name}:\s*"?(.*?)"?\s*$', src, re.M)
    return m[1] if m else ''

def readme():
    "README.md's text and a dict from the paths of its images to their bytes"
    refresh_quarto_yml()
    nb,figs = nbformat.read(proc_nbs(file_glob='index.ipynb')/'index.ipynb', 4),[]
    for c in (c for c in nb.cells if c.cell_type=='code'):
        has_figure = any('image/png' in o.get('data', {}) for o in c.outputs)
        if has_figure: figs.append([directive(c.source, k) for k in ('fig-alt','fig-cap')])
        folded = directive(c.source, 'code-fold')=='true' # the site folds it, GitHub can't
        if folded or directive(c.source, 'echo')=='false': c.metadata['tags'] = ['no-input']
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    nb.metadata['language_info'] = dict(name='python')
    exporter = MarkdownExporter()
    exporter.register_preprocessor('nbconvert.preprocessors.TagRemovePreprocessor', enabled=True)
    exporter._preprocessors[-1].remove_input_tags = {'no-input'}
    text,res = exporter.from_notebook_node(nb, dict(output_files_dir=images, unique_key='figure'))
    for alt,cap in figs:
        caption = f'\n\n*{cap}*' if cap else ''
        text = re.sub(r'!\[png\]\((.*?)\)', lambda m: f'![{alt}]({m[1]}){caption}', text, count=1)
    text = re.sub(r'\]\(([\w/]+\.ipynb)\)', lambda m: f']({url(m[1])})', text)
    text = re.sub(r'(?s)<style scoped>.*?</style>\n', '', text)
    cfg = get_config()
    text = re.sub(r'(?s)^---.*?\n---\n', f'# {cfg.title}\n\n> {cfg.description}\n', text)
    return re.sub(r'\n\s*\n', '\n\n', text).strip()+'\n', res['outputs']

if __name__=='__main__':
    root = Path(sys.argv[1] if len(sys.argv)>1 else get_config().config_path)
    text,files = readme()
    (root/'README.md').write_text(text)
    (root/images).mkdir(parents=True, exist_ok=True)
    for f in (root/images).iterdir(): f.unlink()
    for f,data in files.items(): (root/f).write_bytes(data)
