"What the benchmarks share: timing in turn, peak memory of a process, a table, and a CSV that says where it is from."
import argparse, csv, datetime, os, platform, subprocess, sys, time
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
    "Median milliseconds of each of `fs`, a dict of functions, run in turn: a drift of the machine hits all alike"
    times = {k:[] for k in fs}
    for i in range(warmup+runs):
        for k,f in fs.items():
            sync(device)
            t = time.perf_counter()
            f()
            sync(device)
            if i>=warmup: times[k].append(1000*(time.perf_counter()-t))
    return {k:median(v) for k,v in times.items()}

class Memory:
    "High-water mark of this process or of the card, MB"
    def __init__(self, device): self.cuda = device.startswith('cuda')

    def reset(self):
        if self.cuda: torch.cuda.reset_peak_memory_stats()
        else: Path('/proc/self/clear_refs').write_text('5')

    def _status(self, key):
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(l.split()[1]) for l in lines if l.startswith(key))/1024

    def now(self): return torch.cuda.memory_allocated()/2**20 if self.cuda else self._status('VmRSS')
    def peak(self): return torch.cuda.max_memory_allocated()/2**20 if self.cuda else self._status('VmHWM')

def hardware(device):
    "The card's name, or the processor's and the number of threads"
    if device.startswith('cuda'): return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [l.split(':')[1].strip() for l in lines if l.startswith('model name')]
    return f'{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads'

def allocator(device):
    "The setting of the allocator, which decides whether freed memory is fetched from the kernel again"
    on_card = device.startswith('cuda')
    names = ('PYTORCH_CUDA_ALLOC_CONF','PYTORCH_ALLOC_CONF') if on_card else ('MALLOC_','LD_PRELOAD','GLIBC_TUNABLES')
    chosen = [f'{k}={v}' for k,v in sorted(os.environ.items()) if k.startswith(names)]
    return ' '.join(chosen) or ("torch's defaults" if on_card else f'{platform.libc_ver()[0]} defaults')

def git(*args):
    return subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

def provenance(device):
    "Columns for every row: commit (+ if the package was changed since), command, hardware, versions, load, and so on"
    spec = sys.modules['__main__'].__spec__
    changed = git('status', '--porcelain', '../fastai_embdrop')
    return dict(commit=git('rev-parse', '--short', 'HEAD') + ('+' if changed else ''),
                command=' '.join(['python', '-m', spec.name if spec else '?', *sys.argv[1:]]),
                hardware=hardware(device),
                versions=f'torch {torch.__version__}, fastai {fastai.__version__}, Python {platform.python_version()}',
                load=f'{os.getloadavg()[0]:.1f} of {os.cpu_count()}', allocator=allocator(device),
                date=datetime.date.today().isoformat())

def report(what, rows, device):
    "Print `rows`, a list of dicts, as a table and write them to results/<what>-<device>.csv"
    widths = {k:max(len(k), *(len(str(r[k])) for r in rows)) for k in rows[0]}
    for r in [{k:k for k in widths}, *rows]: print('  '.join(str(r[k]).rjust(w) for k,w in widths.items()))
    path,where = Path(__file__).parent/'results'/f'{what}-{device.split(":")[0]}.csv',provenance(device)
    with path.open('w', newline='') as f:
        w = csv.DictWriter(f, [*rows[0], *[k for k in where if k not in rows[0]]]) # a row may know its allocator better
        w.writeheader()
        w.writerows({**where, **r} for r in rows)
    print(path)
