"Runs every test alone, in a fork of its own: `python tools/alone.py [arguments of pytest that select tests]`"
import os, sys
from functools import partial
from pathlib import Path
import fastai.text.all, hypothesis, pytest, scipy.stats, torch._dynamo, torch.distributed.tensor # what the tests import, once for all forks
from forks import forks

os.chdir(Path(__file__).parent.parent)
def run(*args): return pytest.main(['-p', 'no:cacheprovider', *args])

def ids(args):
    "The ids of the tests that `args` select, collected in a fork"
    [(_,status,out)] = forks({'collect':partial(run, '--collect-only', *args)}, 1)
    if status: sys.exit(out)
    return [o for o in out.splitlines() if '::' in o]

def main(args):
    tests = ids(args)
    failed = [(name, out) for name,status,out in forks({o:partial(run, o) for o in tests}, os.cpu_count()) if status]
    for name,out in failed: print(name, out, sep='\n')
    print(f'alone: {len(tests)} tests, {len(tests)-len(failed)} passed or were skipped')
    return bool(failed)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
