"""Pins `Checkpoint` in a fit of any kind: resumed at any batch, it ends with the bits of an uninterrupted fit.

Also: which parts of a callback's state are kept, and as which type; a warning names the others; damaged files."""
import pickle, random, signal, warnings
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from fastai.basics import (AvgSmoothLoss, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, L, Learner,
                           OptimWrapper, accuracy, mse, set_seed)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import Hook
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai_embdrop.adapt import AdaptEmbedP
from fastai_embdrop.anneal import AnnealEmbedP, DropoutScheduler
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.checkpoint import (CSVHistory, Checkpoint, _from_plain as from_plain, _to_plain as to_plain,
                                           _checkpoint_files, last_checkpoint, read_checkpoint, _signal_handlers)
from fastai_embdrop.run.corpus import lm_dataloaders
from conftest import SMALL, random_tokens, small_dls

new,prev = _checkpoint_files

# Every batch of every kind of fit

class Keep(Checkpoint):
    "Keeps each checkpoint in memory"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = []
    def save(self): self.kept.append(as_bytes(self._state()))

def as_bytes(o):
    f = BytesIO()
    torch.save(o, f)
    return f.getvalue()

def lm():
    learn = awd_lstm_learner(small_dls(200), SMALL)
    return lambda cbs: learn.fit_one_cycle(2, 1e-2, cbs=[*cbs, AnnealEmbedP(.5, .05)]), learn

def documents():
    docs = [random_tokens(9, i) for i in range(12)]
    dls = lm_dataloaders(docs, docs[:4], tok='split', min_freq=1, bs=4, seq_len=8, device='cpu')
    learn = awd_lstm_learner(dls, {**SMALL, 'per':'sequence'})
    return lambda cbs: learn.fit(3, 1e-2, cbs=[*cbs, AnnealEmbedP(.5, .05), CSVHistory()]), learn

def constant():
    "`embed_p` other than the configured one, and the same at every batch"
    learn = awd_lstm_learner(small_dls(200), {**SMALL, 'per':'sequence', 'embed_p':.1})
    return lambda cbs: learn.fit(2, 1e-2, cbs=[*cbs, AnnealEmbedP(.4, .4)]), learn

def tuned():
    "Two fits of the same size in one call, and a schedule over both"
    learn,sched = awd_lstm_learner(small_dls(200), SMALL),AnnealEmbedP(.5, .05, epochs=2)
    return lambda cbs: learn.fine_tune(1, 1e-2, cbs=[*cbs, sched]), learn

def adapted():
    "`embed_p` follows measurements that a callback keeps"
    learn = awd_lstm_learner(small_dls(200), SMALL)
    rule = lambda history: .05 + len(history)/40 + history[-1][2]%.01
    return lambda cbs: learn.fit(2, 1e-2, cbs=[*cbs, AdaptEmbedP(rule=rule)]), learn

def accumulated():
    "A step after every third batch; an epoch is no multiple of that"
    learn = awd_lstm_learner(small_dls(200), SMALL)
    assert len(learn.dls.train)%3
    return lambda cbs: learn.fit_one_cycle(2, 1e-2, cbs=[*cbs, GradientAccumulation(12), AnnealEmbedP(.5, .05)]), learn

def sparse():
    "Sparse gradients that wait for their step"
    ds = [(torch.tensor([i, (i*i)%20]), torch.tensor([i/7.])) for i in range(20)]
    dls = DataLoaders(DataLoader(ds, bs=4, shuffle=True), DataLoader(ds, bs=4), device='cpu')
    model = nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    learn = Learner(dls, model, mse, opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.SGD, **kw), wd=0.)
    return lambda cbs: learn.fit(3, 1e-2, cbs=[*cbs, GradientAccumulation(12)]), learn

class Noise(nn.Module):
    "Draws from all three generators"
    def forward(self, x): return x*np.random.rand()*random.random()*torch.rand(1)

class Scaled(MixedPrecision):
    "fastai's gradient scaler, on a CPU and in float32"
    def before_fit(self):
        self.learn.scaler = torch.amp.GradScaler('cpu', growth_interval=3)
        self.autocast,self.scales = torch.autocast('cpu', enabled=False),L()

class ScaleSeen(Callback):
    def __init__(self, seen): self.append = seen.append
    def after_batch(self): self.append(self.scaler.get_scale())

def regression():
    ds = [(torch.full((3,), float(i)), torch.tensor([i/7.])) for i in range(20)]
    dls = DataLoaders(DataLoader(ds, bs=4, shuffle=True), DataLoader(ds, bs=4), device='cpu')
    model = nn.Sequential(nn.Linear(3,4), nn.BatchNorm1d(4), nn.Dropout(.5), Noise(), nn.Linear(4,1))
    learn = Learner(dls, model, mse, opt_func=lambda ps, **kw: OptimWrapper(ps, torch.optim.AdamW, **kw))
    learn.seen = []
    cbs = [DropoutScheduler({'2.p':lambda pct: .5*pct}, epochs=6), EarlyStoppingCallback(patience=5), Scaled(),
           ScaleSeen(learn.seen)]
    return lambda o: learn.fit_flat_cos(3, 1e-2, cbs=[*o, *cbs]), learn

class Various(Callback):
    "Keeps its state in types of many kinds, and lets the weights depend on it"
    def before_fit(self):
        self.pairs,self.recent,self.seen,self.total = [],deque(maxlen=3),set(),np.zeros(2, np.float32)
        self.by_word = L()
    def after_batch(self):
        if not self.training: return
        loss = self.learn.loss.item()
        self.pairs.append((loss, len(self.pairs)))
        self.recent.append(loss)
        self.seen.add(round(loss, 1))
        self.total += np.float32(loss)
        self.by_word.append(self.total.copy())
        size = sum(self.recent) + len(self.recent) + len(self.seen) + float(self.total.sum()) + len(self.by_word)
        with torch.no_grad(): next(self.model.parameters()).mul_(1-1e-4*size)

def various():
    learn = awd_lstm_learner(small_dls(200), SMALL)
    return lambda cbs: learn.fit(2, 1e-2, cbs=[*cbs, Various()]), learn

def run_fit(make, state=None):
    "Checkpoints of a fit, and all that came of it"
    set_seed(1, reproducible=True)
    fit,learn = make()
    keep = Keep('.', 1, state)
    fit([keep])
    res = {k:getattr(learn.recorder, k, None) for k in ('losses','lrs','iters','values','hps')}
    draws = [random.random(), np.random.rand(), torch.rand(1)]
    return keep.kept,to_plain(res | dict(
        model=dict(learn.model.state_dict()), opt=learn.opt.state_dict(), pct=learn.pct_train, n=learn.train_iter,
        scale=getattr(learn, 'seen', [0])[-1], draws=draws))

def position(data):
    state = torch.load(BytesIO(data), weights_only=True)
    return len(state['finished']),state['epoch'],state['done']

def assert_alike(a, b):
    "Of the same types all through, and equal"
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor): return torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, np.ndarray): return np.testing.assert_array_equal(a, b, strict=True)
    if isinstance(a, dict): a,b = list(a.items()),list(b.items())
    if isinstance(a, deque): assert a.maxlen==b.maxlen
    if isinstance(a, (list,tuple,L,deque)):
        assert len(a)==len(b)
        for x,y in zip(a, b): assert_alike(x, y)
    else: assert a==b or (a!=a and b!=b)

kinds = [lm, documents, constant, tuned, adapted, accumulated, sparse, regression, various]

@pytest.mark.parametrize('make', kinds)
def test_resumed_at_every_batch(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept,whole = run_fit(make)
    last_fit = position(kept[-1])[0]
    assert sum(position(k)[0]==last_fit for k in kept)==whole['n'] and len(kept) > 10
    for i,k in enumerate(kept, 1):
        rest,res = run_fit(make, torch.load(BytesIO(k), weights_only=True))
        assert_alike(whole, res)
        assert len(rest)==len(kept)-i and (not rest or position(rest[0])==position(kept[i]))

# Where in a fit

class Killed(Callback):
    "As by a crash, in the `n`-th training batch since it was made"
    order = 2000
    def __init__(self, n): self.left = iter(range(n-1))
    def after_batch(self):
        if self.training and next(self.left, None) is None: raise RuntimeError('killed')

def killed(folder, n, fit=lambda learn, cbs: learn.fit(2, 1e-2, cbs=cbs), cb=Callback):
    "The last checkpoint of a fit that was killed"
    set_seed(1, reproducible=True)
    with pytest.raises(RuntimeError, match='killed'):
        fit(awd_lstm_learner(small_dls(200), SMALL), [Checkpoint(folder, 2), cb(), Killed(n)])
    return last_checkpoint(folder)

def test_other_callbacks_see_the_iteration_of_a_whole_epoch(tmp_path):
    class Seen(Callback):
        def before_fit(self): self.at = []
        def before_batch(self): self.at.append((self.epoch, self.training, int(self.iter)))
        def after_batch(self): self.at.append(int(self.iter))
    state = killed(tmp_path, 5, cb=Seen)
    fits = []
    for st in None,state:
        seen,learn = Seen(),awd_lstm_learner(small_dls(200), SMALL)
        learn.fit(2, 1e-2, cbs=[Checkpoint(tmp_path, 2, st), seen, Killed(99)])
        fits.append(seen.at)
        assert len(learn.cbs)==len(awd_lstm_learner(small_dls(200), SMALL).cbs)
    assert fits[0]==fits[1]

@pytest.mark.parametrize('epochs,n', [(1,9), (3,25), (3,8)])
def test_fine_tune(tmp_path, epochs, n, capsys):
    "Killed in the second fit, whose last checkpoint may still be of the first"
    def fit(learn, cbs): learn.fine_tune(epochs, 1e-2, cbs=cbs)
    state = killed(tmp_path/'killed', n, fit)
    assert len(state['finished'])==(n>8)
    models = []
    for folder,st in ('whole',None),('killed',state):
        set_seed(1, reproducible=True)
        learn = awd_lstm_learner(small_dls(200), SMALL)
        fit(learn, [Checkpoint(tmp_path/folder, 2, st), Callback(), Killed(99)])
        models.append(learn.model.state_dict())
    assert_alike(*models)
    assert capsys.readouterr().out==('fit 1 is finished: skipped\n' if n>8 else '')

def test_another_fit_is_refused(tmp_path):
    fit,learn = lm()
    fit([Checkpoint(tmp_path)])
    state = last_checkpoint(tmp_path)
    with pytest.raises(ValueError, match='callback .* csv_history'):
        lm()[0]([Checkpoint(tmp_path, state=state), CSVHistory()])
    with pytest.raises(ValueError, match='from 2 epochs of .* batches, but this fit has 3'):
        lm()[1].fit(3, cbs=Checkpoint(tmp_path, state=state))

def test_a_first_fit_of_another_length_is_refused(tmp_path):
    state = killed(tmp_path, 9, lambda learn, cbs: learn.fine_tune(1, cbs=cbs))
    with pytest.raises(ValueError, match='fit 1 of the checkpoint has 1 epochs, this one 2'):
        awd_lstm_learner(small_dls(200), SMALL).fit(2, cbs=[Checkpoint(tmp_path, 2, state), Callback(), Killed(99)])

def test_lr_find_writes_no_checkpoint(tmp_path):
    learn = awd_lstm_learner(small_dls(), SMALL, path=tmp_path, cbs=Checkpoint(tmp_path/'run', every=1))
    learn.lr_find(num_it=6, show_plot=False)
    assert not (tmp_path/'run').exists()

def test_between_the_fits_of_a_learner(tmp_path):
    "`validate`, `get_preds` and `lr_find` are no fits: they neither use up the state nor count as finished"
    state,models = killed(tmp_path/'killed', 13),[]
    for folder,st,between in ('whole',None,False),('killed',state,True):
        set_seed(1, reproducible=True)
        learn = awd_lstm_learner(small_dls(200), SMALL, path=tmp_path, cbs=Checkpoint(tmp_path/folder, 2, st))
        if between:
            with_state = learn.validate()
            with learn.removed_cbs(learn.checkpoint): assert with_state==learn.validate()
            learn.get_preds(reorder=False)
            learn.lr_find(num_it=6, show_plot=False)
            learn.opt = None
        learn.fit(2, 1e-2, cbs=[Callback(), Killed(99)])
        models.append(learn.model.state_dict())
        learn.validate()
        assert learn.checkpoint.finished==[2]
    assert_alike(*models)

def test_without_the_command_ctrl_c_is_a_keyboard_interrupt(tmp_path):
    ckpt,learn = Checkpoint(tmp_path, every=100),lm()[1]
    interrupt = Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT) if cb.train_iter==3 else None)
    deaf = _signal_handlers(signal.default_int_handler) # as jobs in the background are, from their start
    with deaf, pytest.raises(KeyboardInterrupt), ckpt.signals(): learn.fit(2, cbs=[ckpt, interrupt])
    assert last_checkpoint(tmp_path)['train_iter']==3

# What is kept

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
arrays = st.sampled_from([np.arange(6.).reshape(2,3), np.array([1,2], '>i4'), np.array([], np.float16), np.array(True)])
tensors = st.sampled_from([torch.arange(3), torch.tensor(.5), torch.zeros(0,2)])
def newest_two(items): return deque(items, 2)
def containers(o):
    "What holds up to three values drawn from `o`"
    lists = st.lists(o, max_size=3)
    by_name = st.dictionaries(st.text(max_size=3), o, max_size=3)
    by_number = st.dictionaries(st.integers(), o, max_size=3)
    return st.one_of(lists, lists.map(tuple), lists.map(L), lists.map(newest_two), by_name, by_number.map(OrderedDict))

values = st.recursive(scalars | arrays | tensors, containers, max_leaves=8)

@given(values)
def test_values_come_back_as_they_were(tmp_path_factory, o):
    path = tmp_path_factory.getbasetemp()/'values.pth'
    torch.save(dict(version=2, o=to_plain(o)), path)
    assert_alike(from_plain(read_checkpoint(path)['o']), o)

@pytest.mark.parametrize('o', [{1,2}, {}, [torch.tensor(1.), torch.tensor(2.)], [torch.tensor(1.), torch.tensor(2)]])
def test_these_too(o): assert_alike(from_plain(to_plain(o)), o)

def test_numpys_numbers_come_back_as_pythons():
    assert_alike(from_plain(to_plain([np.float64(.1), np.int8(3), np.bool_(True)])), [.1, 3, True])

unreadable = [np.array([None,'a'], dtype=object), np.array([Path('a')], dtype=object), np.datetime64('2024-01-01'),
              np.complex64(1j), np.array([1+2j]), 1j, date(2024,1,1), b'a', defaultdict(list), Counter('a'), [print],
              np.longdouble(1), {'__type__':'L', 'data':[]}, nn.Parameter(torch.zeros(1)), np.array(['a'])]

@pytest.mark.parametrize('o', unreadable, ids=lambda o: type(o).__name__)
def test_what_could_not_be_read_is_not_written(o, tmp_path):
    with pytest.raises(TypeError): to_plain(o)
    class Holds(Callback):
        def __init__(self): self.held = o
    learn = awd_lstm_learner(small_dls(200), SMALL)
    learn.fit(1, cbs=[Holds(), Checkpoint(tmp_path)])
    parts = last_checkpoint(tmp_path)['ranks'][0]['parts']
    assert [list(v) for k,v in parts.items() if k.endswith('holds')]==[[]]

# What is named because it is not kept

def not_kept(tmp_path, *cbs, n_epoch=2):
    "The warnings of a fit with these callbacks"
    learn = awd_lstm_learner(small_dls(200), SMALL, path=tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(n_epoch, cbs=[*cbs, Checkpoint(tmp_path, 1)])
    return [str(o.message).removeprefix('not in the checkpoint, so a resumed fit begins without it: ') for o in told]

def changing(make, change):
    "A callback with an attribute made by `make`, which `change` changes at each batch"
    class Changing(Callback):
        def before_fit(self): self.held = make()
        def before_batch(self): change(self.held)
    return Changing()

def total(counts): counts['a'] = counts.get('a', 0)+1
def grow(model):
    with torch.no_grad(): next(model.parameters()).add_(1)

state = {
    'Random':      (lambda: random.Random(1),          random.Random.random),
    'Generator':   (lambda: np.random.default_rng(1),  lambda o: o.random()),
    'RandomState': (lambda: np.random.RandomState(1),  lambda o: o.rand()),
    'Counter':     (Counter,                           total),
    'defaultdict': (lambda: defaultdict(int),          total),
    'dict':        (lambda: {'f':print},               total),
    'list':        (lambda: [random.Random(1)],        lambda o: o[0].random()),
    'Linear':      (lambda: nn.Linear(1,1),            grow),
    'BytesIO':     (BytesIO,                           lambda o: o.write(b'a')),
    'DataFrame':   (lambda: pd.DataFrame(dict(a=[0])), lambda o: o.iloc.__setitem__((0,0), o.a[0]+1)),
    'SimpleNamespace': (lambda: SimpleNamespace(n=0),  lambda o: vars(o).update(n=o.n+1)),
    'AvgSmoothLoss':   (AvgSmoothLoss,                 lambda o: vars(o).update(count=o.count+1))}

@pytest.mark.parametrize('name,make,change', [(k,*v) for k,v in state.items()], ids=state)
def test_state_that_is_left_out_is_named_once(tmp_path, name, make, change):
    assert not_kept(tmp_path, changing(make, change))==[f'Changing.held ({name})']
    assert not_kept(tmp_path, changing(make, lambda o: None))==[]

def test_a_generator_of_torchs_is_named(tmp_path):
    draws = changing(torch.Generator, lambda o: torch.rand(1, generator=o))
    assert not_kept(tmp_path, draws)==['Changing.held (Generator)']

def test_a_log_that_a_resumed_fit_would_write_anew_is_named(tmp_path):
    assert not_kept(tmp_path, CSVLogger())==['CSVLogger.file (TextIOWrapper)']
    assert not_kept(tmp_path, CSVLogger(append=True))==[]

class Drawn(Callback):
    "Like fastai's `ShowGraphCallback`, draws the losses into a figure that it keeps"
    def before_fit(self):
        self.fig,self.ax = plt.subplots()
        self.line, = self.ax.plot([])
    def after_batch(self):
        self.line.set_data(range(len(self.recorder.losses)), self.recorder.losses)
        self.ax.set_xlim(0, len(self.recorder.losses)+1)
    def after_fit(self): plt.close(self.fig)

def called(): called.n += 1
called.n = 0

class Refers(Callback):
    "Refers to what a checkpoint holds elsewhere, to what is made again, and to code that counts its calls"
    n = 0
    def before_fit(self):
        learn,rec = self.learn,self.recorder
        self.refs = SimpleNamespace(learn=learn, opt=learn.opt, model=learn.model, dls=learn.dls, recorder=rec, me=self,
                                    smooth=rec.smooth_loss, loss=rec.loss, metrics=list(learn.metrics))
        self.valid,self.modules_by_name = self.dls.valid,{'encoder':self.model[0]}
        self.code = SimpleNamespace(cls=Refers, func=called, module=ModuleType('counts'))
        self.hook = Hook(self.model[0], lambda m, inp, out: self.train_iter)
    def before_batch(self):
        called()
        Refers.n = self.code.module.n = called.n
    def after_fit(self): self.hook.remove()

def test_figures_and_references_are_not_named(tmp_path): assert not_kept(tmp_path, Drawn(), Refers())==[]

def test_an_object_that_contains_itself_is_marked(tmp_path):
    def ring():
        o = SimpleNamespace(n=0)
        o.next = SimpleNamespace(next=o)
        return o
    def count(o): o.n += 1
    for change,named in [(lambda o: None, []), (count, ['Changing.held (SimpleNamespace)'])]:
        assert not_kept(tmp_path, changing(ring, change))==named

def test_what_is_kept_is_not_named(tmp_path): assert not_kept(tmp_path, Various())==[]

def test_an_ordinary_fit_hears_nothing(tmp_path):
    "Callbacks of fastai's and ours, with schedules, files, functions, hooks and references to the model"
    class Holds(Callback):
        def before_fit(self):
            self.params,self.rest,self.path_of = list(self.model.parameters()),[self.model[0], print],Path('a')
    cbs = [AnnealEmbedP(.5, .05), CSVHistory(), SaveModelCallback(fname='best'), EarlyStoppingCallback(), Holds(),
           ReduceLROnPlateau(), TerminateOnNaNCallback(), GradientAccumulation(8), GradientClip(),
           Callback(after_fit=print)]
    assert not_kept(tmp_path, *cbs)==[]
    ds = [(torch.full((3,), float(i)), i%2) for i in range(20)]
    dls = DataLoaders(DataLoader(ds, bs=4), DataLoader(ds, bs=4), device='cpu')
    learn = Learner(dls, nn.Linear(3,2), CrossEntropyLossFlat(), metrics=accuracy)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit_one_cycle(2, cbs=[MixUp(), Scaled(), Checkpoint(tmp_path, 1)])

# Devices

def test_generators_of_cards_that_are_gone(tmp_path, monkeypatch):
    "A checkpoint of a job that saw three cards, resumed where one is visible"
    states = [torch.full((16,), i, dtype=torch.uint8) for i in range(3)]
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, 'get_rng_state_all', lambda: states)
        state = killed(tmp_path, 5)
    for n in 0,1,3,4:
        restored = []
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        monkeypatch.setattr(torch.cuda.random, 'set_rng_state', lambda s, device: restored.append((device, s)))
        learn = awd_lstm_learner(small_dls(200), SMALL)
        learn.fit(2, cbs=[Checkpoint(tmp_path/'rest', 0, state), Callback(), Killed(99)])
        cards = min(n, 3)
        assert [i for i,_ in restored]==2*list(range(cards)), 'before the batches that are skipped, and after them'
        assert all(torch.equal(s, states[i]) for i,s in restored)

# Files

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "The bytes of a checkpoint"
    folder = tmp_path_factory.mktemp('checkpoint')
    awd_lstm_learner(small_dls(200), SMALL).fit(1, cbs=Checkpoint(folder))
    return (folder/new).read_bytes()

def test_cut_anywhere(checkpoint, tmp_path):
    small = as_bytes(dict(version=2, a=torch.arange(5)))
    ends = [*random.Random(0).sample(range(len(checkpoint)), 50), *range(len(checkpoint)-100, len(checkpoint))]
    for data in [small[:n] for n in range(len(small))] + [checkpoint[:n] for n in ends]:
        (tmp_path/'cut').write_bytes(data)
        with pytest.raises(ValueError, match='not a whole checkpoint'): read_checkpoint(tmp_path/'cut')

def test_a_flipped_bit_is_recognized_or_harmless(tmp_path):
    good = as_bytes(dict(version=2, a=torch.arange(5)))
    data,ok,path = bytearray(good),0,tmp_path/'flip'
    for n in range(len(data)):
        data[n] ^= 1
        path.write_bytes(data)
        data[n] ^= 1
        try: ok += as_bytes(read_checkpoint(path))==good or pytest.fail(f'byte {n}')
        except ValueError as e: assert str(e).startswith(f'{path}: ') and '\n' not in str(e)
    assert ok < len(data)

def test_another_version_is_refused(tmp_path):
    torch.save(dict(version=1), tmp_path/new)
    with pytest.raises(ValueError, match='a checkpoint of version 1, not 2'): last_checkpoint(tmp_path)

def test_dropped_weights_are_not_in_a_checkpoint(tmp_path):
    "An LSTM shows the weight of its last call, which the next call makes anew"
    learn = awd_lstm_learner(small_dls(200), SMALL)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Checkpoint(tmp_path))
    assert 'weight_hh_l0' in vars(learn.model[0].rnns[0].module)
    assert b'weight_hh_l0_raw' in (tmp_path/_checkpoint_files[0]).read_bytes()
    state = last_checkpoint(tmp_path)
    remembered = [name for part in state['ranks'][0]['parts'].values() for name in part]
    assert remembered and 'weight_hh_l0' not in remembered
