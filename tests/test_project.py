"""Pins the repository and its pages.

The repository: notebooks clean, library and README.md in sync with them, floors of imports, documented parameters,
a wheel that runs. Pages: processing, links, style, visible code that runs when it is copied, sources that are shown.
"""
import ast, dataclasses, importlib, inspect, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest, yaml
from fastcore.docments import docments

root = Path(__file__).parent.parent
def hidden(page): return any(part[0] in '._' for part in page.relative_to(root).parts)
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not hidden(p))
names = [p.relative_to(root/'nbs').as_posix() for p in pages]

def run(*cmd, cwd, **env):
    "What Python prints"
    r = subprocess.run([sys.executable, *cmd], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr
    return r.stdout

# Pages are lists of cells

def cells(page, kind=None):
    "The cells of `page`, all or those of one kind"
    return [c for c in json.loads(page.read_text())['cells'] if kind in (None, c['cell_type'])]

def source(cell): return ''.join(cell['source'])

def outputs(page): return [o for c in cells(page, 'code') for o in c['outputs']]

def printed(output):
    "What `output` is as plain text"
    return ''.join(output.get('text', output.get('data', {}).get('text/plain', '')))

def unfenced(text):
    "Markdown without its blocks of code"
    return re.sub(r'(?ms)^```.*?^```', '', text)

def markdown(page): return '\n'.join(source(c) for c in cells(page, 'markdown'))

# Copies where commands may write

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project as it is here, in a folder where commands may write"
    dst = tmp_path_factory.mktemp('copy')/'project'
    made = shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', '*.egg-info', '__pycache__', '.*_cache',
                                  '.hypothesis', 'build', 'dist')
    def ignored(folder, names):
        run_folder = {'run'} if Path(folder)==root else set() # what `make train` writes, not the packages `run`
        return {*made(folder, names), *run_folder}
    shutil.copytree(root, dst, ignore=ignored)
    return dst

@pytest.fixture(scope='module')
def processed(copy):
    "The folder of the pages as nbdev processes them for the site"
    code = """if True:
        from nbdev.quarto import refresh_quarto_yml
        from nbdev.serve import proc_nbs
        refresh_quarto_yml()
        proc_nbs(n_workers=2, force=True)"""
    run('-c', code, cwd=copy)
    return copy/'_proc'

def differs(copy, pattern):
    "Files of the copy that are not as in the project"
    made = {p.relative_to(copy).as_posix():p for p in copy.glob(pattern)}
    return [f for f,p in made.items() if not (root/f).exists() or p.read_bytes()!=(root/f).read_bytes()]

# In sync

def test_notebooks_clean(copy):
    run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', cwd=copy)
    assert differs(copy, 'nbs/**/*.ipynb')==[], 'run `make export`'

def test_library_in_sync(copy):
    run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', cwd=copy)
    run('tools/order.py', cwd=copy)
    assert differs(copy, 'fastai_embdrop/**/*.py')+differs(copy, 'nbs/llms.txt')==[], 'run `make export`'

def test_readme_in_sync(copy):
    run('tools/readme.py', cwd=copy)
    assert differs(copy, 'README.md')+differs(copy, 'nbs/images/readme/*')==[], 'run `make readme`'

def test_the_sites_version():
    import fastai_embdrop
    assert f'text: "{fastai_embdrop.__version__}"' in (root/'nbs/_quarto.yml').read_text()

# Processed pages

def test_every_page_processes(processed):
    assert not [n for n in names if not (processed/n).exists()]
    assert not [n for n in names for o in outputs(processed/n) if o['output_type']=='error']

def test_no_link_within_a_link(processed):
    "nbdev links the names of this package, also where a page made a link of them"
    assert not [n for n in names if re.search(r'\[[^]\n]*\[[^]\n]*\]\([^)\n]*\)[^]\n]*\]\(', markdown(processed/n))]

def test_fastais_names_lead_to_fastai(processed):
    "nbdev links a name in backticks to ours: fastai's needs its link written out, in prose and in docstrings"
    ours = re.compile(r"fastai's (?:own )?\[`\w+`\]\((?!https://docs\.fast\.ai)[^)]*\)")
    assert not [(n, link) for n in names for link in ours.findall((processed/n).read_text())]

def test_headings_of_the_api_reach_the_contents(processed):
    "Quarto leaves out the headings of cells with metadata of their own"
    shown = [c for c in cells(processed/'00_dropout.ipynb', 'code') if 'output: asis' in source(c)]
    assert shown and not [c for c in shown if c['metadata'].get('execution')]

@pytest.mark.parametrize('name', ['00_dropout', '03_anneal', '05_awdlstm'])
def test_the_site_shows_the_source(processed, name):
    "Of every class of the module and of what is patched into it"
    module = (root/'fastai_embdrop'/f"{name[3:]}.py").read_text()
    shown = '\n'.join(source(c) for c in cells(processed/f'{name}.ipynb', 'code'))
    defined = re.findall(r'^(?:class \w+|@patch.*\ndef \w+\(self:\w+)', module, re.M)
    assert defined and not [d for d in defined if d not in shown]

def hides_code(page):
    "Does `page` have cells that run unseen? If not, `nbdev-test` has run exactly what a reader copies"
    unseen = re.compile(r'^#\|\s*(hide|echo|eval|include|export)\b', re.M)
    return any(unseen.search(source(c)) for c in cells(page, 'code'))

def test_visible_cells_run_when_copied(processed):
    copied = [n for n in names if n.startswith('tutorials/') or n in ('explain.ipynb', 'index.ipynb')]
    for n in copied:
        for c in cells(root/'nbs'/n, 'code'): compile(source(c), n, 'exec') # Python, without a notebook's magic
    ready = [processed/n for n in copied if hides_code(root/'nbs'/n)]
    run('tools/visible.py', *ready, cwd=root, PYTHONPATH=str(root))

def test_the_site_says_what_each_setting_means(processed):
    from fastai_embdrop.run.settings import Settings
    data = [o.get('data', {}) for o in outputs(processed/'run/02_settings.ipynb')]
    rows = '\n'.join(''.join(d.get('text/markdown', '')) for d in data).splitlines()
    meanings = [(f.name, f.default, docments(Settings)[f.name]) for f in dataclasses.fields(Settings)]
    assert not [name for name,default,meaning in meanings if f'| `{name}` | {default} | {meaning} |' not in rows]

def test_the_recipes_show_the_help_of_today(monkeypatch):
    from fastai_embdrop.run.settings import _parser
    monkeypatch.setenv('COLUMNS', '80')
    shown = [printed(o) for o in outputs(root/'nbs/tutorials/recipes.ipynb')]
    saved, = [o for o in shown if o.startswith('usage: embdrop-train')]
    assert saved.split()==_parser().format_help().split(), 'run the page again'

# What a page is

texts = [*pages, *(root/f'{o}.md' for o in ('README', 'CONTRIBUTING', 'CHANGELOG', 'SECURITY'))]
@pytest.mark.parametrize('page', texts, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = markdown(page) if page.suffix=='.ipynb' else page.read_text()
    links = [l.split('#')[0] for l in re.findall(r'\]\((?!https?:|#|mailto:)([^)\s]+)\)', text)]
    assert not [l for l in links if not (page.parent/l).exists()]

@pytest.mark.parametrize('page', pages, ids=names)
def test_page_style(page):
    assert len(cells(page)) < 60
    assert re.match(r'# .+\n+> .+', source(cells(page, 'markdown')[0]))
    assert not [o for o in outputs(page) if o['output_type']=='error']
    assert not [o for o in outputs(page) if o.get('name')=='stderr'], 'no warnings: they show paths of this machine'
    assert outputs(page), 'outputs are saved'
    code = cells(page, 'code')
    def has_figure(cell): return any('image/png' in o.get('data', {}) for o in cell['outputs'])
    figures = [c for c in code if has_figure(c)]
    assert not [c['id'] for c in figures if 'fig-alt:' not in source(c)], 'alt text on every figure'
    for line in re.findall(r'^#\|(.*:.*)$', '\n'.join(map(source, code)), re.M):
        assert isinstance(yaml.safe_load(line), dict), 'what Quarto reads is YAML'

@pytest.mark.parametrize('page', pages, ids=names)
def test_style_of_headings_and_lines(page):
    headed = [s for s in map(source, cells(page, 'markdown')) if re.search(r'^#+ ', unfenced(s), re.M)]
    crowded = [s for s in headed if not re.fullmatch(r'#+ .+(\n+> .+)?', s.strip())]
    assert not crowded, 'each heading has a cell of its own'
    code = [l for c in cells(page, 'code') for l in source(c).splitlines() if not l.startswith('#|')]
    assert not [l for l in code if len(l)>120], 'lines of code have 120 characters at most'
    output = [l for o in outputs(page) for l in printed(o).splitlines()]
    assert not [l for l in output if len(l)>160], 'lines of output have 160 characters at most'

unreadable = re.compile(r"""^\[\d+, .*'\d+:\d+'\]$|^Text\(\d|\b0x[0-9a-f]{6}|<[\w.]*Learner\b""")

@pytest.mark.parametrize('page', pages, ids=names)
def test_outputs_are_made_for_readers(page):
    "No log of a fit as lists, no text of a figure as its repr, no address, no repr of a Learner"
    lines = [l for o in outputs(page) for l in printed(o).splitlines()]
    assert not [l for l in lines if unreadable.search(l)]

@pytest.mark.parametrize('page', pages, ids=names)
def test_anchors_are_headings(page):
    for target,anchor in re.findall(r'\]\(((?:\.{0,2}[\w/.]+\.ipynb)?)#([\w-]+)\)', markdown(page)):
        text = unfenced(markdown((page.parent/target) if target else page))
        headings = re.findall(r'^#+ (.+)$', text, re.M)
        assert anchor in [re.sub(r'[^\w\- ]', '', h).lower().replace(' ', '-') for h in headings]

tutorials = [p for p in pages if p.parent.name=='tutorials']
@pytest.mark.parametrize('page', tutorials, ids=lambda p: p.name)
def test_tutorials_open_in_colab(page, monkeypatch):
    "By a link below the title; the first cell of code installs there what the page says, and nothing elsewhere"
    repository = re.search(r'^Repository = "(.+)"', (root/'pyproject.toml').read_text(), re.M)[1]
    there = repository.replace('https://github.com', 'https://colab.research.google.com/github')
    assert source(cells(page)[1]).startswith(f'[Open in Colab]({there}/blob/main/nbs/tutorials/{page.name})')

    commands,first = [],source(cells(page, 'code')[0])
    monkeypatch.setattr(subprocess, 'check_call', commands.append)
    exec(first, {})
    assert commands==[]
    monkeypatch.setitem(sys.modules, 'google.colab', None)
    exec(first, {})
    installed = {o for command in commands for o in command}
    needed = re.findall(r'pip install (?:--no-deps )?([\w-]+(?:==[\w.]+)?)`', markdown(page))
    assert {f'git+{repository}', *needed} <= installed

folders = 'tests','tools','benchmarks','experiments','nbs/live'
written = [p for d in folders for p in sorted((root/d).rglob('*')) if p.suffix in ('.py','.js','.css')]
@pytest.mark.parametrize('file', written, ids=lambda p: p.relative_to(root).as_posix())
def test_style_of_files(file):
    assert not [l for l in file.read_text().splitlines() if len(l)>120]

def test_tests_named_on_the_page_of_differences_exist():
    named = re.findall(r'blob/main/(tests/[\w/]+\.py) "(\w+)"', markdown(root/'nbs/differences.ipynb'))
    def functions_in(file): return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
    defined = {f:functions_in(root/f) for f,_ in named}
    assert len(named)>10 and not [name for f,name in named if name not in defined[f]]

def test_a_clone_holds_the_training_command():
    listing = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
    files = subprocess.run(listing, cwd=root, capture_output=True, text=True).stdout.split()
    if not files: pytest.skip('no git checkout')
    package = {f'fastai_embdrop/run/{o}.py' for o in ('__init__','files','train')}
    assert package | {'nbs/run/06_train.ipynb', 'tests/run/test_train.py'} <= {*files}

# Floors: each module may import those before it

core = 'dropout','embeddings','schedules','anneal','loss','awdlstm','adapt'
above = 'run.files','run.corpus','run.settings','run.checkpoint','run.distrib','run.folder','run.train'
package = root/'fastai_embdrop'
made = {p.relative_to(package).with_suffix('').as_posix().replace('/', '.'):p for p in package.rglob('*.py')}
floors = [o for o in core+above if o in made]

def imported(code, module):
    "The modules of ours that `code`, the code of `module`, imports anywhere"
    parent = ['fastai_embdrop', *module.split('.')[:-1]]
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): found += [o.name for o in node.names]
        if isinstance(node, ast.ImportFrom):
            base = parent[:len(parent)-node.level+1] if node.level else []
            origin = '.'.join(filter(None, [*base, node.module]))
            found += [origin, *(f'{origin}.{o.name}' for o in node.names)] # a name may be a module
    return {o.removeprefix('fastai_embdrop.') for o in found} & set(made)

upward = [('dropout', 'from . import awdlstm'), ('dropout', 'from fastai_embdrop import awdlstm'),
          ('dropout', 'from .awdlstm import *'), ('dropout', 'import fastai_embdrop.awdlstm'),
          ('run.files', 'from .. import awdlstm'), ('run.files', 'from ..awdlstm import AWD_LSTM')]

@pytest.mark.parametrize('module,code', upward)
def test_every_form_of_import_is_seen(module, code): assert imported(code, module)=={'awdlstm'}

@pytest.mark.parametrize('module', floors)
def test_nobody_imports_upward(module):
    assert imported(made[module].read_text(), module) <= set(floors[:floors.index(module)])

def test_every_module_has_its_floor():
    assert set(made) - {'__init__', 'run.__init__', '_modidx', '_docs', 'all'} == set(floors)

# Mutants

def test_listed_mutants_are_of_lines_that_exist():
    listed = re.findall(r'^- (.+)$', (root/'tools/mutants.md').read_text(), re.M)
    lines = {line.strip() for module in core for line in made[module].read_text().splitlines()}
    assert listed and not [line for line in listed if line.strip() not in lines]

# Names

def functions(obj):
    "A function, or the public methods of a class and what makes it; its fields make a dataclass"
    if not inspect.isclass(obj): return [obj]
    own = [f for f in vars(obj).values() if inspect.isfunction(f) and (f.__name__=='__init__' or f.__name__[0]!='_')]
    return [obj if dataclasses.is_dataclass(obj) and f.__name__=='__init__' else f for f in own]

def public_functions(module):
    mod = importlib.import_module(f'fastai_embdrop.{module}')
    public = [getattr(mod, o) for o in mod.__all__]
    defined = [o for o in public if inspect.isclass(o) or inspect.isfunction(o)]
    return [f for obj in defined for f in functions(obj)]

def parameters(f):
    "What `f` names itself, under its decorators: not what it delegates to"
    if inspect.isclass(f): return [field.name for field in dataclasses.fields(f)]
    code = inspect.unwrap(f).__code__
    return [o for o in code.co_varnames[:code.co_argcount+code.co_kwonlyargcount] if o!='self']

@pytest.mark.parametrize('module', floors)
def test_every_parameter_is_documented(module):
    def undocumented(f): return [f'{f.__qualname__}: {o}' for o in parameters(f) if not docments(f).get(o)]
    assert not [o for f in public_functions(module) for o in undocumented(f)]

@pytest.mark.parametrize('module', floors)
def test_signatures_name_every_parameter(module):
    "Those that are delegated to fastai's functions too"
    unnamed = inspect.Parameter.VAR_POSITIONAL,inspect.Parameter.VAR_KEYWORD
    signatures = {f.__qualname__:inspect.signature(f).parameters.values() for f in public_functions(module)}
    assert not [(name, o.name) for name,ps in signatures.items() for o in ps if o.kind in unnamed]

# Imports

def test_dropout_needs_torch_alone():
    run('-c', 'import fastai_embdrop.dropout, sys; assert "fastai" not in sys.modules', cwd=root)
    run('-c', 'import fastai_embdrop.embeddings, sys; assert "fastai" not in sys.modules', cwd=root)

def test_light_import():
    code = "import sys, fastai_embdrop; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    run('-c', code, cwd=root)

def test_wheel(copy, tmp_path):
    run('-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'dist', cwd=copy)
    wheel, = (tmp_path/'dist').glob('*.whl')
    files = zipfile.ZipFile(wheel).namelist()
    assert {f'fastai_embdrop/run/{m}.py' for m in ('__init__','files','train')} <= set(files)
    assert {n.split('/')[0] for n in files}=={'fastai_embdrop', f'{wheel.name.split("-py3")[0]}.dist-info'}
    run('-m', 'pip', 'install', '--no-deps', '--target', tmp_path/'site', wheel, cwd=tmp_path)
    code = 'import sys; sys.modules["accelerate"] = None; import fastai_embdrop.all as m; print(m.__file__)'
    there = dict(cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert run('-c', code, **there).strip()==str(tmp_path/'site/fastai_embdrop/all.py')
    assert str(tmp_path/'site') in run(root/'tools/first_example.py', **there)
