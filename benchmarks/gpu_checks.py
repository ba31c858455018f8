"""The checks of `python -m benchmarks.gpu`, parts A to M: each takes a `Setting` and returns its figures, or raises."""
import copy, csv, gc, io, math, os, platform, re, signal, subprocess, sys, tempfile, threading, time, warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest.mock import patch
import fastai, torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from fastai.text.all import Callback, DataLoader, DataLoaders, get_model, rank_distrib, set_seed
from fastai_embdrop import __version__, loss as loss_module
from fastai_embdrop.all import (AnnealEmbedP, Checkpoint, EmbeddingDropout, awd_lstm_learner, awd_lstm_lm,
                                last_checkpoint, load_run)
from fastai_embdrop.awdlstm import WeightDropout
from fastai_embdrop.dropout import splitmix64
from fastai_embdrop.loss import linear_loss
from fastai_embdrop.run.train import main as embdrop_train
from benchmarks import anneal
from benchmarks.common import interleave, provenance

root = Path(__file__).parent.parent

@dataclass
class Setting:
    "Where the checks run, and whether at sizes for a dry run"
    device:torch.device
    small:bool

    def size(self, full, small): return small if self.small else full

@dataclass
class Check:
    "One row: the function `run`, what it needs (see `benchmarks.gpu.missing`), its part and its group"
    name:str
    part:str
    group:int
    needs:tuple
    run:callable

checks = []

def check(part, group, *needs, cases=None):
    "Add the function below to `checks`, once for each of `cases`, a dict from names to keyword arguments"
    def add(f):
        for case,kwargs in (cases or {'':{}}).items():
            mixed = kwargs.get('precision', 'fp32')!='fp32' # fastai's mixed precision needs a card
            all_needs = (*needs, 'card') if mixed else needs
            checks.append(Check(f'{f.__name__} {case}'.strip(), part, group, all_needs, partial(f, **kwargs)))
        return f
    return add

def near(rate, p, n):
    "`rate`, which must be within 5 standard errors of `p`"
    assert abs(rate-p) <= 5*(p*(1-p)/n)**.5, f'{rate:.4f} of {n:,}, where {p} is right'
    return round(rate, 5)

def output_of(*cmd, timeout=420, **env):
    "What a command prints; an `AssertionError` with its errors and last lines if it fails"
    r = subprocess.run([sys.executable, *cmd], cwd=root, env={**os.environ, **env}, capture_output=True, text=True,
                       timeout=timeout)
    lines = (r.stdout+r.stderr).splitlines()
    errors = [l for l in lines if re.match(r'(\[rank\d+\]: )?\w+(Error|Exception)\b', l)]
    assert r.returncode==0, '\n'.join([f'status {r.returncode}', *errors[:3], *lines[-9:]])
    return r.stdout

# Data and learners

tiny = dict(emb_sz=12, n_hid=16, n_layers=2)

def zipf(V, n):
    "`n` ids below `V`, always the same, with Zipf's frequencies"
    return torch.multinomial(1/torch.arange(1., V+1), n, replacement=True, generator=torch.Generator().manual_seed(0))

def zipf_loaders(V, bs, seq_len, n, device):
    "`n` batches of words with Zipf's frequencies, and one for validation"
    words = zipf(V, (n+1)*bs*seq_len+1)
    items = list(zip(words[:-1].view(n+1, bs, seq_len), words[1:].view(n+1, bs, seq_len)))
    loader = lambda o: DataLoader(range(len(o)), bs=None, create_item=o.__getitem__, num_workers=0)
    dls = DataLoaders(loader(items[:n]), loader(items[n:]), device=device)
    dls.vocab = [f'w{i}' for i in range(V)]
    return dls

def trained(s, precision='fp32', n_epoch=1, cbs=(), V=200, bs=8, seq_len=16, n=12, config=tiny, **kwargs):
    "A learner after a seeded fit"
    set_seed(0)
    learn = awd_lstm_learner(zipf_loaders(V, bs, seq_len, n, s.device), config, **kwargs)
    if precision!='fp32': getattr(learn, f'to_{precision}')()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, 1e-2, cbs=list(cbs))
    return learn

precisions = {p:dict(precision=p) for p in ('fp32','fp16','bf16')}

# A. Environment

def find_version(package):
    try: return version(package)
    except PackageNotFoundError: return None

@check('A', 1)
def environment(s):
    res = dict(torch=torch.__version__, fastai=fastai.__version__, fastai_embdrop=__version__,
               python=platform.python_version(), threads=torch.get_num_threads())
    if s.device.type!='cuda': return res
    card = torch.cuda.get_device_properties(s.device)
    free,total = torch.cuda.mem_get_info(s.device)
    tf32 = dict(tf32_products=torch.backends.cuda.matmul.allow_tf32, tf32_cudnn=torch.backends.cudnn.allow_tf32)
    return {**res, **tf32, 'card':card.name, 'capability':f'{card.major}.{card.minor}', 'cuda':torch.version.cuda,
            'cudnn':torch.backends.cudnn.version(), 'triton':find_version('triton'), 'free_mb':free>>20,
            'total_mb':total>>20, 'cards':torch.cuda.device_count()}

# B. The draw

@check('B', 1)
def same_hash_as_on_the_cpu(s):
    keys,seed = torch.arange(100_000),torch.tensor(-5**27)
    assert torch.equal(splitmix64(keys, seed), splitmix64(keys.to(s.device), seed.to(s.device)).cpu())

ways = dict(batch=dict(), held=dict(hold=True), sequence=dict(per='sequence'), token=dict(per='token'),
            large=dict(V=2**19+1)) # above the limit for a table of draws

@check('B', 1, cases={k:dict(way=v) for k,v in ways.items()})
def rate_and_scale(s, way):
    way = dict(way)
    n = 100_000
    V = way.pop('V', n)
    emb,words = nn.Embedding(V, 2, device=s.device),torch.arange(n, device=s.device, dtype=torch.int32)[None]
    res = {}
    for p in (.02, .5, .9):
        m = EmbeddingDropout(emb, p, **way)
        out = m(words)
        kept = (out!=0).any(-1)
        res[p] = near(1-kept.float().mean().item(), p, n)
        assert_close(out[kept], emb(words)[kept]/(1-p))
        m.reset()
        assert not torch.equal(out, m(words)), 'two draws differ'
    return res

@check('B', 1)
def seeds_have_64_bits(s):
    seeds = torch.randint(-2**63, 2**63-1, (300,), device=s.device).cpu()
    assert seeds.min() < -.9*2**63 and seeds.max() > .9*2**63

# C. Moves

@check('C', 1)
def moved_model(s):
    words = torch.randint(0, 50, (3,7))
    for way in dict(ways, large={}).values():
        lm = awd_lstm_lm(50, {**tiny, **way})
        lm(words)
        lm.to(s.device)
        assert {h.device.type for layer in lm[0].hidden for h in layer}=={s.device.type}
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float32):
            out = lm.to(dtype)(words.to(s.device))[0]
            out.float().sum().backward()
            assert out.dtype==dtype and out.isfinite().all()
        lm.cpu()(words)
        copy.deepcopy(lm.to(s.device))(words.to(s.device))

@check('C', 1)
def scale_keeps_its_precision(s):
    m = EmbeddingDropout(nn.Embedding(1000, 2), .3, per='token').half().to(s.device).float()
    words = torch.arange(1000, device=s.device)[None]
    out = m(words)
    kept = (out!=0).any(-1)
    assert_close(out[kept], m.emb(words)[kept]/.7, rtol=1e-6, atol=0)

@check('C', 1)
def from_meta(s):
    words,source = torch.randint(0, 50, (3,7), device=s.device),awd_lstm_lm(50, tiny).to(s.device).eval()
    want = source(words)[0]
    for per in ('batch','sequence'):
        with torch.device('meta'): empty,assigned = (awd_lstm_lm(50, {**tiny, 'per':per}) for _ in range(2))
        empty.to_empty(device=s.device).load_state_dict(source.state_dict())
        assigned.load_state_dict(source.state_dict(), assign=True)
        for lm in (empty, assigned):
            lm.reset()
            lm(words)[0].sum().backward()
            lm.eval().reset()
            source.reset()
            assert_close(lm(words)[0], want)

# D. Waits of the host

@contextmanager
def sync_debug(mode):
    "torch's mode for synchronizations, without its word on being a prototype"
    def switch(mode):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='Synchronization debug mode')
            torch.cuda.set_sync_debug_mode(mode)
    switch(mode)
    try: yield
    finally: switch('default')

dense  = {k:dict(way=v, sparse=False) for k,v in ways.items()}
sparse = {f'{k}, sparse':dict(way=v, sparse=True) for k,v in ways.items()}

@check('D', 1, 'card', cases={**dense, **sparse})
def no_wait_in_the_module(s, way, sparse):
    way = dict(way)
    V = way.pop('V', 1000)
    m = EmbeddingDropout(nn.Embedding(V, 8, sparse=sparse, device=s.device), .1, **way)
    words = torch.randint(0, V, (64,72), device=s.device)
    m(words).sum().backward()
    torch.cuda.synchronize()
    with sync_debug('error'):
        for i in range(5):
            m.embed_p,m.emb.weight.grad = .1*i,None
            m(words).sum().backward()

def waits(s, **kwargs):
    "How often the host waits for the card in a fit"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with sync_debug('warn'): trained(s, **kwargs)
    return sum('synchronizing CUDA operation' in str(w.message) for w in said)

@check('D', 1, 'card', cases=precisions)
def no_wait_in_a_fit(s, precision):
    trained(s, precision, keep_logits=True) # what a first fit sets up
    res = dict(plain=waits(s, precision=precision, keep_logits=True),
               annealed=waits(s, precision=precision, keep_logits=True, cbs=[AnnealEmbedP(.5, .05)]),
               without_logits=waits(s, precision=precision, cbs=[AnnealEmbedP(.5, .05)]))
    assert res['annealed']==res['plain'] and res['without_logits'] <= res['plain'], res
    return res

# E. Compiled

drawn = {m:dict(mode=m, hold=False) for m in ('default','reduce-overhead')}
held  = {f'{m}, held':dict(mode=m, hold=True) for m in drawn}

@check('E', 2, 'card', 'triton', cases={**drawn, **held})
def one_graph(s, mode, hold):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    m = EmbeddingDropout(nn.Embedding(5000, 2, device=s.device), .5, hold=hold)
    words = torch.arange(5000, device=s.device).view(50,100)
    f = torch.compile(m, fullgraph=True, mode=mode)
    def dropped():
        out = f(words)
        out.sum().backward()
        return (out.detach()==0).all(-1)
    for p in (.5, .5, .5, .9, .1, 0, 1, .5)*3:
        m.embed_p = p
        m.reset()
        near(dropped().float().mean().item(), p, 5000)
    masks = [dropped().clone() for _ in range(20)]
    same = [torch.equal(masks[0], o) for o in masks]
    assert all(same) if hold else not any(same[1:]), 'a mask is kept if it is held, and drawn anew if not'
    graphs = counters['stats']['unique_graphs']
    assert graphs <= 1+hold
    return dict(graphs=graphs)

# F. The loss without logits

def loss_and_grads(f, x, lin, scale=1., dtype=None):
    "Loss and gradients of `f(x)`, under autocast to `dtype`; the backward pass begins at `scale`"
    x = x.detach().clone().requires_grad_()
    lin.zero_grad()
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None): loss = f(x)
    (loss*torch.tensor(scale, dtype=loss.dtype, device=x.device)).backward()
    return loss.item(),[g.double()/scale for g in (x.grad, lin.weight.grad, lin.bias.grad)]

def errors(grads, right): return [((a-b).norm()/b.norm()).item() for a,b in zip(grads, right)]
def zeros(grads): return (grads[1]==0).float().mean().item()

numbers = dict(fp32=dict(dtype=None, scale=1.), bf16=dict(dtype=torch.bfloat16, scale=1.),
               fp16=dict(dtype=torch.float16, scale=2.**16)) # where fastai's GradScaler begins
loss_sizes = (2048,20_000),(4608,60_000)
loss_cases = {f'{k}, {n:,} x {V:,}':dict(n=n, V=V, **v) for n,V in loss_sizes for k,v in numbers.items()}

@check('F', 1, 'fused loss', cases=loss_cases)
def loss(s, dtype, scale, n, V):
    "Value and gradients against float64: as good as with logits"
    n,V,D = s.size((n,V,100), (n//4, V//10, 20))
    torch.manual_seed(0)
    x,targ = torch.randn(1, n, D, device=s.device)*.3,torch.randint(V, (1,n), device=s.device)
    lin = nn.Linear(D, V, device=s.device)
    nn.init.uniform_(lin.weight, -.1, .1)
    exact = copy.deepcopy(lin).double()
    right = loss_and_grads(lambda x: F.cross_entropy(exact(x)[0], targ[0]), x.double(), exact)
    usual = loss_and_grads(lambda x: F.cross_entropy(lin(x)[0].float(), targ[0]), x, lin, scale, dtype)
    ours = loss_and_grads(lambda x: linear_loss(x, lin, targ), x, lin, scale, dtype)
    res = dict(right=right[0])
    for k,(value,grads) in dict(usual=usual, ours=ours).items():
        res[k] = dict(loss=value, errors=errors(grads, right[1]), zeros=zeros(grads))
    assert abs(ours[0]-right[0]) < 1e-3*right[0], res
    assert all(a <= 1.5*b+1e-6 for a,b in zip(res['ours']['errors'], res['usual']['errors'])), res
    assert res['ours']['zeros'] <= res['usual']['zeros']+1e-3, res
    return res

# G. A learner, with logits and without

class Watch(Callback):
    "The loss of each batch and the scale of the loss after it"
    order = 900
    def before_fit(self): self.losses,self.scales = [],[]
    def after_batch(self):
        if not self.training: return
        self.losses.append(self.loss.detach())
        self.scales.append(self.learn.scaler.get_scale() if hasattr(self.learn, 'scaler') else 1.)

@check('G', 2, 'fused loss', cases=precisions)
def with_and_without_logits(s, precision):
    "The same fit, its logits kept or not: losses within 1 % in each epoch, at most one more step skipped"
    sizes = s.size(dict(V=20_000, bs=64, seq_len=72, n=30, config=dict(emb_sz=100, n_hid=200, n_layers=2)), {})
    n_epoch,res = 3,{}
    for kind,keep in dict(usual=True, ours=False).items():
        gc.collect() # the learner before
        if s.device.type=='cuda': torch.cuda.reset_peak_memory_stats()
        watch = Watch()
        trained(s, precision, n_epoch, cbs=[watch], keep_logits=keep, **sizes)
        losses = torch.stack(watch.losses).float().view(n_epoch, -1).mean(1).tolist()
        skipped = sum(b<a for a,b in zip([2.**16, *watch.scales], watch.scales)) if precision=='fp16' else 0
        res[kind] = dict(losses=losses, skipped=skipped)
        if s.device.type=='cuda': res[kind]['peak_mb'] = torch.cuda.max_memory_allocated()>>20
    usual,ours = res['usual'],res['ours']
    assert all(abs(a-b) <= .01*b for a,b in zip(ours['losses'], usual['losses'])), res
    assert ours['losses'][-1] < ours['losses'][0] and ours['skipped'] <= usual['skipped']+1, res
    return res

# H. cuDNN

def bidirectional(s, p, n_in=40, n_hid=60):
    torch.manual_seed(0)
    return WeightDropout(nn.LSTM(n_in, n_hid, 1, batch_first=True, bidirectional=True), p).to(s.device)

def profiled(): return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

@check('H', 1)
def weight_dropout(s):
    "Without dropout the LSTM's own results; with it a share of the weights has no gradient, in both directions"
    x = torch.randn(8, 30, 40, device=s.device)
    m,plain = bidirectional(s, 0.),nn.LSTM(40, 60, 1, batch_first=True, bidirectional=True).to(s.device)
    plain.load_state_dict({k.removesuffix('_raw').removeprefix('module.'):v for k,v in m.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for o in (m, plain): o(x)[0].pow(2).sum().backward()
        dropping = bidirectional(s, .3)
        dropping(x)[0].pow(2).sum().backward()
    assert_close(m.weight_hh_l0_raw.grad, plain.weight_hh_l0.grad, rtol=1e-3, atol=1e-3)
    grads = {n:p.grad for n,p in dropping.named_parameters() if n.startswith('weight_hh') or '.weight_hh' in n}
    assert len(grads)==2
    return {n:near((g==0).float().mean().item(), .3, g.numel()) for n,g in grads.items()}

@check('H', 1, cases={k:v for k,v in precisions.items() if k!='fp32'})
def lstm_under_autocast(s, precision):
    "The type of number that autocast gives to cuDNN's LSTM, and the kernels it takes"
    dtype = torch.float16 if precision=='fp16' else torch.bfloat16
    m,x = bidirectional(s, .3, 64, 64),torch.randn(8, 30, 64, device=s.device)
    with torch.autocast('cuda', dtype), profiled() as prof: out = m(x)[0]
    assert out.isfinite().all()
    return dict(asked=str(dtype), out=str(out.dtype), kernels=sorted({e.key[:60] for e in prof.key_averages()})[:12])

@check('H', 1)
def weight_dropout_time(s):
    "Milliseconds of fastai's first layer, forward and backward: in `WeightDropout`, and by itself"
    n_in,n_hid,bs,seq_len = s.size((400,1152,64,72), (20,40,8,16))
    x = torch.randn(bs, seq_len, n_in, device=s.device)
    plain = nn.LSTM(n_in, n_hid, 1, batch_first=True).to(s.device)
    dropping = WeightDropout(nn.LSTM(n_in, n_hid, 1, batch_first=True), .5).to(s.device)
    fs = {k:lambda m=m: m(x)[0].sum().backward() for k,m in dict(dropping=dropping, plain=plain).items()}
    ms = interleave(fs, s.size(20, 3), str(s.device))
    return {**{f'{k}_ms':round(v, 3) for k,v in ms.items()}, 'ratio':round(ms['dropping']/ms['plain'], 2)}

# I. Checkpoints

class KillAt(Callback):
    order = 2000
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.train_iter==self.n: raise KeyboardInterrupt

def fit_from(s, folder, precision='fp32', state=None, kill_at=0):
    cbs = [AnnealEmbedP(.5, .05), Checkpoint(folder, 7, state), KillAt(kill_at)]
    return trained(s, precision, 2, cbs)

def killed(s, folder, precision='fp32'):
    "The state that a fit leaves which is killed after its seventh batch"
    try: fit_from(s, folder, precision, kill_at=7)
    except KeyboardInterrupt: return last_checkpoint(folder)
    raise AssertionError('the fit was not killed')

@contextmanager
def deterministic():
    "torch's deterministic operations, where there are any (CUBLAS_WORKSPACE_CONFIG is set by `benchmarks.gpu`)"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try: yield
    finally: torch.use_deterministic_algorithms(False)

@check('I', 2, cases=precisions)
def resumed_to_the_bit(s, precision):
    with tempfile.TemporaryDirectory() as folder, deterministic():
        whole = fit_from(s, folder, precision)
        state = killed(s, folder, precision)
        resumed = fit_from(s, folder, precision, state)
    diff = max((a-b).abs().max().item() for a,b in zip(whole.model.parameters(), resumed.model.parameters()))
    assert diff==0, f'weights differ by up to {diff}'
    return dict(loss=resumed.recorder.values[-1][0])

def resume_on_cpu(folder):
    "In a process that sees no card: the rest of a fit that was killed on one"
    learn = fit_from(Setting(torch.device('cpu'), True), folder, state=last_checkpoint(folder))
    assert math.isfinite(learn.recorder.values[-1][0])

@check('I', 2, 'card')
def resumed_where_no_card_is_visible(s):
    with tempfile.TemporaryDirectory() as folder:
        killed(s, folder)
        code = f'from benchmarks.gpu_checks import resume_on_cpu; resume_on_cpu({folder!r})'
        output_of('-c', code, CUDA_VISIBLE_DEVICES='')

# J. The command

def argv(folder, device, *more):
    "Arguments for a run of some 20 batches an epoch on a text that is made here"
    text = folder/'t.txt'
    if not text.exists():
        text.write_text(' '.join(f'w{i}' for i in zipf(300, 3000).tolist()))
    settings = dict(data=text, out=folder/'run', tok='split', device=device, emb_sz=12, n_hid=16, n_layers=1, bs=8,
                    seq_len=16, epochs=2, min_freq=1)
    return [str(o) for k,v in settings.items() for o in (f'--{k}', v)] + [*more]

def command(args):
    "Exit status of `embdrop-train`; what it prints is kept back"
    with redirect_stdout(io.StringIO()): return embdrop_train(args) or 0

def history(folder):
    rows = csv.DictReader((folder/'run'/'history.csv').read_text().splitlines())
    return [float(r['valid_loss']) for r in rows]

@check('J', 3, cases=precisions)
def train_command(s, precision):
    "It trains, and what it leaves loads on the CPU and on the card, as the same model"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        assert command(argv(folder, str(s.device), '--precision', precision))==0
        losses = history(folder)
        assert len(losses)==2 and losses[1]<losses[0], losses
        words = torch.randint(0, 50, (2,7))
        outs = []
        for device in ('cpu', str(s.device)):
            model = load_run(folder/'run', device).model.eval()
            model.reset()
            outs.append(model(words.to(device))[0].cpu())
        assert_close(*outs, rtol=1e-3, atol=1e-3)
    return dict(valid_losses=losses)

def interrupted(folder, args):
    "Exit status of a run that gets SIGINT when its first checkpoint is there"
    ended = threading.Event()
    def interrupt():
        while not ended.wait(.01):
            if (folder/'run'/'checkpoint.pth').exists(): return os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    try: return command(args)
    except SystemExit as e: return e.code
    finally: ended.set()

@check('J', 3)
def resumed_command(s):
    "Begun with `--device auto` where that is this device, interrupted, resumed with the device by its name"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        auto = 'auto' if torch.cuda.is_available()==(s.device.type=='cuda') else 'cpu'
        status = interrupted(folder, argv(folder, auto, '--save_every', '3'))
        assert status==130, f'status {status} after SIGINT'
        assert command(argv(folder, s.device.type, '--save_every', '3', '--resume'))==0
        return dict(valid_losses=history(folder))

# K. Two cards

class Dropped(Callback):
    "The words that are dropped, batch by batch"
    def before_fit(self):
        self.seen = []
        self.hook = get_model(self.model)[0].encoder_dp.register_forward_hook(self._look)
    def _look(self, m, inp, out):
        if m.training: self.seen.append(set(inp[0][(out==0).all(-1)].tolist()))
    def after_fit(self): self.hook.remove()

def rank_main(folder):
    "What each of two processes does: fits of all kinds, a checkpoint, and its results in a file"
    from accelerate import DistributedDataParallelKwargs
    from fastai_embdrop.run.corpus import lm_dataloaders
    from fastai_embdrop.run.distrib import lm_distrib_ctx
    cuda,local = torch.cuda.is_available(),int(os.environ['LOCAL_RANK'])
    if cuda: torch.cuda.set_device(local)
    device = torch.device('cuda', local) if cuda else torch.device('cpu')
    toks = [f'w{i}' for i in zipf(100, 2000).tolist()]
    def fit(folder=None, **kwargs):
        set_seed(rank_distrib())
        dls = lm_dataloaders([toks[:1600]], [toks[1600:]], tok='split', min_freq=1, bs=4, seq_len=8, device=device)
        learn,dropped = awd_lstm_learner(dls, {**tiny, 'embed_p':.5, **kwargs.pop('config', {})}),Dropped()
        cbs = [AnnealEmbedP(.6, .1), dropped] + ([Checkpoint(folder)] if folder else [])
        with lm_distrib_ctx(learn, **kwargs), learn.no_logging(), learn.no_bar(): learn.fit(2, 1e-2, cbs=cbs)
        weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        return dict(weights=weights.cpu(), dropped=dropped.seen)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    res = dict(plain=fit(folder), held=fit(config=dict(hold=True)), unused=fit(kwargs_handlers=[unused]))
    if cuda:
        torch.distributed.barrier()
        smi = ['nvidia-smi', '--query-compute-apps=gpu_uuid', '--format=csv,noheader']
        res['contexts'] = subprocess.run(smi, capture_output=True, text=True).stdout.split()
        torch.distributed.barrier()
    torch.save(res, f'{folder}/{rank_distrib()}.pt')

@check('K', 3, 'two cards', 'accelerate')
def two_cards(s):
    "The same weights and masks of their own on both ranks; no process of one rank on the other's card"
    with tempfile.TemporaryDirectory() as folder:
        torchrun = '-m','torch.distributed.run','--standalone','--nproc_per_node=2'
        output_of(*torchrun, '-m', 'benchmarks.gpu_checks', folder, timeout=240)
        a,b = (torch.load(f'{folder}/{i}.pt', weights_only=False) for i in range(2))
        assert len(last_checkpoint(folder)['ranks'])==2
    for kind in ('plain','held','unused'):
        assert torch.equal(a[kind]['weights'], b[kind]['weights']), kind
        assert a[kind]['dropped']!=b[kind]['dropped'], kind
    contexts = Counter(a.get('contexts', []))
    assert all(n==1 for n in contexts.values()), contexts
    return dict(processes_per_card=dict(contexts))

# L. Figures

@check('L', 4)
def scheduler_time(s):
    "Microseconds of a scheduler's events in a batch; see `benchmarks.anneal`"
    fs = {name:anneal.batches(model, cb, s.device) for name,(_,model,cb) in anneal.kinds().items()}
    ms = interleave(fs, s.size(41, 3), str(s.device))
    return {name:round(1000*v/anneal.calls, 1) for name,v in ms.items()}

@check('L', 4, 'fused loss', cases={k:dict(dtype=v) for k,v in dict(fp32=None, bf16=torch.bfloat16).items()})
def loss_time(s, dtype):
    "Milliseconds of decoder and loss, forward and backward: with logits, and over the positions taken at a time"
    n,V,D = s.size((4608,60_000,400), (256,500,20))
    x,targ = torch.randn(1, n, D, device=s.device, requires_grad=True),torch.randint(V, (1,n), device=s.device)
    lin = nn.Linear(D, V, device=s.device)
    def step(f, chunk=512):
        x.grad = None
        lin.zero_grad()
        with torch.autocast(s.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            with patch.object(loss_module, '_chunk', chunk): res = f(x)
        res.backward()
    fs = {c:partial(step, lambda x: linear_loss(x, lin, targ), c) for c in (256,512,1024,4096,n) if c<=n}
    fs['logits'] = partial(step, lambda x: F.cross_entropy(lin(x)[0].float(), targ[0]))
    return {f'{k}_ms':round(v, 2) for k,v in interleave(fs, s.size(9, 3), str(s.device)).items()}

@check('L', 4, 'card')
def kernels(s):
    "How many kernels forward and backward start: ours and `nn.Embedding` alone"
    res = {}
    for way,kwargs in ways.items():
        kwargs = dict(kwargs)
        V = kwargs.pop('V', 10_000)
        emb,words = nn.Embedding(V, 100, device=s.device),torch.randint(0, V, (64,72), device=s.device)
        for name,m in (('plain',emb), ('ours',EmbeddingDropout(emb, .1, **kwargs))):
            m(words).sum().backward()
            with profiled() as prof: m(words).sum().backward()
            res[f'{way} {name}'] = sum(e.count for e in prof.key_averages())
    return res

figures = {'op':['op', '--rounds', '1'], 'compile':['compile'], 'lm_step':['lm_step', '--rounds', '1', '--steps', '8']}

@check('L', 4, 'card', cases={k:dict(cmd=v) for k,v in figures.items()})
def benchmark(s, cmd):
    "A benchmark by itself: the rows of each CSV that it writes"
    out = output_of('-m', f'benchmarks.{cmd[0]}', *cmd[1:], '--device', str(s.device))
    where,res = provenance(str(s.device)),{}
    for path in [Path(l) for l in out.splitlines() if l.endswith('.csv')]:
        rows = csv.DictReader(path.read_text().splitlines())
        def measured(row): return {k:v for k,v in row.items() if k not in where}
        res[path.stem] = [measured(r) for r in rows]
    return res

# M. The tests

@check('M', 3, 'card', 'pytest')
def tests_marked_cuda(s):
    files = sorted(str(p) for p in (root/'tests').rglob('test_*.py') if 'mark.cuda' in p.read_text())
    return dict(last_line=output_of('-m', 'pytest', '-m', 'cuda', '-p', 'no:cacheprovider', *files).splitlines()[-1])

if __name__=='__main__': rank_main(sys.argv[1])
