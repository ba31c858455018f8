"""Pins settings: the shipped file, flag over file over default, old names, what is refused, help, the device."""
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from fastcore.docments import docments
from fastai_embdrop.run.settings import Settings, find_device, _parse_args, read_ini, to_ini
from fastai_embdrop.run.train import main
from fastai_embdrop.schedules import shapes
from running import fails, flags, text

root = Path(__file__).parent.parent.parent
shipped = Settings(max_words=120_000, embed_p=.1, embed_p_end=0)

# The file and the flags

def test_shipped_settings_are_the_defaults_annealed_on_fewer_words():
    assert (root/'settings.ini').read_text()==to_ini(shipped)
    assert _parse_args([str(root/'settings.ini')])==(shipped, False, False, False)
    assert _parse_args([])==(Settings(), False, False, False)

def test_by_default_embed_p_is_constant():
    assert Settings().ends==(.02,.02) and Settings(embed_p=.3).ends==(.3,.3) and shipped.ends==(.1,0)

def test_the_keys():
    keys = '''data out epochs bs seq_len lr emb_sz n_hid n_layers drop_mult embed_p embed_p_end sched tok max_vocab
              min_freq max_words seed device precision save_every'''
    assert list(read_ini(root/'settings.ini'))==keys.split()
    assert (Settings().data, Settings().out)==('docstrings','run')

def test_flag_over_file_over_default(tmp_path):
    (tmp_path/'s.ini').write_text('\ufeff[train]\nepochs = 2\nlr = 1e-3\ndata = 50%%/$x\n', encoding='utf-8')
    s,show,overwrite,resume = _parse_args(['--epochs', '7', str(tmp_path/'s.ini'), '--overwrite'])
    assert (s.epochs, s.lr, s.bs, s.data)==(7, 1e-3, Settings().bs, '50%%/$x')
    assert (show,overwrite,resume)==(False,True,False)

def test_show_prints_the_settings_in_force(tmp_path, capsys):
    assert main(['--epochs', '9', '--show', '--out', str(tmp_path/'run')]) is None
    (tmp_path/'s.ini').write_text(capsys.readouterr().out)
    assert _parse_args([str(tmp_path/'s.ini')])[0]==Settings(epochs=9, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()

def test_help_documents_each_setting(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    text,docs = ' '.join(capsys.readouterr().out.split()),docments(Settings)
    assert e.value.code==0
    for k,v in vars(Settings()).items(): assert docs[k] and f'--{k} ' in text and f'{docs[k]} (default: {v})' in text

def test_every_shape_of_the_library_has_a_flag():
    for name in shapes:
        end = [] if name=='const' else ['--embed_p_end', '.1']
        assert _parse_args(['--sched', name, '--embed_p', '.5', *end])[0].sched==name

# What is refused

@pytest.mark.parametrize('flag,value,msg', [
    ('data','nowhere','nowhere'), ('data','','data is empty'), ('epochs','0','epochs=0'),
    ('epochs','2.5',"epochs='2.5': not of type int"), ('lr','0','lr=0'), ('lr','inf','lr=inf'), ('bs','-1','bs=-1'),
    ('embed_p','1.5','embed_p=1.5'), ('embed_p','None',"embed_p='None'"), ('embed_p_end','nan','embed_p_end=nan'),
    ('drop_mult','-1','drop_mult'), ('sched','up','up'), ('tok','words','words'), ('precision','fp8','fp8'),
    ('precision','fp16','needs a CUDA device'), ('precision','bf16','needs a CUDA device'),
    ('device','gpu','device=gpu'), ('device','meta','device=meta'), ('seed',2**64,'seed'), ('n_hid','0','n_hid'),
    ('max_vocab','1','max_vocab'), ('epoch','3','--epoch'), ('seq-len','8','--seq-len'), ('start','.5','--start'),
    ('drop_mult','9','_p=')])
def test_bad_setting(capsys, tmp_path, text, flag, value, msg):
    assert msg in fails(capsys, *flags(data=text, out=tmp_path/'run'), f'--{flag}', value)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('kw', [dict(embed_p=0), dict(embed_p_end=0)])
def test_exponential_schedule_needs_both_ends(capsys, kw):
    assert 'embed_p and embed_p_end must be above 0' in fails(capsys, *flags(sched='exp', **kw))

@pytest.mark.parametrize('sched', ['adapt','const'])
def test_a_schedule_without_an_end_takes_none(capsys, tmp_path, sched):
    msg = fails(capsys, *flags(out=tmp_path/'run', sched=sched, embed_p=.3, embed_p_end=.1))
    assert msg==f'embdrop-train: embed_p_end=0.1: sched={sched} has no end, so it must be None\n'
    kept = _parse_args([str(root/'settings.ini'), '--sched', sched, '--embed_p_end', 'None'])[0]
    assert kept.ends==(.1,.1), 'over a file that has an end'
    assert Settings(sched=sched, embed_p=.3).ends==(.3,.3)

@pytest.mark.parametrize('ini,msg', [
    ('[train]\nepoch = 3', 'unknown key epoch'), ('[train]\nepochs = three', "epochs='three'"),
    ('[train]\nstart = .5', 's.ini: start is called embed_p now'),
    ('[train]\nend = .5', 's.ini: end is called embed_p_end now'),
    ('[run]\nepochs = 3', 'no section'), ('epochs = 3', 'no section'), ('[train]\nbs = 3\nbs = 4', 'bs'),
    ('[train]\nbs', 'bs'), ('[train]\nbs =', 'bs is empty'), ('', 'no text')])
def test_bad_ini(capsys, tmp_path, ini, msg):
    (tmp_path/'s.ini').write_text(ini)
    assert msg in fails(capsys, tmp_path/'s.ini')

def test_missing_ini(capsys, tmp_path): assert 's.ini' in fails(capsys, tmp_path/'s.ini')

# The device

@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a CUDA device')
def test_no_such_device(capsys, tmp_path, text):
    assert 'device=cuda' in fails(capsys, *flags(data=text, out=tmp_path/'run', device='cuda'))

def test_a_device_has_its_index(monkeypatch):
    "A tensor on `cuda` says `cuda:0`: the same device, however the settings name it"
    def zeros(n, device): return SimpleNamespace(device=torch.device('cuda', 0), item=lambda: 0.)
    monkeypatch.setattr(torch, 'zeros', zeros)
    assert find_device('cuda')==find_device('cuda:0')==find_device('auto')==torch.device('cuda:0')

@pytest.mark.cuda
def test_a_card_has_its_index():
    assert find_device('cuda')==find_device('auto')==torch.device('cuda', torch.cuda.current_device())

@pytest.mark.parametrize('device', ['auto','cuda'])
def test_processes_without_a_local_rank(monkeypatch, device):
    "As under a launcher that is not torchrun: which card is whose cannot be known"
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(ValueError, match=f'device={device}: LOCAL_RANK is not set'): find_device(device)

def test_each_process_takes_the_card_of_its_local_rank(monkeypatch):
    taken = []
    monkeypatch.setenv('WORLD_SIZE', '4')
    monkeypatch.setenv('LOCAL_RANK', '3')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    find_device('cpu')
    assert taken==[]
    def zeros(n, device): return SimpleNamespace(device=torch.device('cuda', taken[-1]), item=lambda: 0.)
    monkeypatch.setattr(torch, 'zeros', zeros)
    assert find_device('cuda')==torch.device('cuda:3')
