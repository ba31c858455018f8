"""Acceptance on a card, one row for each check: python -m benchmarks.gpu

The rows are the checks of `benchmarks.gpu_checks`, in parts: A environment, B draw, C moves, D waits of the host,
E compile, F loss, G learner, H cuDNN, I checkpoint, J command, K two cards, L figures, M `pytest -m cuda`. A row is ok,
failed, or skipped and why, with its seconds and figures. `results/gpu-<card>.json` is written after each row. The same
command continues where it stopped, and repeats what was not ok or of another commit. Each group of checks, `--group 1`
to `--group 4`, takes at most eight minutes. `--device cpu` is the dry run, at small sizes.
"""
import argparse, json, os, sys, time, traceback
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # before CUDA starts: deterministic products
from importlib.util import find_spec
from pathlib import Path
import torch
from torch.nn import functional as F
from benchmarks.common import provenance
from benchmarks.gpu_checks import Setting, checks

def missing(need, device):
    "Why `need` is not met on `device`; None if it is"
    card = device.type=='cuda'
    if need=='card': return None if card else 'no card'
    if need=='two cards': return None if card and torch.cuda.device_count()>1 else 'fewer than two cards'
    if need=='fused loss':
        there = hasattr(F, 'linear_cross_entropy')
        return None if there else f'torch {torch.__version__} has no F.linear_cross_entropy'
    packages = ('pytest','hypothesis') if need=='pytest' else (need,) # tests/conftest.py imports both
    absent = [o for o in packages if not find_spec(o)]
    return f'{absent[0]} is not installed' if absent else None

def run_check(check, setting):
    "The row of one check"
    reasons = list(filter(None, [missing(o, setting.device) for o in check.needs]))
    row = dict(part=check.part, name=check.name, group=check.group)
    if reasons: return dict(row, result='skipped', why=reasons[0], seconds=0.)
    began = time.perf_counter()
    try: row.update(result='ok', figures=check.run(setting) or {})
    except Exception as e:
        row.update(result='failed', why=f'{type(e).__name__}: {e}'[:1500], where=traceback.format_exc()[-600:])
    return dict(row, seconds=round(time.perf_counter()-began, 1))

def read_rows(path, now):
    "The rows of an earlier call that count for this one: ok, of the same commit, versions and hardware"
    if not path.exists(): return {}
    kept = [r for r in json.loads(path.read_text())['rows'] if r['result']=='ok']
    def same(row): return all(row[k]==now[k] for k in ('commit','hardware','versions'))
    return {r['name']:r for r in kept if same(r)}

def write_rows(path, now, rows):
    "All rows in the order of the checks; the file is whole at any time"
    rows = [rows[c.name] for c in checks if c.name in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(dict(card=now['hardware'], rows=rows), indent=1, default=str)+'\n')
    os.replace(tmp, path)

def default_path(device):
    "Next to the other results for a card; out of the way for a dry run"
    name = torch.cuda.get_device_name(device) if device.type=='cuda' else 'cpu'
    folder = 'benchmarks/results' if device.type=='cuda' else 'build'
    return Path(__file__).parent.parent/folder/f"gpu-{'-'.join(name.lower().split())}.json"

def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--device', default='cuda', help='cuda, or cpu for the dry run')
    p.add_argument('--group', type=int, default=0, help='1 to 4: a part of at most eight minutes (0: all)')
    p.add_argument('--only', default='', help='names of checks that begin so')
    p.add_argument('--out', help='file to write')
    p.add_argument('--limit', type=float, default=480, help='seconds after which a group begins no further check')
    return p.parse_args(argv)

def run_group(group, setting, args, path, now, rows):
    "Run the checks of `group` that `rows` lacks, and write each row"
    began = time.perf_counter()
    for c in checks:
        if c.group!=group or c.name in rows or not c.name.startswith(args.only): continue
        if time.perf_counter()-began > args.limit:
            print(f'group {group} is out of time: the same command continues')
            return
        rows[c.name] = {**run_check(c, setting), **now}
        write_rows(path, now, rows)
        r = rows[c.name]
        print(r['part'], r['result'].ljust(7), f"{r['seconds']:6.1f} s ", c.name, r.get('why', '')[:300], flush=True)

def main(argv=None):
    args = arguments(argv)
    device = torch.device(args.device)
    if device.type=='cuda' and not torch.cuda.is_available():
        sys.exit(f'torch {torch.__version__} sees no card; --device cpu is the dry run')
    path,now = Path(args.out) if args.out else default_path(device),provenance(args.device)
    rows = read_rows(path, now)
    for group in sorted({c.group for c in checks}):
        if args.group in (0, group): run_group(group, Setting(device, device.type=='cpu'), args, path, now, rows)
    failed = [r['name'] for r in rows.values() if r['result']=='failed']
    print(path, f"{len(rows)} of {len(checks)} rows, {len(failed)} failed")
    return bool(failed)

if __name__=='__main__': sys.exit(main())
