"""Pins the live figure of `explain`, in a real browser: its masks are those that the modules draw, and slider, hover,
keyboard, dark and narrow pages work."""
import json, re, shutil, sys
from pathlib import Path
import pytest, torch
from torch import nn
from fastai_embdrop.dropout import EmbeddingDropout

root = Path(__file__).parent.parent
sys.path.insert(0, str(root/'nbs'/'live'))
import masks

names = 'chromium', 'chromium-browser', 'google-chrome'
browser_path = next((path for path in map(shutil.which, names) if path), None)
needs_browser = pytest.mark.skipif(not browser_path, reason='no Chromium on this machine')
words = [w for sentence in masks.words for w in sentence]

def test_the_page_needs_nothing_from_elsewhere():
    figure = masks.figure()
    assert 'src=' not in figure and 'import ' not in figure and 'fetch' not in figure
    names = [o for o in figure.split('"') if o.startswith('http')]
    assert names==['http://www.w3.org/2000/svg'], 'the name of a language, not an address'

def test_the_page_has_the_figure_of_today():
    "Its saved output holds the style and the script as they are now"
    cells = json.loads((root/'nbs'/'explain.ipynb').read_text())['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    saved = ''.join(''.join(d.get('text/html', '')) for d in data)
    live = root/'nbs'/'live'
    assert all((live/name).read_text() in saved for name in ('masks.css','masks.js')), 'run the page again'

@pytest.mark.parametrize('kind', ['batch', 'sequence', 'token', 'number'])
def test_the_masks_drop_at_the_rate_p(kind):
    kept = torch.stack([masks.kept(kind, .3, seed) for seed in masks.seeds]).float()
    draws = dict(batch=6, sequence=10, token=12, number=48)[kind]*len(masks.seeds)
    if kind=='batch': kept = kept[:, [words.index(w) for w in masks.vocab]] # copies of a word are one draw
    rate = kept.mean()
    assert abs(rate-.7) < 5*(.3*.7/draws)**.5

def drawn(p, seed, per):
    "Which words an `EmbeddingDropout` over the two sentences keeps, from the module itself"
    batch = masks.ids()
    drop = EmbeddingDropout(nn.Embedding(len(masks.vocab), masks.dims), p, per=per)
    torch.manual_seed(seed)
    return drop(batch.clamp(min=0)).ne(0).any(-1)[batch>=0].tolist()

@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='no playwright')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=['--no-sandbox'])
        yield browser
        browser.close()

@pytest.fixture(scope='module')
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp('live')/'figure.html'
    path.write_text(f'<!doctype html><meta name="viewport" content="width=device-width"><body>{masks.figure()}')
    return path.as_uri()

@pytest.fixture
def page(browser, address):
    "The figure in a page that fails the test on an error or a request"
    page = browser.new_page(viewport=dict(width=760, height=760))
    faults = []
    page.on('pageerror', lambda e: faults.append(str(e)))
    page.on('request', lambda r: faults.append(r.url) if not r.url.startswith('file:') else None)
    page.goto(address)
    yield page
    page.close()
    assert not faults

def shown(page, panel):
    "Which words panel 0, 1 or 2 keeps, wholly or in part"
    return page.evaluate('''n => [...document.querySelectorAll('.masks-panels svg')[n].querySelectorAll('.row')]
        .map(row => row.querySelectorAll('.kept').length > 0)''', panel)

def means(page, kind='mean'):
    return page.eval_on_selector_all(f'.bar.{kind}', 'bars => bars.map(b => +b.dataset.value)')

@needs_browser
def test_the_masks_are_the_modules(page):
    for seed in masks.seeds[:4]:
        assert shown(page, 0)==drawn(.3, seed, 'batch')
        assert shown(page, 1)==drawn(.3, seed, 'token')
        page.click('.masks-new')
    page.check('.masks-sequence')
    assert shown(page, 0)==drawn(.3, masks.seeds[4], 'sequence')

@needs_browser
def test_the_slider(page):
    page.focus('input[type=range]')
    for _ in range(4): page.keyboard.press('ArrowRight')
    assert page.inner_text('.masks-p')=='0.7' and shown(page, 0)==drawn(.7, masks.seeds[0], 'batch')
    page.keyboard.press('End')
    assert not any(shown(page, 0)) and means(page)==[0]*len(words)
    page.keyboard.press('Home')
    assert all(shown(page, 2)) and means(page)==[1]*len(words)

@needs_browser
def test_a_word_lights_up_its_copies_in_all_panels(page):
    page.hover('.row[data-word=dog]')
    lit = page.eval_on_selector_all('.row.lit', 'rows => rows.map(r => r.dataset.word)')
    assert lit==['dog']*6 and '“dog” occurs 2 times' in page.inner_text('.masks-say')
    page.hover('.row[data-word=ran]')
    assert '“ran” occurs once' in page.inner_text('.masks-say')

def dropped_words(rows):
    "The words at `rows` without copies, as the sentence below the figure quotes them"
    return ', '.join(dict.fromkeys(f'“{words[row]}”' for row in rows))

@needs_browser
def test_the_sentence_says_what_is_dropped(page):
    "By word type, and sentence by sentence, where a copy may be kept"
    page.check('.masks-sequence')
    sizes = [len(sentence) for sentence in masks.words]
    kept_copies = 0
    for seed in masks.seeds[:6]:
        rows = [row for row,keep in enumerate(drawn(.3, seed, 'sequence')) if not keep]
        first,second = [row for row in rows if row<sizes[0]],[row for row in rows if row>=sizes[0]]
        parts = [f'{dropped_words(o)} in sentence {i}' for i,o in ((1,first),(2,second)) if o]
        said = page.inner_text('.masks-say')
        assert f'Sentence by sentence, this mask drops {"; ".join(parts)}: {len(rows)} of 12 words.' in said
        kept_copies += len({words[row] for row in rows} & {words[row] for row in {*range(12)}-{*rows}})

        page.uncheck('.masks-sequence')
        rows = [row for row,keep in enumerate(drawn(.3, seed, 'batch')) if not keep]
        said = page.inner_text('.masks-say')
        assert f'By word type, this mask drops {dropped_words(rows)}: {len(rows)} of 12 words.' in said
        page.check('.masks-sequence')
        page.click('.masks-new')
    assert kept_copies, 'some word is dropped in one sentence and kept in the other'

@needs_browser
@pytest.mark.parametrize('width', [400, 760, 1000])
def test_titles_do_not_overlap(page, width):
    page.set_viewport_size(dict(width=width, height=800))
    for _ in range(2):
        page.click('.masks-sequence')
        boxes = page.eval_on_selector_all('.masks-panels .title', 'os => os.map(o => o.getBoundingClientRect())')
        assert all(left['right'] < right['left'] for left,right in zip(boxes, boxes[1:]))

@needs_browser
def test_the_keyboard_reaches_every_word(page):
    page.focus('.row[tabindex="0"]')
    seen = []
    for _ in words:
        seen.append(page.evaluate('document.activeElement.dataset.word'))
        assert page.locator('.row.lit').count()==3*words.count(seen[-1])
        page.keyboard.press('ArrowDown')
    assert seen==words
    assert page.locator('.row[tabindex="0"]').count()==1, 'one stop for the Tab key'

@needs_browser
def test_the_focused_word_stays_lit(page):
    "When the pointer leaves another word"
    page.focus('.row[tabindex="0"]')
    page.hover('.row[data-word=dog]')
    page.hover('.masks-say')
    assert page.eval_on_selector_all('.row.lit', 'rows => rows.map(r => r.dataset.word)')==['the']*12

@needs_browser
def test_the_mean_of_a_hundred_masks(page):
    first = means(page)
    assert set(first)=={0, 1.4286}, 'a single mask: dropped, or scaled by 1/.7'
    page.click('.masks-hundred')
    p,n = .3,100
    assert all(abs(m-1) < 5*(p/(1-p)/n)**.5 for m in means(page))
    assert all(abs(m-.7) < 5*(p*(1-p)/n)**.5 for m in means(page, 'plain-mean'))
    assert 'the last 100 masks' in page.inner_text('.masks-say')

@needs_browser
def test_a_narrow_page_does_not_scroll_sideways(page, tmp_path):
    page.set_viewport_size(dict(width=400, height=800))
    assert page.evaluate('document.documentElement.scrollWidth')==400
    assert len(page.screenshot(path=tmp_path/'phone.png'))>10_000

@needs_browser
def test_in_the_dark(page, tmp_path):
    page.add_style_tag(content='body { background: #222; color: #eee }')
    colours = page.evaluate('''() => [getComputedStyle(document.querySelector('.masks-figure text')).fill,
        getComputedStyle(document.querySelector('.dropped')).stroke]''')
    assert colours==['rgb(238, 238, 238)']*2
    assert len(page.screenshot(path=tmp_path/'dark.png'))>10_000

@needs_browser
def test_no_motion_for_who_asks_for_none(page):
    duration = "getComputedStyle(document.querySelector('.bar')).transitionDuration"
    assert page.evaluate(duration)!='0s'
    page.emulate_media(reduced_motion='reduce')
    assert page.evaluate(duration)=='0s'

@needs_browser
def test_a_still_picture_without_scripts(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator('.masks-figure svg rect').count()==3*len(words)*masks.dims
    context.close()

@needs_browser
def test_a_still_picture_where_scripts_are_stripped(browser):
    "And styles with them, on a dark page: GitHub, or a notebook that is not trusted"
    bare = re.sub(r'(?s)<(script|style)>.*?</\1>', '', masks.figure())
    page = browser.new_page()
    page.set_content(f'<body style="background: #222; color: #eee">{bare}')
    assert page.locator('.masks-figure svg rect').count()==3*len(words)*masks.dims
    fills = page.eval_on_selector_all('.masks-figure text', 'os => os.map(o => getComputedStyle(o).fill)')
    assert {*fills}=={'rgb(238, 238, 238)'}
    page.close()
