"""Pins the repository: notebooks clean, library and README.md in sync with them, pages that process, links that lead somewhere, a wheel that imports."""
import ast, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
pages = sorted(p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))
names = [p.relative_to(root/'nbs').as_posix() for p in pages]

def run(*cmd, cwd, **env):
    r = subprocess.run([sys.executable, *cmd], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert r.returncode==0, r.stdout+r.stderr

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The project as it is here, in a folder where commands may write"
    dst = tmp_path_factory.mktemp('copy')/'project'
    made = shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', '*.egg-info', '__pycache__', '.*_cache', '.hypothesis', 'build', 'dist')
    at_top = lambda folder, names: {'run'} if Path(folder)==root else set() # what `make train` writes, not the packages `run`
    shutil.copytree(root, dst, ignore=lambda folder, names: {*made(folder, names), *at_top(folder, names)})
    return dst

def differs(copy, pattern):
    return [p.relative_to(copy).as_posix() for p in copy.glob(pattern) if not (q := root/p.relative_to(copy)).exists() or p.read_bytes()!=q.read_bytes()]

def test_notebooks_clean(copy):
    run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', cwd=copy)
    assert differs(copy, 'nbs/**/*.ipynb')==[], 'run `make export`'

def test_library_in_sync(copy):
    run('-c', 'from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', cwd=copy)
    run('tools/order.py', cwd=copy)
    assert differs(copy, 'fastai_embdrop/**/*.py')+differs(copy, 'nbs/llms.txt')==[], 'run `make export`'

def test_readme_in_sync(copy):
    run('tools/readme.py', cwd=copy)
    assert differs(copy, 'README.md')+differs(copy, 'nbs/images/readme/*')==[], 'run `make readme`'

def test_every_page_processes(copy):
    run('-c', 'from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=2, force=True)', cwd=copy)
    assert not [n for n in names if not (copy/'_proc'/n).exists()]
    assert not [n for n in names if any(o.get('output_type')=='error' for c in json.loads((copy/'_proc'/n).read_text())['cells'] for o in c.get('outputs', []))]

def test_headings_of_the_api_reach_the_contents(copy):
    "Quarto leaves out the headings of cells with metadata of their own"
    cells = json.loads((copy/'_proc/00_dropout.ipynb').read_text())['cells']
    shown = [c for c in cells if 'output: asis' in ''.join(c['source'])]
    assert shown and not [c for c in shown if c['metadata'].get('execution')]

def test_the_sites_version():
    import fastai_embdrop
    assert f'text: "{fastai_embdrop.__version__}"' in (root/'nbs/_quarto.yml').read_text()

def markdown(p): return '\n'.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type']=='markdown')

@pytest.mark.parametrize('page', [*pages, root/'README.md', root/'CONTRIBUTING.md', root/'CHANGELOG.md', root/'SECURITY.md'], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = markdown(page) if page.suffix=='.ipynb' else page.read_text()
    links = [l.split('#')[0] for l in re.findall(r'\]\((?!https?:|#|mailto:)([^)\s]+)\)', text)]
    assert not [l for l in links if not (page.parent/l).exists()]

@pytest.mark.parametrize('page', pages, ids=names)
def test_page_style(page):
    cells = json.loads(page.read_text())['cells']
    assert len(cells) < 60
    assert re.match(r'# .+\n+> .+', next(''.join(c['source']) for c in cells if c['cell_type']=='markdown'))
    assert not [c for c in cells for o in c.get('outputs', []) if o['output_type']=='error' or o.get('name')=='stderr'], 'no warnings, whose paths are those of a machine'
    assert any(c.get('outputs') for c in cells), 'outputs are saved'
    figures = [c for c in cells if any('image/png' in o.get('data', {}) for o in c.get('outputs', []))]
    assert not [c['id'] for c in figures if 'fig-alt:' not in ''.join(c['source'])], 'alt text on every figure'
    for line in re.findall(r'^#\|(.*:.*)$', '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='code'), re.M):
        assert isinstance(yaml.safe_load(line), dict), 'what Quarto reads is YAML'

def test_tests_named_on_the_page_of_differences_exist():
    named = re.findall(r'blob/main/(tests/[\w/]+\.py) "(\w+)"', markdown(root/'nbs/differences.ipynb'))
    bodies = {f:ast.parse((root/f).read_text()).body for f,_ in named}
    defined = {(f,n.name) for f,body in bodies.items() for n in body if isinstance(n, ast.FunctionDef)}
    assert len(named)>10 and {*named} <= defined

def test_a_clone_holds_the_training_command():
    files = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=root, capture_output=True, text=True).stdout.split()
    if not files: pytest.skip('no git checkout')
    assert {'fastai_embdrop/run/__init__.py', 'fastai_embdrop/run/train.py', 'nbs/run/06_train.ipynb', 'tests/run/test_train.py'} <= {*files}

core = 'dropout','embeddings','schedules','anneal','loss','awdlstm','adapt' # each may import those before it
above = 'run.files','run.corpus','run.settings','run.checkpoint','run.distrib','run.folder','run.train'

def imported(module):
    "The modules of ours that `module` imports anywhere in its code"
    src = (root/'fastai_embdrop'/f"{module.replace('.', '/')}.py").read_text()
    package = ['fastai_embdrop', *module.split('.')[:-1]]
    found = []
    for node in ast.walk(ast.parse(src)):
        if isinstance(node, ast.Import): found += [o.name for o in node.names]
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else []
            found.append('.'.join([*base, *([node.module] if node.module else [])]))
    return {o.removeprefix('fastai_embdrop.') for o in found if o.startswith('fastai_embdrop.')}

floors = [*core, *above]
@pytest.mark.parametrize('module', floors)
def test_nobody_imports_upward(module):
    if not (root/'fastai_embdrop'/f"{module.replace('.', '/')}.py").exists(): pytest.skip(f'no {module} yet')
    assert imported(module) <= set(floors[:floors.index(module)])

def test_every_module_has_its_floor():
    made = {p.relative_to(root/'fastai_embdrop').with_suffix('').as_posix().replace('/', '.') for p in (root/'fastai_embdrop').rglob('*.py')}
    assert made - {'__init__', 'run.__init__', '_modidx', '_docs', 'all'} <= set(floors)

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
    code = 'import sys; sys.modules["accelerate"] = None; import fastai_embdrop.all as m; assert m.__file__.startswith(r"%s"), m.__file__; m.EmbeddingDropout, m.AnnealEmbedP' % (tmp_path/'site')
    run('-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
