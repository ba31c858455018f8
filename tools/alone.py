"Runs every test alone, in a fork of its own: `python tools/alone.py [arguments of pytest that select tests]`"
import os, sys
from functools import partial
from pathlib import Path
# what the tests import, once for all forks
import fastai.text.all, hypothesis, pytest, scipy.stats, torch._dynamo, torch.distributed.tensor
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
    jobs = {test:partial(run, test) for test in tests}
    failed = [(test, out) for test,status,out in forks(jobs, os.cpu_count()) if status]
    for test,out in failed: print(test, out, sep='\n')
    print(f'alone: {len(tests)} tests, {len(tests)-len(failed)} passed or were skipped')
    return bool(failed)

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
