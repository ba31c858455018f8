"What the benchmarks share: interleaved timing, peak memory in a process of its own, a table, a CSV that says where it comes from."
import argparse, csv, datetime, platform, subprocess, sys, time
from pathlib import Path
from statistics import median
import torch, fastai

def arguments(doc, **defaults):
    "`--device`, and a flag for each of `defaults`"
    p = argparse.ArgumentParser(description=doc)
    p.add_argument('--device', default='cpu')
    for k,v in defaults.items(): p.add_argument(f'--{k}', type=type(v), default=v)
    return p.parse_args()

def sync(device):
    if device.startswith('cuda'): torch.cuda.synchronize()

def interleave(fs, runs, device='cpu', warmup=2):
    "Median milliseconds of each of `fs`, a dict of functions, run in turn so that a drift of the machine hits all alike"
    times = {k:[] for k in fs}
    for i in range(warmup+runs):
        for k,f in fs.items():
            sync(device); t = time.perf_counter()
            f()
            sync(device)
            if i>=warmup: times[k].append(1000*(time.perf_counter()-t))
    return {k:median(v) for k,v in times.items()}

class Memory:
    "High-water mark of this process or of the card, MB"
    def __init__(self, device): self.cuda = device.startswith('cuda')
    def reset(self): torch.cuda.reset_peak_memory_stats() if self.cuda else Path('/proc/self/clear_refs').write_text('5')
    def _status(self, key): return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key))/1024
    def now(self): return torch.cuda.memory_allocated()/2**20 if self.cuda else self._status('VmRSS')
    def peak(self): return torch.cuda.max_memory_allocated()/2**20 if self.cuda else self._status('VmHWM')

def hardware(device):
    if device.startswith('cuda'): return torch.cuda.get_device_name(device)
    names = [l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').exists() else []
    return f'{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads'

def provenance(device):
    "Columns for every row: commit, command, hardware, versions, date"
    def git(*args): return subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    spec = sys.modules['__main__'].__spec__
    return dict(commit=git('rev-parse', '--short', 'HEAD') + '+'*bool(git('status', '--porcelain', 'fastai_embdrop', '../fastai_embdrop')),
                command=' '.join(['python', '-m', spec.name if spec else '?', *sys.argv[1:]]), hardware=hardware(device),
                versions=f'torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}', date=datetime.date.today().isoformat())

def report(what, rows, device):
    "Print `rows`, a list of dicts, as a table and write them to results/<what>-<device>.csv"
    widths = {k:max(len(k), *(len(str(r[k])) for r in rows)) for k in rows[0]}
    for r in [{k:k for k in widths}, *rows]: print('  '.join(str(r[k]).rjust(w) for k,w in widths.items()))
    path = Path(__file__).parent/'results'/f'{what}-{device.split(":")[0]}.csv'
    with path.open('w', newline='') as f:
        w = csv.DictWriter(f, [*rows[0], *(prov := provenance(device))])
        w.writeheader(); w.writerows({**r, **prov} for r in rows)
    print(path)
