"""A grid of runs with one row each in a CSV, which can be killed at any time and run again to resume

Rows are whole, and one grid writes at a time. A run is a function of its key and of the data alone, in a process with
one thread. What differs between grids is in `Grid`."""
import argparse, csv, fcntl, io, os, signal, threading, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Callable
from fastprogress.fastprogress import format_time

def open_rows(path):
    "The file to append to, locked so that no other grid does, without a torn last line"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    f = open(path, 'a+b', buffering=0)
    try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        raise SystemExit(f'{path}: another grid is writing to it') from None
    f.seek(0)
    f.truncate(f.read().rfind(b'\n')+1)
    return f

def follow_parent():
    "End this process with the one that started it, however that ended"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    def follow():
        parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()

@dataclass
class Grid:
    "What one grid has of its own"
    run:Callable # From a key and `data` to a row; a function of a module, for other processes call it
    key_columns:tuple # Columns that make the key, joined by `/`
    columns:tuple # All columns
    outcome:str # The column that two runs of a key must agree on bit for bit
    check:Callable = lambda keys, stored, data: None # Raises if runs could not be compared with the stored rows

    def key_of(self, row): return '/'.join(row[k] for k in self.key_columns)

    def stored_rows(self, path):
        "Rows by key; a last line without its end is not a row"
        text = Path(path).read_text() if Path(path).exists() else ''
        return {self.key_of(r):r for r in csv.DictReader(io.StringIO(text[:text.rfind('\n')+1]))}

    def append(self, f, row):
        "Add a whole line to `f`, and above the first one the header, in one write that has reached the disk"
        s = io.StringIO()
        w = csv.DictWriter(s, self.columns, lineterminator='\n')
        if not os.fstat(f.fileno()).st_size: w.writeheader()
        w.writerow(row)
        os.write(f.fileno(), s.getvalue().encode())
        os.fsync(f.fileno())

    def rows(self, keys, workers, data):
        "Rows of `keys` as they finish, from `workers` processes of one thread each"
        os.environ['OMP_NUM_THREADS'] = '1'
        with ProcessPoolExecutor(workers, get_context('spawn'), follow_parent) as ex:
            try:
                futures = [ex.submit(self.run, k, data) for k in keys]
                for f in as_completed(futures): yield f.result()
            finally: ex.shutdown(cancel_futures=True)

    def run_keys(self, keys, path, workers=2, data=None):
        "Run the `keys` that have no row at `path`, and add their rows"
        with open_rows(path) as f:
            stored,t = self.stored_rows(path),time.time()
            todo = [k for k in keys if k not in stored]
            self.check(todo, stored, data)
            for i,r in enumerate(self.rows(todo, workers, data), 1):
                self.append(f, r)
                left = format_time((time.time()-t)/i*(len(todo)-i))
                done = f'[{len(keys)-len(todo)+i}/{len(keys)}] {self.key_of(r)}'
                print(f"{done}: {self.outcome} {r[self.outcome]:.3f}, {r['seconds']} s; {left} to go", flush=True)
        print(f'{len(keys)} runs in {path}')

    def once(self, key, path, data=None):
        "Run `key` again beside its stored row; whether the outcomes are equal bit for bit"
        new,old = self.run(key, data)[self.outcome],self.stored_rows(path).get(key, {}).get(self.outcome)
        same = old is not None and float(old)==new
        print(f"{key}: {self.outcome} {new!r}, stored {old or 'none'}: {'bit-equal' if same else 'not equal'}")
        return same

def parser(name, doc, out):
    "The flags that every grid has"
    question = doc.split('\n\n')[0]
    p = argparse.ArgumentParser(f'python -m experiments.{name}', description=question, allow_abbrev=False)
    p.add_argument('--wikitext', metavar='PATH',
                   help='folder with train.txt and valid.txt, tokenized already; without it no run on wikitext')
    p.add_argument('--only', metavar='GLOB', nargs='+', default=['*'], help='runs whose key matches')
    p.add_argument('--workers', type=int, default=2, help='processes, one thread each (default: 2)')
    p.add_argument('--out', metavar='CSV', default=Path(__file__).parent/'results'/out,
                   help=f'rows (default: experiments/results/{out})')
    p.add_argument('--list', action='store_true', help='print the grid, what is done and what is to do, and stop')
    p.add_argument('--once', metavar='KEY', help='run a key again, compare with its row, and stop')
    return p

def matching(keys, globs): return [k for k in keys if any(fnmatchcase(k, o) for o in globs)]

def print_list(keys, stored):
    for k in keys: print('done ' if k in stored else 'to do', k)
    print(f'{len(keys)} runs, {sum(k in stored for k in keys)} done')
