"""Pins `python -m benchmarks.gpu`: its dry run passes, rows survive an interruption, the old loss fails there."""
import json, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.nn import functional as F

root = Path(__file__).parent.parent
sys.path.insert(0, str(root)) # `benchmarks` is no part of the installed package
from benchmarks import gpu
from benchmarks.gpu_checks import Check, checks

no_fused_loss = gpu.missing('fused loss', torch.device('cpu'))

def rows(path): return {r['name']:r for r in json.loads(path.read_text())['rows']}

def test_dry_run(tmp_path):
    out = tmp_path/'gpu.json'
    cmd = [sys.executable, '-m', 'benchmarks.gpu', '--device', 'cpu', '--out', out]
    r = subprocess.run(cmd, cwd=root, capture_output=True, text=True)
    found = rows(out)
    assert r.returncode==0, [o for o in found.values() if o['result']=='failed'] or r.stderr
    assert list(found)==[c.name for c in checks] and {o['part'] for o in found.values()}==set('ABCDEFGHIJKLM')
    skipped = {o['name'] for o in found.values() if o['result']=='skipped'}
    def lacks_something(check): return any(gpu.missing(o, torch.device('cpu')) for o in check.needs)
    assert skipped=={c.name for c in checks if lacks_something(c)}
    assert all(o['why'] for o in found.values() if o['name'] in skipped)

def test_names_and_groups():
    assert len({c.name for c in checks})==len(checks) and {c.group for c in checks}=={1,2,3,4}

@pytest.fixture
def three(monkeypatch):
    "Three checks: one passes, one fails until it is mended, one needs a card; `ran` lists what ran"
    ran,broken = [],[True]
    def fine(s):
        ran.append('fine')
        return dict(figure=1)
    def fails(s):
        ran.append('fails')
        assert not broken, 'broken'
    three = [Check('fine', 'A', 1, (), fine), Check('fails', 'B', 2, (), fails), Check('card', 'C', 2, ('card',), fine)]
    monkeypatch.setattr(gpu, 'checks', three)
    return ran,broken

def test_a_second_call_repeats_what_failed(three, tmp_path):
    ran,broken = three
    args = ['--device', 'cpu', '--out', str(tmp_path/'gpu.json')]
    assert gpu.main(args)==1
    found = rows(tmp_path/'gpu.json')
    assert {k:r['result'] for k,r in found.items()}==dict(fine='ok', fails='failed', card='skipped')
    assert found['fine']['figures']==dict(figure=1)
    assert 'broken' in found['fails']['why'] and found['card']['why']=='no card'
    broken.clear()
    assert gpu.main(args)==0 and ran==['fine','fails','fails']
    assert {r['result'] for r in rows(tmp_path/'gpu.json').values()}=={'ok','skipped'}

def test_rows_of_another_commit_do_not_count(three, tmp_path, monkeypatch):
    ran,_ = three
    args = ['--device', 'cpu', '--out', str(tmp_path/'gpu.json'), '--group', '1']
    gpu.main(args)
    monkeypatch.setattr(gpu, 'provenance', lambda device: dict(commit='other', hardware='', versions=''))
    gpu.main(args)
    assert ran==['fine','fine']

def test_each_row_is_written_when_it_is_there(three, tmp_path, monkeypatch):
    def stop(s): raise KeyboardInterrupt
    monkeypatch.setattr(gpu.checks[1], 'run', stop)
    with pytest.raises(KeyboardInterrupt): gpu.main(['--device', 'cpu', '--out', str(tmp_path/'gpu.json')])
    assert list(rows(tmp_path/'gpu.json'))==['fine']

def test_a_group_and_its_limit(three, tmp_path):
    ran,_ = three
    args = ['--device', 'cpu', '--out', str(tmp_path/'gpu.json')]
    gpu.main([*args, '--limit', '-1'])
    assert ran==[]
    gpu.main([*args, '--group', '2'])
    assert ran==['fails']

def test_no_card():
    if torch.cuda.is_available(): pytest.skip('there is a card')
    with pytest.raises(SystemExit, match='sees no card'): gpu.main([])

def as_it_was(x, decoder, targ):
    "The loss before it was mended: averaged in the number format of autocast, in a card's pieces of 16 rows"
    x,w,b = x.flatten(0, -2),decoder.weight,decoder.bias
    if torch.is_autocast_enabled('cpu'): x,w,b = (o.to(torch.get_autocast_dtype('cpu')) for o in (x, w, b))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    return F.linear_cross_entropy(x, w, targ.flatten(), linear_bias=b, options=options)

@pytest.mark.skipif(no_fused_loss is not None, reason=no_fused_loss or '')
@pytest.mark.filterwarnings('ignore:overflow')
def test_the_loss_as_it_was_fails_its_rows(tmp_path, monkeypatch):
    out = tmp_path/'gpu.json'
    args = ['--device', 'cpu', '--out', str(out), '--only', 'loss']
    monkeypatch.setattr('benchmarks.gpu_checks.linear_loss', as_it_was)
    assert gpu.main(args)==1
    found = rows(out)
    half = {k for k in found if k.startswith(('loss fp16','loss bf16'))}
    assert len(half)==4 and {k for k,r in found.items() if r['result']=='failed'}==half
    monkeypatch.undo()
    assert gpu.main(args)==0
