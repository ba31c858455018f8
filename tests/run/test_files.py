"Pins careful reading and writing: text, strangers' weights, files whole or not at all (on a full disk too), the lock."
import json, os, subprocess, sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
import pytest, torch
from fastai_embdrop.run.files import load_weights, _read_text, read_vocab, run_lock, write_atomic, _write_text
from running import Bomb

# Text

def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path/'a.txt').write_bytes('\ufeffone\r\ntwo\rthree\n'.encode())
    assert _read_text(tmp_path/'a.txt') == 'one\ntwo\nthree\n'

@pytest.mark.parametrize('head', [b'', '\ufeff'.encode()])
def test_not_utf8(tmp_path, head):
    "The byte's place is counted without the byte order mark"
    (tmp_path/'a.txt').write_bytes(head+b'caf\xe9')
    with pytest.raises(ValueError, match='a.txt: not UTF-8 at byte 3$'): _read_text(tmp_path/'a.txt')

@pytest.mark.parametrize('text', ['', ' \n\t ', '\ufeff'])
def test_empty(tmp_path, text):
    (tmp_path/'a.txt').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='a.txt: no text'): _read_text(tmp_path/'a.txt')

# Weights

def crafted(metadata):
    "Weights with an attribute that `load_state_dict` reads"
    wgts = OrderedDict(weight=torch.ones(2, 2), bias=torch.ones(2))
    wgts._metadata = metadata
    return wgts

@pytest.mark.parametrize('metadata', ['x', 5, {'':5}, {'':{'version':'a'}}])
def test_crafted_metadata_is_left_out(tmp_path, metadata):
    torch.save(crafted(metadata), tmp_path/'a.pth')
    wgts = load_weights(tmp_path/'a.pth')
    assert type(wgts) is dict and list(wgts)==['weight','bias']
    model = torch.nn.Linear(2, 2)
    model.load_state_dict(wgts)
    assert torch.equal(model.weight, torch.ones(2, 2))

@pytest.mark.parametrize('attr', ['values','keys'])
def test_crafted_methods_are_refused_or_without_effect(tmp_path, attr):
    wgts = OrderedDict(weight=torch.ones(2))
    wgts.__dict__[attr] = 'x'
    torch.save(wgts, tmp_path/'a.pth')
    try: assert list(load_weights(tmp_path/'a.pth'))==['weight']
    except ValueError as e: assert str(e).startswith(f"{tmp_path/'a.pth'}: no weights that are safe to load")

def test_a_bomb_does_not_go_off(tmp_path):
    torch.save(dict(weight=Bomb(tmp_path/'boom')), tmp_path/'a.pth')
    with pytest.raises(ValueError, match='a.pth: no weights that are safe to load'): load_weights(tmp_path/'a.pth')
    assert not (tmp_path/'boom').exists()
    torch.load(tmp_path/'a.pth', weights_only=False)
    assert (tmp_path/'boom').exists(), 'it was a live one'

def test_no_such_file(tmp_path):
    for read in load_weights,_read_text,read_vocab:
        with pytest.raises(FileNotFoundError, match='nowhere'): read(tmp_path/'nowhere')

# Writing

def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path,prev = tmp_path/'a.txt',tmp_path/'b.txt'
    def interrupted(f):
        f.write(b'half')
        raise KeyboardInterrupt
    _write_text(path, 'old é')
    with pytest.raises(KeyboardInterrupt): write_atomic(path, interrupted, prev)
    assert path.read_text(encoding='utf-8')=='old é' and os.listdir(tmp_path)==['a.txt']
    write_atomic(path, lambda f: f.write(b'new'), prev)
    assert (path.read_text(), prev.read_text(encoding='utf-8'))==('new','old é')

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_weights_on_a_full_disk(tmp_path):
    (tmp_path/'a.pth.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'a.pth: cannot be written \(No space left on device\)'):
        write_atomic(tmp_path/'a.pth', partial(torch.save, dict(w=torch.zeros(10))))
    assert os.listdir(tmp_path)==[]

def test_an_error_of_the_disk_behind_another(tmp_path):
    "torch's zip writer puts a RuntimeError before it"
    def write(f):
        try: raise OSError(27, 'File too large')
        finally: raise RuntimeError('unexpected pos 704 vs 598')
    with pytest.raises(OSError, match=r'a.pth: cannot be written \(File too large\)'):
        write_atomic(tmp_path/'a.pth', write)
    assert os.listdir(tmp_path)==[]

def test_another_error_is_not_the_disks(tmp_path):
    def fail(f): raise RuntimeError('something else')
    with pytest.raises(RuntimeError, match='something else'): write_atomic(tmp_path/'a.pth', fail)
    assert os.listdir(tmp_path)==[]

# The lock

def test_one_job_at_a_time(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(OSError, match=f'process {os.getpid()} is writing there'):
            with run_lock(tmp_path): pass
        with pytest.raises(OSError, match=f'process {os.getpid()} is writing there'):
            with run_lock(tmp_path): pass
    with run_lock(tmp_path): pass
    assert os.listdir(tmp_path)==[]

def test_the_lock_holds_between_processes_and_ends_with_them(tmp_path):
    code = f'''
from fastai_embdrop.run.files import run_lock
with run_lock({str(tmp_path)!r}):
    print("locked", flush=True)
    input()'''
    job = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with job:
        assert job.stdout.readline()=='locked\n'
        with pytest.raises(OSError, match=f'process {job.pid} is writing there'):
            with run_lock(tmp_path): pass
        job.kill()
    assert sorted(os.listdir(tmp_path))==['lock','lock.pid'], 'it was killed'
    with run_lock(tmp_path): pass
    assert os.listdir(tmp_path)==[]

def test_only_rank_0_locks_and_writes(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    with run_lock(tmp_path),run_lock(tmp_path): _write_text(tmp_path/'a.txt', 'text')
    assert os.listdir(tmp_path)==[]

# Words

def test_a_vocabulary_begins_with_the_special_tokens(tmp_path):
    (tmp_path/'v.json').write_text(json.dumps(['xxunk','xxpad']))
    with pytest.raises(ValueError, match='v.json: does not begin with xxunk xxpad xxbos'): read_vocab(tmp_path/'v.json')
