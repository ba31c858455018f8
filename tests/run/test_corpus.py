"Pins how text is read (forms of `data`, what is held out, what is refused), tokenized in memory and made into loaders."
import pickle, sys
import pandas as pd, pytest, torch
from fastai.text.all import LMDataLoader, SpacyTokenizer, tokenize1
from fastai_embdrop.run import corpus as C
from fastai_embdrop.awdlstm import awd_lstm_learner
from fastai_embdrop.run.corpus import (_source_files as source_files, _split_items as split_items,
                                       docstrings, fingerprint,
                                       first_words, lm_dataloaders, read_corpus, tokenize, _tokenizer)
from conftest import SMALL, small_dls
from running import Bomb

def words(n, start=0): return ' '.join(f'w{i}' for i in range(start, start+n))

def contents(path): return {f.relative_to(path): f.read_bytes() for f in path.rglob('*') if f.is_file()}

@pytest.fixture
def files(tmp_path):
    "A folder of 20 texts of 10 words, no word in two of them"
    for i in range(20): (tmp_path/f'{i:02}.txt').write_text(words(10, 10*i))
    return tmp_path

# Forms of `data`

@pytest.mark.parametrize('text', ['', ' \n\t ', '\ufeff'])
def test_empty(tmp_path, text):
    (tmp_path/'a.txt').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='a.txt: no text'): read_corpus(tmp_path/'a.txt')

def test_text_file_holds_out_its_end(tmp_path):
    text = words(100)
    (tmp_path/'a.txt').write_text(text)
    train,valid,test = read_corpus(tmp_path/'a.txt')
    assert train[0]+valid[0] == text and len(train)==len(valid)==1 and not test
    assert train[0][-1]==' ' and .89 <= len(train[0])/len(text) <= .92

def test_folder_of_texts(files):
    train,valid,test = read_corpus(files)
    assert (len(train), len(valid), len(test)) == (18, 2, 0)
    assert sorted(train+valid) == sorted(words(10, 10*i) for i in range(20))

def test_folder_with_its_own_split(tmp_path):
    for o in 'train','valid','test','other': (tmp_path/f'{o}.txt').write_text(f'{o} text')
    assert read_corpus(tmp_path) == (['train text'], ['valid text'], ['test text'])
    (tmp_path/'test.txt').unlink()
    assert read_corpus(tmp_path) == (['train text'], ['valid text'], ())

@pytest.mark.parametrize('have,lack', [('train','valid'), ('valid','train')])
def test_half_a_split_is_an_error(tmp_path, have, lack):
    (tmp_path/f'{have}.txt').write_text('some text')
    with pytest.raises(FileNotFoundError, match=f'{lack}.txt'): read_corpus(tmp_path)

def test_csv(tmp_path):
    rows = [f'row {i}, "quoted"\nand é' for i in range(30)]
    pd.DataFrame(dict(label=0, text=rows+[''])).to_csv(tmp_path/'a.csv', index=False)
    train,valid,_ = read_corpus(tmp_path/'a.csv')
    assert len(valid)==3 and sorted(train+valid)==sorted(rows)

def test_nul_is_kept_or_refused(tmp_path):
    (tmp_path/'t.csv').write_text('text\na\0b\nc d\n')
    if sys.version_info<(3,11): # where pandas is older than 3, and Python's csv module takes no NUL
        with pytest.raises(ValueError, match='t.csv: NULL byte'): read_corpus(tmp_path/'t.csv')
    else: assert sorted(sum(read_corpus(tmp_path/'t.csv')[:2], []))==['a\0b', 'c d']

def test_csv_text_is_text(tmp_path):
    "Neither a number nor a mark of absence"
    (tmp_path/'a.csv').write_text('text\n' + '007\nNA\nnull\n'*4)
    assert set(sum(read_corpus(tmp_path/'a.csv')[:2], [])) == {'007','NA','null'}

@pytest.mark.parametrize('csv,msg', [('label,body\n1,hello\n', "'text'"), ('text,b\n"a,b,c\n', 'EOF inside string')])
def test_bad_csv(tmp_path, csv, msg):
    (tmp_path/'a.csv').write_text(csv)
    with pytest.raises(ValueError, match=f'a.csv: .*{msg}'): read_corpus(tmp_path/'a.csv')

def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): read_corpus(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='no .txt file'): read_corpus(tmp_path)
    (tmp_path/'a.pdf').write_text('text')
    with pytest.raises(ValueError, match='a.pdf: neither'): read_corpus(tmp_path/'a.pdf')

@pytest.mark.parametrize('name,text', [('a.txt','word'), ('a.csv','text\none row\n'), ('d/a.txt','the only file')])
def test_too_little_to_hold_some_out(tmp_path, name, text):
    (tmp_path/'d').mkdir()
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match='too little text'): read_corpus(tmp_path/('d' if name[0]=='d' else name))

@pytest.mark.parametrize('names', [['pos','neg'], ['train/pos','train/neg','valid/pos']])
def test_texts_in_folders_of_the_folder_are_pointed_out(tmp_path, names):
    for o in names:
        (tmp_path/o).mkdir(parents=True)
        (tmp_path/o/'1.txt').write_text('A fine film.')
    listed = ', '.join(sorted({o.split('/')[0] for o in names}))
    with pytest.raises(ValueError, match=rf'the folders in it are not read \({listed}\)$'): read_corpus(tmp_path)
    for o in 'urls_pos','urls_neg': (tmp_path/f'{o}.txt').write_text(words(50))
    with pytest.warns(UserWarning, match=rf'^{tmp_path}: the folders in it are not read \({listed}\)$'):
        assert read_corpus(tmp_path)==([words(50)], [words(50)], ()), 'with texts of its own, those are read'

def test_the_texts_of_runs_are_not_pointed_out(files):
    "A run in the folder of its data holds sample.txt, which nobody means to train on"
    for o in 'run','runs/1':
        (files/o).mkdir(parents=True)
        for f in 'config.json','sample.txt': (files/o/f).write_text('{}')
    assert len(read_corpus(files).train)==18

# What is held out

def test_held_out_text_depends_on_no_seed_but_its_own(files):
    torch.manual_seed(1)
    a = read_corpus(files)
    C.random.seed(2)
    assert read_corpus(files)==a and split_items(range(99), seed=1)!=split_items(range(99))

def test_max_words(files):
    train,valid,_ = read_corpus(files, max_words=25)
    assert [len(t.split()) for t in train] == [10,10,5] and sum(len(t.split()) for t in valid)==3

def test_first_words_keeps_what_is_between_them():
    assert first_words(['a\n\n b  ', 'c d'], 3) == ['a\n\n b  ', 'c']
    assert first_words(['a b'], 9)==['a b']==first_words(['a b'])

def test_fingerprint(files):
    corpus = read_corpus(files)
    assert fingerprint(corpus) == fingerprint(read_corpus(files))
    others = [corpus._replace(train=corpus.train[::-1]), corpus._replace(test=['x']),
              C.Corpus(corpus.train+corpus.valid, [])]
    assert len({fingerprint(o) for o in [corpus]+others}) == 4

# Docstrings

@pytest.fixture
def package(tmp_path, monkeypatch):
    "An installed package of 20 modules that cannot be imported, with a docstring in each; its tests have one too"
    (tmp_path/'boom'/'tests').mkdir(parents=True)
    for f in ['__init__','tests/test_a','conftest','testing']+[f'm{i}' for i in range(20)]:
        source = f'"""In {f}:\n   {words(20)}"""\nraise SystemExit\ndef f():\n  "{words(20)}, \\d"\n'
        (tmp_path/f'boom/{f}.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(C, '_doc_pkgs', ('boom',))

def test_docstrings_without_import(package):
    train,valid,_ = read_corpus('docstrings')
    assert 'boom' not in sys.modules
    assert len(source_files('boom'))==21 and not any('test' in t for t in train+valid)
    assert f'In __init__: {words(20)}' in train+valid

def test_docstrings_are_split_by_file_and_come_once(package):
    train,valid,_ = read_corpus()
    assert len(train)+len(valid)==22 and len(set(train+valid))==22
    assert sum(t.startswith('In ') for t in valid)==2
    assert f'{words(20)}, \\d' in valid, 'the one in every file belongs to the held-out part'

def test_docstrings_drop_layout_and_labels():
    long = f'Title\n    =====\n    {words(19)}'
    assert docstrings(f'class A:\n    """{long}"""\n    def f(self): "{words(19)}"') == [f'Title {words(19)}']

def test_missing_package(monkeypatch):
    monkeypatch.setattr(C, '_doc_pkgs', ('no_such_package',))
    with pytest.raises(FileNotFoundError, match='no_such_package'): read_corpus()

def test_default_corpus_is_real_prose():
    train,valid,_ = read_corpus(max_words=5000)
    assert sum(len(t.split()) for t in train)==5000 and not set(train) & set(valid)
    assert sum(w=='the' for t in train for w in t.split()) > 100

# Tokens

def test_spacy_tokens_are_those_of_fastai():
    texts = ['A Learner SHOUTS <br /> aaaa!', 'the the the the end\n\nMore.', 'café #1']
    assert tokenize(texts) == [list(tokenize1(t, SpacyTokenizer())) for t in texts]

def test_split_tokens():
    toks, = tokenize(['= Title = \n\n the <unk> N \n'], 'split')
    assert toks==['=','Title','=','xxeos','xxeos','the','<unk>','N','xxeos']
    assert _tokenizer('split')('a prompt')==['a','prompt']

@pytest.mark.parametrize('tok', ['spacy','split'])
def test_a_text_longer_than_spacy_takes(tok):
    text,odd = 'Some words, here.\n'*60_000, 'x'*150_000+'.'
    res = tokenize([text, 'short', odd], tok, n_workers=0)
    assert len(text)>1e6 and [r.count('xxbos') for r in res]==[tok=='spacy']*3
    if tok=='split': assert res[0]==text.replace('\n',' xxeos ').split() and ''.join(res[2])==odd
    else: assert res[0].count('here')==60_000 and res[1]==['xxbos','short']

@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_processes_change_nothing():
    texts = [words(50, i) for i in range(40)]
    assert tokenize(texts, n_workers=2) == tokenize(texts, n_workers=0)

def test_nothing_is_written_or_trusted_beside_the_text(tmp_path):
    data = tmp_path/'data'
    for d in data, tmp_path/'data_tok', data/'data_tok':
        d.mkdir()
        (d/'counter.pkl').write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
        (d/'lengths.pkl').write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
    for i in range(20): (data/f'{i}.txt').write_text(words(10))
    (data/'data_tok'/'0.txt').write_text('planted')
    before = contents(tmp_path)
    with pytest.warns(UserWarning, match=r'not read \(data_tok\)'): corpus = read_corpus(data)
    lm_dataloaders(*map(tokenize, corpus), min_freq=1, bs=2, seq_len=4, device='cpu')
    assert contents(tmp_path)==before

@pytest.mark.parametrize('texts,tok,error,msg', [('one string','spacy',TypeError,'texts is one string'),
                                                 (['a b'],'nltk',ValueError,"tok='nltk': not one of spacy, split")])
def test_what_is_no_list_or_no_tokenizer(texts, tok, error, msg):
    with pytest.raises(error, match=msg): tokenize(texts, tok)

# Loaders

def test_loaders():
    dls = small_dls(bs=4, seq_len=8)
    x,y = dls.one_batch()
    assert x.shape==y.shape==(4,8) and torch.equal(x[:,1:], y[:,:-1])
    assert isinstance(dls.train, LMDataLoader) and len(dls.loaders)==2 and dls.vocab[0]=='xxunk'

def test_vocabulary_is_of_the_training_tokens():
    kw = dict(bs=2, seq_len=2, device='cpu')
    dls = lm_dataloaders([['a']*9+['b']*2], [['c']*9], [['a','d']*4], tok='split', min_freq=3, **kw)
    assert 'a' in dls.vocab and not {'b','c','d'} & set(dls.vocab) and len(dls.loaders)==3
    small = lm_dataloaders([[f'w{i}' for i in range(99)]], [['w']*9], min_freq=1, max_vocab=20, **kw)
    assert len([o for o in small.vocab if o!='xxfake'])==20

@pytest.mark.parametrize('n,m,what', [(16,3,'16 training'), (17,2,'2 held-out')])
def test_less_than_a_batch(n, m, what):
    with pytest.raises(ValueError, match=what): lm_dataloaders([['a']*n], [['a']*m], bs=2, seq_len=8)
    assert len(lm_dataloaders([['a']*17], [['a']*3], bs=2, seq_len=8, device='cpu').train)==1

def test_loaders_from_a_vocabulary():
    dls = small_dls()
    ours = lm_dataloaders(tok='split', vocab=list(dls.vocab), device='cpu')
    assert list(ours.vocab)==list(dls.vocab)
    assert torch.equal(*(o.test_dl(['w1 w2 strange']).items[0] for o in (ours,dls)))

def test_learner_predicts_and_shows(monkeypatch):
    shown,learn = [],awd_lstm_learner(small_dls(), SMALL)
    monkeypatch.setattr('fastai.text.learner.display_df', shown.append)
    learn.show_results(max_n=2)
    assert list(shown[0])==['input','target','pred'] and len(shown[0])==2
    assert learn.predict('w1 w2', n_words=3, no_bar=True).startswith('w1 w2')

def test_tokens_are_plain_lists():
    "What is written as JSON must be"
    for tok in 'spacy','split': assert all(type(o) is list for o in tokenize(['a b', 'c'], tok))
