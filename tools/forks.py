"Functions run in forks of one process, so that what takes seconds to import is imported once."
import gc, os, signal, sys, tempfile, traceback
from contextlib import suppress
os.environ |= dict(MPLBACKEND='agg', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1') # no window; and pytest's plugins may have been imported here already

def fork(f, limit):
    "Start `f`, which returns an exit status, in a fork that lives `limit` seconds at most: its id and the file of what it prints"
    out = tempfile.TemporaryFile('w+', errors='replace')
    sys.stdout.flush()
    if pid := os.fork(): return pid,out
    os.setpgrp() # a group of its own, to end what it leaves behind
    signal.alarm(limit)
    for fd in 1,2: os.dup2(out.fileno(), fd)
    status = 70
    try: status = f()
    except BaseException: traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)

def forks(jobs, n, limit=300):
    "Run `jobs`, from a name to a function, `n` at a time: (name, exit status, what it printed) of each as it ends"
    todo,running = list(jobs.items()),{}
    gc.freeze() # the collections of a fork need not look at what it was born with
    while todo or running:
        while todo and len(running)<n:
            name,f = todo.pop(0)
            pid,out = fork(f, limit)
            running[pid] = name,out
        pid,status = os.wait()
        with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
        name,out = running.pop(pid)
        out.seek(0)
        yield name,os.waitstatus_to_exitcode(status),out.read()
