"Runs functions in forks of one process, so that slow imports happen once."
import gc, os, signal, sys, tempfile, traceback
from contextlib import suppress
# no window; and pytest's plugins may have been imported here already
os.environ |= dict(MPLBACKEND='agg', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')

def fork(f, limit):
    "Start `f`, which returns an exit status, in a fork for `limit` seconds at most: its id and the file it prints to"
    out = tempfile.TemporaryFile('w+', errors='replace')
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid,out
    os.setpgrp() # a group of its own, to end what it leaves behind
    signal.alarm(limit)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
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
