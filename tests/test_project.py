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
    shutil.copytree(root, dst, ignore=shutil.ignore_patterns('.git', '.venv', '_proc', '_docs', 'run', '*.egg-info', '__pycache__', '.*_cache', '.hypothesis', 'build', 'dist'))
    return dst

def differs(copy, pattern):
    return [p.relative_to(copy).as_posix() for p in copy.glob(pattern) if not (q := root/p.relative_to(copy)).exists() or p.read_bytes()!=q.read_bytes()]

def test_notebooks_clean(copy):
    run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', cwd=copy)
    assert differs(copy, 'nbs/**/*.ipynb')==[], 'run `make export`'

def test_library_in_sync(copy):
    run('-c', 'from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', cwd=copy)
    assert differs(copy, 'fastai_embdrop/*.py')==[], 'run `make export`'

def test_readme_in_sync(copy):
    run('tests/readme.py', cwd=copy)
    assert differs(copy, 'README.md')+differs(copy, 'nbs/images/readme/*')==[], 'run `make readme`'

def test_every_page_processes(copy):
    run('-c', 'from nbdev.quarto import refresh_quarto_yml; from nbdev.serve import proc_nbs; refresh_quarto_yml(); proc_nbs(n_workers=2, force=True)', cwd=copy)
    assert not [n for n in names if not (copy/'_proc'/n).exists()]
    assert not [n for n in names if any(o.get('output_type')=='error' for c in json.loads((copy/'_proc'/n).read_text())['cells'] for o in c.get('outputs', []))]

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

def test_tests_named_in_the_readme_exist():
    named = re.findall(r'`(tests/\w+\.py)(?:::(\w+))?`', (root/'README.md').read_text())
    defs = {f:{n.name for n in ast.parse((root/f).read_text()).body if isinstance(n, ast.FunctionDef)} for f,_ in named}
    assert len(named)>10 and not [(f,n) for f,n in named if n and n not in defs[f]]

def test_light_import():
    code = "import sys, fastai_embdrop; sys.exit('torch' in sys.modules or 'fastai' in sys.modules)"
    run('-c', code, cwd=root)

def test_wheel(copy, tmp_path):
    run('-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path/'dist', cwd=copy)
    wheel, = (tmp_path/'dist').glob('*.whl')
    assert {n.split('/')[0] for n in zipfile.ZipFile(wheel).namelist()}=={'fastai_embdrop', f'{wheel.name.split("-py3")[0]}.dist-info'}
    run('-m', 'pip', 'install', '--no-deps', '--target', tmp_path/'site', wheel, cwd=tmp_path)
    code = 'import sys; sys.modules["accelerate"] = None; import fastai_embdrop.all as m; assert m.__file__.startswith(r"%s"), m.__file__; m.EmbeddingDropout, m.AnnealEmbedP' % (tmp_path/'site')
    run('-c', code, cwd=tmp_path, PYTHONPATH=str(tmp_path/'site'))
