"""Changes modules in one place at a time and runs their tests, which must fail: `python tools/mutants.py [module ...]`

The changes are Cosmic Ray's: operators and numbers replaced, conditions negated, loops emptied, decorators removed.
A mutant that no test kills must be in `tools/mutants.md`, with the reason why it does what the original does. What is
listed there must survive. MUTANTS=10 tries ten mutants of each module, taken evenly, and then the list is not checked.
"""
import ast, importlib.util, os, re, sys, time
from functools import partial
from pathlib import Path
# what the tests import, once for all forks
import fastai.text.all, hypothesis, pytest, scipy.stats, torch._dynamo, torch.distributed.tensor
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from forks import forks

root = Path(__file__).parent.parent
# parts of the names of tests that are left out because they are slow
slow = 'lessons', 'torch_alone', 'graph', 'compiles', 'through_ddp', 'through_compile', 'processes'
tests = dict(dropout=['test_dropout.py', 'test_draw.py', 'test_parity.py', 'test_defects.py'],
             schedules=['test_schedules.py'], anneal=['test_anneal.py'], adapt=['test_adapt.py'])
least = 95

def operators():
    "Those that need no argument and do not take an equality or an order for an identity"
    simple = [o for o in operator_names() if not get_operator(o).arguments()]
    return [get_operator(o)() for o in simple if not re.search(r'_(?!Is)[A-Z]\w+_Is', o)]

def changed(old, new):
    "The first line that differs, in `old` and in `new`"
    return next((a.strip(), b.strip()) for a,b in zip(old.splitlines(), new.splitlines()) if a!=b)

def mutants(src):
    """From (old line, new line) to the whole mutated source

    Mutants that do not compile, or compile to the same code, are left out."""
    res,tree,same = {},get_ast(src),ast.dump(ast.parse(src))
    for op in operators():
        positions = [o for node in ast_nodes(tree) for o in op.mutation_positions(node)]
        for i in range(len(positions)):
            new = mutate_code(src, op, i)
            try:
                if ast.dump(ast.parse(new))!=same: res[changed(src, new)] = new
            except SyntaxError: pass
    return res

class CheapFirst:
    "Sorts tests by the seconds that they took before"
    def __init__(self, seconds): self.seconds = seconds
    def pytest_collection_modifyitems(self, items): items.sort(key=lambda o: self.seconds.get(o.nodeid, 0))

def run(name, src, seconds):
    "The tests of module `name` with `src` in its place: pytest's exit status"
    spec = importlib.util.find_spec(f'fastai_embdrop.{name}')
    mod = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    exec(compile(src, spec.origin, 'exec'), vars(mod))
    setattr(sys.modules['fastai_embdrop'], name, mod)
    chosen = ' and '.join(f'not {o}' for o in slow)
    files = [str(root/'tests'/t) for t in tests[name]]
    args = ['-x', '--durations=0', '--tb=no', '-p', 'no:cacheprovider', '-k', chosen, *files]
    return pytest.main(args, plugins=[CheapFirst(seconds)])

def listed():
    "The (old line, new line) pairs of tools/mutants.md: every `+` line belongs to the last `-` line above it"
    res,old = set(),None
    for s,line in re.findall(r'^([-+]) +(.+)$', (root/'tools/mutants.md').read_text(), re.M):
        if s=='-': old = line
        else: res.add((old, line))
    return res

def some_of(found, n):
    "`n` of the mutants `found`, taken evenly; all of them if `n` is 0"
    step = max(1, len(found)//n) if n else 1
    return dict(list(found.items())[::step][:n or None])

def survivors(name, n):
    "How many mutants of module `name` were tried, and those that no test kills, as (old line, new line)"
    src,start = (root/f'fastai_embdrop/{name}.py').read_text(),time.time()
    [(_,status,out)] = forks({name:partial(run, name, src, {})}, 1)
    if status: sys.exit(f'{out}the tests of {name} fail before anything is changed')
    limit = 30 + 3*int(time.time()-start)
    seconds = {test:float(s) for s,test in re.findall(r'^([.\d]+)s call +(.+)$', out, re.M)}
    jobs = {k:partial(run, name, new, seconds) for k,new in some_of(mutants(src), n).items()}
    return len(jobs), {k for k,status,_ in forks(jobs, os.cpu_count(), limit) if not status} # one without end is killed

def show(title, pairs):
    for old,new in sorted(pairs): print(f'{title}:\n- {old}\n+ {new}')

def main(names, n=0):
    tried,survived,known = 0,set(),listed()
    for name in names:
        made,alive = survivors(name, n)
        tried,survived = tried+made,survived|alive
    new,gone = survived-known,known-survived
    if n or set(names)!=set(tests): gone = set() # not all were tried
    show('Survived, and not in tools/mutants.md', new)
    show('In tools/mutants.md, and did not survive', gone)
    killed = tried-len(survived)
    print(f'mutants: {tried}, killed: {killed} ({killed/tried:.1%})')
    return bool(new or gone) or killed < least*tried/100

if __name__=='__main__': sys.exit(main(sys.argv[1:] or list(tests), int(os.getenv('MUTANTS', 0))))
