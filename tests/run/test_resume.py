"""Pins that a resumed run ends with the bits of an uninterrupted one, after kills, torn files, full disks and signals.

EMBDROP_KILLS (5) is how often `test_killed_at_any_time` kills. Fits of other kinds are in test_checkpoint.py."""
import json, multiprocessing, os, pickle, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.basics import Callback, defaults
from fastai_embdrop.run.checkpoint import _checkpoint_files, last_checkpoint, read_checkpoint
from fastai_embdrop.run.files import run_lock, write_atomic
from fastai_embdrop.run.folder import _run_files
from fastai_embdrop.run.train import main
from running import TINY, Bomb, fails, flags, text

KILLS = int(os.environ.get('EMBDROP_KILLS', 5))
new,prev = _checkpoint_files

# A run

def same_run(a, b):
    "Do two finished runs differ in nothing but `out`, `save_every` and the time they took?"
    assert sorted(os.listdir(a))==sorted(os.listdir(b))==sorted(_run_files)
    for f in 'model.pth','vocab.json','sample.txt','losses.png','schedule.png':
        assert (a/f).read_bytes()==(b/f).read_bytes(), f
    hists = [pd.read_csv(o/'history.csv').drop(columns='time') for o in (a,b)]
    assert hists[0].equals(hists[1]) and len(hists[0])==TINY['epochs']
    cfgs = [json.loads((o/'config.json').read_text()) for o in (a,b)]
    for c in cfgs: c['settings'] = {k:v for k,v in c['settings'].items() if k not in ('out','save_every')}
    assert cfgs[0]==cfgs[1]

@pytest.fixture(scope='module')
def whole(text, tmp_path_factory):
    "A run that nothing happened to"
    out = tmp_path_factory.mktemp('whole')/'run'
    assert main(flags(data=text, out=out)) is None
    return out

class Hook(Callback):
    "Calls `at` with itself after each batch, in training and validation"
    at = None
    def after_batch(self):
        if Hook.at: Hook.at(self)

@pytest.fixture
def hook(monkeypatch):
    "Set what `Hook` does in each run to come"
    monkeypatch.setattr(defaults, 'callbacks', [*defaults.callbacks, Hook])
    yield lambda f: monkeypatch.setattr(Hook, 'at', f)

def at_batch(n, f, training=True):
    "For `hook`: do `f` after training batch `n`, or in the validation after it"
    return lambda cb: f() if cb.training==training and cb.train_iter==n else None

def raises(e):
    def f(*_, **__): raise e
    return f

@pytest.fixture
def args(text, tmp_path): return flags(data=text, out=tmp_path/'run', save_every=4)

@pytest.fixture
def broken(args, hook):
    "A run that broke off after batch 15: checkpoints after 12 and 8"
    hook(at_batch(15, raises(RuntimeError('broken'))))
    with pytest.raises(RuntimeError, match='broken'): main(args)
    hook(None)
    return Path(args[args.index('--out')+1])

def test_resume_begins_a_run(whole, args, tmp_path):
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

def test_resume_goes_on(whole, args, broken):
    assert sorted(os.listdir(broken))==sorted(_checkpoint_files)
    assert [read_checkpoint(broken/f)['train_iter'] for f in _checkpoint_files]==[12,8]
    assert main([*args, '--resume', '--save_every', '7']) is None
    same_run(whole, broken)

def test_adapt_resumes(args, tmp_path, hook, monkeypatch):
    "With a rule that counts: a run that forgot its measurements would start again at 0"
    monkeypatch.setattr('fastai_embdrop.adapt.feedback_p', lambda history, max_p: min(max_p, .01*len(history)))
    whole,args = tmp_path/'adapted',[*args, '--sched', 'adapt']
    assert main([*args, '--out', str(whole)]) is None
    hook(at_batch(15, raises(RuntimeError('broken'))))
    with pytest.raises(RuntimeError, match='broken'): main(args)
    hook(None)
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

def test_a_begun_run_is_not_overwritten_unasked(capsys, whole, args, broken):
    assert 'holds an unfinished run; --resume continues it, --overwrite replaces it' in fails(capsys, *args)
    assert 'not allowed with' in fails(capsys, *args, '--overwrite', '--resume')
    assert main([*args, '--overwrite']) is None
    same_run(whole, broken)

@pytest.mark.parametrize('where', ['fastai_embdrop.run.train._save_run', 'fastai_embdrop.run.folder._save_plot',
                                   'fastai.text.all.LMLearner.predict'])
def test_broken_while_the_files_are_written(whole, args, tmp_path, monkeypatch, where):
    with monkeypatch.context() as m:
        m.setattr(where, raises(RuntimeError('broken')))
        with pytest.raises(RuntimeError, match='broken'): main(args)
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

@pytest.mark.parametrize('n', [1,2,3])
def test_broken_between_renames(whole, args, tmp_path, monkeypatch, n):
    real,calls = os.replace,[]
    def replace(a, b):
        calls.append(b)
        if len(calls)>=n: raise RuntimeError('broken')
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', replace)
        with pytest.raises(RuntimeError, match='broken'): main(args)
    assert [(tmp_path/'run'/f).exists() for f in _checkpoint_files]==[n==2, n==3]
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

def test_a_finished_run_is_left_alone(capsys, whole, text, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(whole, out)
    (out/'lock').write_text('12345')
    def stamps(): return {f:(out/f).stat().st_mtime_ns for f in _run_files}
    before,args = stamps(),[*flags(data=text, out=out), '--resume']
    capsys.readouterr()
    assert main(args) is None and capsys.readouterr().out==f'{out}: this run is finished\n'
    assert 'not epochs: 2 -> 3' in fails(capsys, *args, '--epochs', 3)
    assert stamps()==before and not (out/'lock').exists()
    assert 'holds a run; --overwrite' in fails(capsys, *args[:-1])

@pytest.mark.parametrize('key,value,msg', [('lr',.02,'lr: 0.01 -> 0.02'), ('seed',1,'seed: 42 -> 1'),
                                           ('bs',8,'bs: 4 -> 8'), ('max_words',500,'text: ')])
def test_changed_settings_are_refused(capsys, args, broken, key, value, msg):
    old = (broken/new).read_bytes()
    assert msg in fails(capsys, *args, '--resume', f'--{key}', value)
    assert (broken/new).read_bytes()==old and sorted(os.listdir(broken))==sorted(_checkpoint_files)

def test_changed_text_is_refused_and_moved_text_is_not(capsys, args, broken, text, tmp_path, whole):
    (tmp_path/'other.txt').write_text(text.read_text()+' w1')
    (tmp_path/'moved.txt').write_text(text.read_text())
    assert 'text: ' in fails(capsys, *args, '--resume', '--data', tmp_path/'other.txt')
    assert main([*args, '--resume', '--data', str(tmp_path/'moved.txt')]) is None

@pytest.mark.filterwarnings('default')
def test_other_versions_warn(capsys, args, broken, monkeypatch):
    monkeypatch.setattr('fastai_embdrop.run.train.__version__', '9.9')
    main([*args, '--resume'])
    err = capsys.readouterr().err
    assert err.startswith('embdrop-train: an uninterrupted run may end differently')
    assert 'fastai_embdrop: 0.1.0 -> 9.9' in err and err.count('\n')==1

# Files

@pytest.mark.filterwarnings('default')
def test_a_torn_file_falls_back(capsys, whole, args, broken):
    (broken/new).write_bytes((broken/new).read_bytes()[:5000])
    assert main([*args, '--resume']) is None
    err = capsys.readouterr().err
    assert f'{new}: not a whole checkpoint (File is not a zip file); using {prev} instead' in err and err.count('\n')==1
    same_run(whole, broken)

@pytest.mark.filterwarnings('default')
def test_two_torn_files_are_refused(capsys, args, broken):
    for f in _checkpoint_files: (broken/f).write_bytes(b'')
    capsys.readouterr()
    assert main([*args, '--resume'])==2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'embdrop-train: {broken/prev}: not a whole checkpoint')
    assert sorted(os.listdir(broken))==sorted(_checkpoint_files)

def test_no_code_in_a_checkpoint_runs(broken, tmp_path):
    state = torch.load(broken/new, weights_only=True)
    torch.save({**state, 'info':Bomb(tmp_path/'boom')}, broken/new)
    with pytest.warns(UserWarning, match='using .* instead'): assert last_checkpoint(broken)['train_iter']==8
    (broken/new).write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
    with pytest.raises(ValueError): read_checkpoint(broken/new)
    assert not (tmp_path/'boom').exists()

def full_disk(tmp): tmp.symlink_to('/dev/full')

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('block,msg', [(full_disk,'No space left on device'), (Path.mkdir,'Is a directory')])
def test_no_more_can_be_written(capsys, whole, args, hook, tmp_path, block, msg):
    out = tmp_path/'run'
    hook(at_batch(10, lambda: block(out/f'{new}.tmp')))
    assert fails(capsys, *args)==f'embdrop-train: {out/new}: cannot be written ({msg})\n'
    assert last_checkpoint(out)['train_iter']==8
    hook(None)
    if (out/f'{new}.tmp').exists(): (out/f'{new}.tmp').rmdir()
    assert main([*args, '--resume']) is None
    same_run(whole, out)

def test_disk_full_at_the_end(capsys, whole, args, tmp_path, monkeypatch):
    full = raises(OSError(28, 'No space left on device'))
    with monkeypatch.context() as m:
        m.setattr('fastai_embdrop.run.folder.write_atomic', lambda path, write: write_atomic(path, full))
        assert fails(capsys, *args).endswith('schedule.png: cannot be written (No space left on device)\n')
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

# Signals

signals = pytest.mark.parametrize('sig,code', [(signal.SIGINT,130), (signal.SIGTERM,143)])

@signals
@pytest.mark.parametrize('training,n,last', [(True,15,15), (False,26,26)])
def test_a_signal_ends_the_run_at_a_checkpoint(whole, args, hook, tmp_path, sig, code, training, n, last):
    hook(at_batch(n, lambda: signal.raise_signal(sig), training))
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code==code and last_checkpoint(tmp_path/'run')['train_iter']==last
    hook(None)
    assert main([*args, '--resume']) is None
    same_run(whole, tmp_path/'run')

def test_a_second_signal_does_not_wait(args, hook, tmp_path):
    def raise_both():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    hook(at_batch(15, raise_both))
    with pytest.raises(SystemExit): main(args)
    assert last_checkpoint(tmp_path/'run')['train_iter']==12

@signals
@pytest.mark.parametrize('where,begun', [('tokenize',False), ('_save_run',True)])
def test_a_signal_outside_of_the_fit_ends_at_once(args, tmp_path, monkeypatch, sig, code, where, begun):
    monkeypatch.setattr(f'fastai_embdrop.run.train.{where}', lambda *_: signal.raise_signal(sig))
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code==code and (tmp_path/'run').exists()==begun

def test_handlers_are_given_back(args):
    before = [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM)]
    main(args)
    assert [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM)]==before

def test_runs_outside_of_the_main_thread(whole, args, tmp_path):
    t = threading.Thread(target=main, args=(args,))
    t.start()
    t.join()
    same_run(whole, tmp_path/'run')

# Processes

def test_the_lock(capsys, args, broken):
    (broken/'lock').write_text('12345, which is dead')
    with run_lock(broken): assert f'process {os.getpid()} is writing there' in fails(capsys, *args, '--resume')
    assert sorted(os.listdir(broken))==sorted(_checkpoint_files)

def command(args):
    code = 'import sys; from fastai_embdrop.run.train import main; sys.exit(main())'
    cmd = [sys.executable, '-c', code, *args]
    return subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='module')
def start(text):
    "Start `main` in a process of its own, forked from one that has imported it"
    if 'forkserver' not in multiprocessing.get_all_start_methods(): pytest.skip('needs fork')
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['fastai_embdrop.run.train'])
    def f(out):
        p = ctx.Process(target=main, args=([*flags(data=text, out=out, save_every=3), '--resume'],))
        p.start()
        return p
    with pytest.MonkeyPatch.context() as m:
        m.setenv('OMP_NUM_THREADS', '1')
        yield f

def test_the_command_refuses_company_and_ends_at_a_checkpoint(capsys, args, tmp_path):
    out,args = tmp_path/'run',[*args, '--epochs', '1000']
    p = command(args)
    while not (out/prev).exists():
        assert p.poll() is None
        time.sleep(.01)
    assert fails(capsys, *args, '--resume')==f'embdrop-train: {out}: process {p.pid} is writing there\n'
    p.terminate()
    assert p.communicate()[1]=='' and p.returncode==143
    assert {*_checkpoint_files} <= {*os.listdir(out)} <= {*_checkpoint_files, 'history.csv'}
    assert last_checkpoint(out)['train_iter']>4

def test_killed_at_any_time(start, tmp_path, capsys):
    def wait(out):
        p,t = start(out),time.time()
        p.join()
        assert p.exitcode==0
        return time.time()-t
    wait(tmp_path/'warm')
    ref,out = tmp_path/'whole',tmp_path/'run'
    took,kills,ends = wait(ref),0,0
    while kills<KILLS:
        p = start(out)
        p.join(random.uniform(0, took))
        if p.is_alive():
            p.kill()
            p.join()
            kills += 1
        else:
            same_run(ref, out)
            shutil.rmtree(out)
            ends += 1
    wait(out)
    same_run(ref, out)
    with capsys.disabled(): print(f'\n{kills} kills in {ends+1} runs, each ending as one without kills', end=' ')
