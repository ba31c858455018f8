"""Pins, over inputs made by hypothesis, that each part gives a right result or a one-line error of the documented type.

Expected results come from a second, plain implementation: NumPy for the dropout, `decode` for text. Non-finite weights
follow IEEE 754 as in `nn.Dropout`: a dropped NaN or infinity is NaN and does not vanish.
`HYPOTHESIS_PROFILE=long` tries more.
"""
import codecs, csv, json, math, os, shutil, sys
from contextlib import contextmanager
from fractions import Fraction
from functools import wraps
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, SchedNo, SchedPoly
from hypothesis import assume, example, given, strategies as st
from torch import nn
from fastai_embdrop.run.corpus import _csv_texts as csv_texts, fingerprint, read_corpus, tokenize
from fastai_embdrop.dropout import EmbeddingDropout, _check_p
from fastai_embdrop.run.files import _read_text
from fastai_embdrop.run.settings import Settings, _parse_args, read_ini, to_ini
from fastai_embdrop.run.folder import load_run
from fastai_embdrop.run.train import train_lm
from fastai_embdrop.schedules import SchedCurriculum, SchedEarly, SchedLate, SchedPiecewise, _eval_sched
from conftest import random_tokens, tried

def prop(*args, **kw):
    "`given`, and a count of the examples that came to their end"
    def deco(f):
        @given(*args, **kw)
        @wraps(f)
        def inner(*a, **k):
            f(*a, **k)
            tried[f.__name__] += 1
        return inner
    return deco

@contextmanager
def or_error(*types, names=''):
    "Passes over an error of `types` in one line, with `names` in it as they are; any other error ends the test"
    try: yield
    except types as e:
        message,names = str(e),str(names)
        rest = message.replace(names, '') if names else message
        assert names in message and len(rest.splitlines())==1, e

@pytest.fixture(scope='module')
def tmp(tmp_path_factory): return tmp_path_factory.mktemp('properties')

# EmbeddingDropout

floats = {torch.float16:2e-3, torch.bfloat16:2e-2, torch.float32:1e-6, torch.float64:1e-6}
ps = st.sampled_from([0, 1, 0., 1., True, 5e-324, .5, .02]) | st.floats(0, .99)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
seeds = st.integers(0, 2**63-1)

@st.composite
def drops(draw, values=st.floats(.5, 2, width=16)):
    "A module in training and words for it"
    V,D,dtype = draw(st.integers(1, 9)),draw(st.integers(1, 4)),draw(st.sampled_from(list(floats)))
    modes = [('batch',False), ('batch',True), ('sequence',False), ('sequence',True), ('token',False)]
    per,hold = draw(st.sampled_from(modes))
    emb = nn.Embedding(V, D, padding_idx=draw(st.none() | st.integers(-V, V-1)), dtype=dtype)
    emb.weight.data = torch.tensor(draw(st.lists(values, min_size=V*D, max_size=V*D)), dtype=dtype).view(V, D)
    ids = draw(st.lists(st.integers(0, V-1), min_size=64, max_size=64))
    words = torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    shape = draw(shapes)
    torch.manual_seed(draw(seeds))
    return EmbeddingDropout(emb, float(draw(ps)), per, hold),words[:math.prod(shape)].view(shape)

def mask_key(m, at, word):
    "Words with the same key share a mask"
    sequence = at[:1] if len(at)>1 else ()
    return dict(batch=(word,), sequence=(word, sequence), token=(word, at))[m.per]

@prop(drops())
def test_a_word_is_gone_or_scaled_and_shares_its_mask(case):
    m,words = case
    w,p,masks = m.emb.weight.detach().double().numpy(),m.embed_p,{}
    for _ in range(2):
        out = m(words)
        assert out.shape==(*words.shape, w.shape[1]) and out.dtype==m.emb.weight.dtype
        if not m.hold: masks = {}
        for at,word in np.ndenumerate(words.numpy()):
            row = out[at].detach().double().numpy()
            gone = not row.any()
            if not gone: np.testing.assert_allclose(row, w[word]/(1-p), rtol=floats[out.dtype])
            assert masks.setdefault(mask_key(m, at, word), gone)==gone
            if p in (0,1): assert gone==(p==1)
    assert torch.equal(m.eval()(words), m.emb(words))

@prop(drops())
def test_gradients_are_the_scaled_counts_of_what_was_kept(case):
    m,words = case
    out = m(words)
    out.sum().backward()
    want = np.zeros(m.emb.weight.shape)
    for at,word in np.ndenumerate(words.numpy()):
        if out[at].any() and word!=m.emb.padding_idx: want[word] += 1/(1-m.embed_p)
    np.testing.assert_allclose(m.emb.weight.grad.double().numpy(), want, rtol=20*floats[out.dtype])

@prop(drops(st.sampled_from([math.nan, math.inf, -math.inf, 0., -0., 1., 6e4, -6e-8])))
def test_non_finite_weights_follow_ieee(case):
    m,words = case
    w,out = m.emb.weight.detach(),m(words).detach()
    scale = 0. if m.embed_p==1 else 1/(1-m.embed_p)
    kw = dict(rtol=2*floats[w.dtype], atol=0, equal_nan=True)
    for at,word in np.ndenumerate(words.numpy()):
        assert any(torch.allclose(out[at], w[word]*f, **kw) for f in (0., scale))

any_ids = st.lists(st.integers(-2**63, 2**63-1), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bool])

@prop(drops(), any_ids, dtypes)
def test_bad_ids_change_nothing(case, ids, dtype):
    m,_ = case
    words = torch.tensor(ids).to(dtype)
    assume(dtype not in (torch.int32,torch.int64) or ((words<0) | (words>=len(m.emb.weight))).any())
    before,rng = m.emb.weight.detach().clone(),torch.get_rng_state()
    with pytest.raises((IndexError,RuntimeError)): m(words)
    assert torch.equal(m.emb.weight, before) and torch.equal(torch.get_rng_state(), rng)

# Probabilities and schedules

odd_numbers = st.sampled_from([True, np.float32(.5), np.int64(1), Fraction(1, 3)])
numbers = st.floats() | st.integers() | st.fractions() | odd_numbers | st.floats(0, 1)
anything = st.none() | st.text() | st.binary() | st.lists(st.integers()) | st.complex_numbers() | numbers

@prop(anything)
def test_a_probability_or_an_error(p):
    with or_error(ValueError, names='embed_p='): assert 0<=_check_p(p)<=1 and _check_p(p)==float(p)

good_points = st.lists(st.tuples(st.sampled_from([0, .2, .5, .9, 1]), st.floats(0, 1)), max_size=5).map(sorted)
points = st.lists(st.tuples(numbers, numbers) | anything, max_size=4) | good_points
named = st.one_of(*[st.tuples(st.just(f), numbers, numbers) for f in (SchedEarly, SchedLate, SchedCurriculum)],
                  st.tuples(st.just(SchedPiecewise), points))

@prop(named, st.lists(st.floats(0, 1), min_size=1))
def test_named_schedules_stay_in_0_1(sched, pcts):
    f = None
    with or_error(ValueError): f = sched[0](*sched[1:])
    if f: assert all(0<=f(pct)<=1 for pct in [0, 1, *pcts])

def step(start, end): return lambda pct: end if pct>.5 else start
def square(start, end): return SchedPoly(start, end, 2)

@prop(st.sampled_from([SchedCos, SchedExp, SchedLin, SchedNo, square, step]), anything, anything, st.floats(0, 1))
def test_any_schedule_gives_probabilities_or_an_error(shape, start, end, pct):
    with or_error(ValueError, names="schedule of 'embed_p' at pct="):
        assert 0<=_eval_sched(lambda x: shape(start, end)(x), pct)<=1

# Files of text

any_text = st.text(st.characters() | st.sampled_from('\ufeff\0\r\n\t "\',;\x85\u2028\ud800'))
pieces = st.sampled_from([codecs.BOM_UTF8, codecs.BOM_UTF16, b'\r\n', b'\r', b'\n', b'\0', b' ', b'"', b',', b'text',
                          b'\xff', b'\xed\xa0\x80', 'é'.encode(), 'é'.encode('latin1')])
noise = st.lists(pieces | st.binary(max_size=9) | st.text(max_size=9).map(str.encode), max_size=30).map(b''.join)

def decode(b): return b.decode().removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')

@prop(noise)
@example(b'a '*5_000_000)
def test_text_is_decoded_without_mark_and_carriage_returns(tmp, b):
    (tmp/'a.txt').write_bytes(b)
    with or_error(ValueError, names=tmp/'a.txt'):
        text = _read_text(tmp/'a.txt')
        assert text==decode(b) and text.strip()
        return
    with pytest.raises((UnicodeDecodeError,AssertionError)): assert decode(b).strip()

refused = '\0' if sys.version_info<(3,11) else '' # by `csv.writer`
written = st.characters(codec='utf-8', exclude_characters=refused)
def lists_of(size, **kw): return st.lists(st.text(written, max_size=size), **kw)

@prop(lists_of(20, min_size=1, max_size=12), lists_of(5, max_size=3), st.sampled_from(['\n','\r\n']), st.data())
def test_csv_texts_are_those_written(tmp, texts, others, end, data):
    assume('text' not in others)
    at = data.draw(st.integers(0, len(others)))
    lone_cr = '\r' in ''.join(texts+others) # `csv.writer` leaves it bare, and a reader ends a row there
    quoting = csv.QUOTE_ALL if lone_cr else csv.QUOTE_MINIMAL
    with open(tmp/'a.csv', 'w', newline='', encoding='utf-8') as f:
        w = csv.writer(f, lineterminator=end, quoting=quoting)
        w.writerows([*others[:at], t, *others[at:]] for t in ['text', *texts])
    assert csv_texts(tmp/'a.csv')==[t.replace('\r\n','\n').replace('\r','\n') for t in texts if t.strip()]

@prop(noise, st.sampled_from([b'', b'text\n', b'a,text\n', b'text,b,\n']))
@example(b'x'*10_000_000, b'text\n')
def test_a_noisy_csv_is_read_or_refused(tmp, b, head):
    (tmp/'a.csv').write_bytes(head+b)
    with or_error(ValueError, names=tmp/'a.csv'):
        for o in csv_texts(tmp/'a.csv'): assert isinstance(o, str) and o.strip()

@prop(st.lists(noise, max_size=5), st.integers(0, 20), st.sampled_from(['txt','csv','folder']), st.booleans())
def test_a_corpus_keeps_every_word_or_names_what_is_wrong(tmp, files, n, kind, split):
    path = tmp/'data'
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    names = ['train','valid','test','x','y'] if split else '01234'
    for name,b in zip(names, files): (path/f'{name}.txt').write_bytes(b)
    (path/'a.csv').write_bytes(b'text\n'+b''.join(files))
    if kind=='txt': (path/'b.txt').write_bytes(b''.join(files))
    data = dict(txt=path/'b.txt', csv=path/'a.csv', folder=path)[kind]
    with or_error(ValueError, FileNotFoundError, names=path):
        corpus = read_corpus(data, n)
        def n_words(texts): return sum(len(t.split()) for t in texts)
        words = [n_words(texts) for texts in corpus]
        assert all(words[:2]) and len(fingerprint(corpus))==64
        if n: assert words[0]<=n and max(words[1:])<=-(-n//10)
        elif kind=='txt': assert ''.join(corpus.train+corpus.valid)==decode(b''.join(files))
        for o in corpus: assert tokenize(o, 'split')==[t.replace('\n', ' xxeos ').split() for t in o]

@prop(st.lists(st.text(st.characters(codec='utf-8')), max_size=3))
def test_spacy_takes_any_text(texts):
    toks = tokenize(texts)
    assert len(toks)==len(texts) and all(isinstance(o, str) for t in toks for o in t)

@prop(any_text)
def test_no_name_of_data_breaks_the_reader(name):
    assume(not Path(name.replace('\0', '_')).exists())
    with or_error(ValueError, OSError, names=name): read_corpus(name)

# Settings

keys = list(vars(Settings()))
edge = st.sampled_from(['', '0', '1', '-1', '2.5', 'nan', 'inf', '1e400', '9'*5000, '1_0', '٣', 'None', 'cos', 'exp',
                        'cpu', 'run', '.', '%', '%(a)s', '# x', '; x', 'a=b', "'"])
texts = edge | any_text
probability,whole = st.floats(0, 1),st.integers(0, 2**63-1)
valid = dict(data=any_text, out=any_text, epochs=st.integers(1, 2**63-1), seed=whole, device=any_text,
             lr=st.floats(0, exclude_min=True, allow_infinity=False), drop_mult=st.floats(0, 2**62),
             embed_p=probability, embed_p_end=st.none() | probability, sched=st.sampled_from(['cos','lin','const']),
             tok=st.sampled_from(['spacy','split']))

@prop(st.dictionaries(st.sampled_from(keys), texts | anything))
def test_settings_or_an_error_that_names_one(kw):
    with or_error(ValueError):
        s = Settings(**kw)
        for k,v in vars(Settings(embed_p_end=0)).items():
            none = k=='embed_p_end' and getattr(s, k) is None
            assert none or type(getattr(s, k)) is type(v)

words = st.sampled_from([f'--{k}' for k in keys] + ['--show','--overwrite','--','-h','-x','nowhere.ini'])

@prop(st.lists(words | texts, max_size=6))
def test_any_command_line_is_parsed_or_refused(argv):
    try:
        with or_error(ValueError, OSError): assert isinstance(_parse_args(argv)[0], Settings)
    except SystemExit: assert '-h' in argv

@prop(st.fixed_dictionaries({}, optional=valid))
def test_settings_come_back_from_their_file(tmp, kw):
    s = None
    with or_error(ValueError): s = Settings(**kw)
    if s:
        (tmp/'s.ini').write_text(to_ini(s), encoding='utf-8', newline='')
        assert Settings(**read_ini(tmp/'s.ini'))==s

tokens = st.sampled_from(['[train]','[x]','epochs','=','2','\n',' ','bs','\ufeff','#',':','%','[',']','\n '])
inis = st.lists(tokens | st.text(max_size=3), max_size=20).map(lambda o: ''.join(o).encode(errors='replace'))

@prop(noise | inis)
def test_a_file_of_settings_is_read_or_named(tmp, b):
    (tmp/'s.ini').write_bytes(b)
    with or_error(ValueError, names='s.ini'): assert set(read_ini(tmp/'s.ini'))<=set(keys)

# Folders of runs

@pytest.fixture(scope='module')
def run(tmp):
    "A run of 16 words and one layer or so"
    (tmp/'text.txt').write_text(' '.join(random_tokens(300, V=9)))
    train_lm(Settings(data=tmp/'text.txt', out=tmp/'run', epochs=1, bs=2, seq_len=8, emb_sz=3, n_hid=4, n_layers=2,
                      tok='split', min_freq=1, device='cpu'))
    return tmp/'run'

def in_json(o): return not isinstance(o, (bytes, complex, Fraction, np.generic))
def containers(o): return st.lists(o, max_size=3) | st.dictionaries(st.text(max_size=5), o, max_size=3)
json_value = st.recursive(anything.filter(in_json), containers, max_leaves=5)

tensors = dict(
    half=lambda v: v.half(), double=lambda v: v.double(), int=lambda v: v.long(), bool=lambda v: v>0,
    complex=lambda v: v.to(torch.complex64), quantized=lambda v: torch.quantize_per_tensor(v, .1, 0, torch.qint8),
    rows=lambda v: v[:-1], wide=lambda v: torch.cat([v, v]), flat=lambda v: v.flatten(),
    strided=lambda v: v.t().contiguous().t() if v.ndim==2 else v, expanded=lambda v: v.flatten()[:1].expand(v.shape),
    giant=lambda v: v.flatten()[:1].expand(2**40), nan=lambda v: v*math.nan, inf=lambda v: v/0,
    sparse=lambda v: v.to_sparse(), meta=lambda v: v.to('meta'), grad=lambda v: nn.Parameter(v),
    number=lambda v: 1., none=lambda v: None, text=lambda v: 'v', list=lambda v: v.tolist())

def damage(draw, path):
    "Cut, fill, or change some bytes"
    b = bytearray(path.read_bytes())
    for i in draw(st.lists(st.integers(0, len(b)-1), min_size=1, max_size=3)): b[i] ^= draw(st.integers(1, 255))
    path.write_bytes(draw(st.sampled_from([b, b[:draw(st.integers(0, len(b)))], b+b, b''])))

def edit_json(draw, path, o):
    at = o['settings'] if isinstance(o, dict) and draw(st.booleans()) else o
    k = draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at)-1))
    if draw(st.booleans()): at[k] = draw(json_value | st.sampled_from([10**9, 10**6, 2**62, 5, '', 'xxunk']))
    else: at.pop(k)
    path.write_text(json.dumps(draw(st.just(o) | json_value)))

def edit_weights(draw, path, o):
    k,how = draw(st.sampled_from(sorted(o))),draw(st.sampled_from(list(tensors)+['drop','add','whole']))
    if how=='drop': o.pop(k)
    elif how=='add': o[draw(st.text() | st.integers())] = o[k]
    elif how=='whole': o = draw(json_value)
    else: o[k] = tensors[how](o[k])
    torch.save(o, path, _use_new_zipfile_serialization=draw(st.booleans()) or how=='meta')

@pytest.mark.filterwarnings('ignore::UserWarning') # torch's, of sparse and quantized tensors as they are made here
@prop(st.data())
def test_a_damaged_run_loads_or_names_a_file(tmp, run, data):
    path,f = tmp/'damaged',data.draw(st.sampled_from(['config.json','vocab.json','model.pth']))
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(run, path)
    how = data.draw(st.sampled_from([damage, edit_json, edit_weights, 'unlink']))
    if how=='unlink': (path/f).unlink()
    elif how is damage: damage(data.draw, path/f)
    elif f=='model.pth': edit_weights(data.draw, path/f, torch.load(path/f, weights_only=True))
    else: edit_json(data.draw, path/f, json.loads((path/f).read_text()))
    before = sorted(os.listdir(path))
    with or_error(ValueError, FileNotFoundError, names=path):
        learn = load_run(path, 'cpu')
        assert learn.model.eval()(torch.zeros(1, 3).long())[0].shape==(1, 3, len(learn.dls.vocab))
        assert learn.predict('w1', n_words=1, no_bar=True)
    assert sorted(os.listdir(path))==before
