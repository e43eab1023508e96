"""The page: what its file holds, and what a browser makes of it."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from dispatch_samples import DENSE, LAYERS, PALETTE, classified, cost, sample, segmented

from mmdyt.engine.pictures import heat_map
from mmdyt.engine.visualize.page import SIDE, packed, quantise, write_page

HOSTILE = '</script><img src=x onerror=alert(1)>/*SCRIPT*/\udc80<!--".png'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
SWITCHES = (
    'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
    'disable-component-update', 'disable-sync', 'enable-logging=stderr', 'virtual-time-budget=20000', 'dump-dom',
)  # fmt: skip
in_a_browser = pytest.mark.skipif(BROWSER is None, reason='no chromium is installed')

# What a reader sees, as JSON; `look` is for scripts of tests.
LOOK = """
const rows = id => [...find(id).rows].map(row => row.textContent);
const look = () => ({name: find('name').textContent, summary: find('summary').textContent, layers: rows('layers'),
  numbers: rows('numbers'), estimate: find('estimate').textContent, asked: find('rate').nextElementSibling.textContent,
  why: find('why').textContent, off: find('rate').disabled, frames: !find('frame').parentElement.hidden,
  layer: find('layer').nextElementSibling.textContent, classes: find('classes').textContent,
  answers: find('answers').textContent, hash: location.hash, list: [...find('images').children].map(item => item.title),
  chosen: [...document.querySelectorAll('[aria-selected=true]')].map(item => item.title)});
const wait = () => new Promise(done => setTimeout(done, 300));
const press = key => find('images').dispatchEvent(new KeyboardEvent('keydown', {key, cancelable: true}));
const set = (id, value) => {
  find(id).value = value;
  find(id).dispatchEvent(new Event(id === 'order' ? 'change' : 'input'));
};
const pixels = places => {
  const {width, height} = find('picture'), scale = width / 60;
  const seen = find('picture').getContext('2d').getImageData(0, 0, width, height).data;
  return places.map(([x, y]) => 4 * scale * (width * y + x)).map(at => [...seen.slice(at, at + 4)]);
};
const report = found => parent === window
  ? document.body.append(element('pre', JSON.stringify(found), {id: 'found'})) : parent.postMessage(found, '*');
"""


def samples():
    """Of each task; the third has no logits, and cells that were not seen."""
    clip = sample('clips/clip.mp4', frames=3)
    plain = classified('test/no_logits.png', logits=None)
    plain.masks[:, :, 0, 0] = np.nan
    return [segmented('street.png', shift=0.5), clip, plain]


def embedded(file):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)[1])


def decoded(codes, dtype, shape):
    values = np.frombuffer(base64.b64decode(codes), dtype).reshape(shape).astype(float)
    values[values == np.iinfo(dtype).max] = np.nan
    return values / (np.iinfo(dtype).max - 1)


def browse(file, script, fragment='', width=None):
    """What a script, run in the open page, returns; nothing may be written to the console.

    A browser's window has a least width: pages for narrower screens are opened in a frame.
    """
    opened = file.with_name('opened.html')
    run = f'(async () => {{ await wait(); report(await (async () => {{ {script} }})()); }})();'
    opened.write_text(file.read_text().replace('</body>', f'<script>{LOOK}{run}</script></body>'))
    if width:
        frame = f'<iframe src="{opened.name}{fragment}" style="width: {width}px; border: 0"></iframe>'
        show = 'onmessage = event => { document.getElementById("found").textContent = JSON.stringify(event.data); };'
        opened = file.with_name('outer.html')
        opened.write_text(f'<pre id="found"></pre><script>{show}</script>{frame}')
    profile = f'user-data-dir={file.parent / "profile"}'
    command = [BROWSER, *(f'--{switch}' for switch in (*SWITCHES, profile)), opened.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if 'CONSOLE' in line] == []
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1]))


@pytest.fixture
def page(tmp_path):
    write_page(samples(), tmp_path / 'page.html', 'Title')
    return tmp_path / 'page.html'


def numbers_of(rates, gmacs, word=''):
    """The summary and the rows of layers at some rates."""
    share = 100 * gmacs / DENSE
    rows = [f'{layer}{rate:.2f}' for layer, rate in zip(LAYERS, rates, strict=True)]
    return f'Rate {np.mean(rates):.3f}, {gmacs:.3f} GMACs, {share:.1f} % of dense{word}.', rows


def test_the_page_is_one_file_that_asks_for_nothing(page):
    assert [path.name for path in page.parent.iterdir()] == ['page.html']
    text, found = page.read_text(), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(text)
    assert not re.search(r'https?:|@import|url\(|fetch\(|/\*(STYLE|SCRIPT|DATA)', text)
    assert [attributes.get('type') for tag, attributes in found if tag == 'script'] == ['application/json', None]
    assert [attributes['href'] for _, attributes in found if 'href' in attributes] == ['data:,']
    assert not [tag for tag, attributes in found if 'src' in attributes]
    (policy,) = (a['content'] for _, a in found if a.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_control_has_a_label(page):
    text = page.read_text().split('<script')[0]
    controls = re.findall(r'<(?:input|select)\b[^>]*\bid="([\w-]+)"', text)
    assert controls == ['filter', 'order', 'layer', 'opacity', 'frame', 'rate']
    assert set(controls) <= set(re.findall(r'<label for="([\w-]+)"', text))


def test_masks_and_logits_come_back(page):
    for one, image in zip(samples(), embedded(page)['images'], strict=True):
        np.testing.assert_allclose(decoded(image['masks'], np.uint8, one.masks.shape), one.masks, atol=0.5 / 254)
        assert (image['gmacs'], image['rates']) == (one.gmacs, one.rates().tolist())
        if one.logits is None:
            assert image['logits'] is None
            continue
        lows, highs = (np.reshape(image['logits'][end], (3, 1, 1, 1)) for end in ('lows', 'highs'))
        logits = decoded(image['logits']['codes'], '<u2', one.logits.shape) * (highs - lows) + lows
        np.testing.assert_allclose(logits, one.logits, atol=(highs - lows).max() / 65534)


@pytest.mark.parametrize(
    'values, codes',
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 127, 254, 255]),
        ([-np.inf, np.inf, -3.0, 3.0], [0, 254, 0, 254]),
    ],
)
def test_the_highest_code_is_nan_and_others_are_clipped(values, codes):
    assert quantise(np.array(values), 0, 1, np.uint8).tolist() == codes


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 2.5])
def test_a_branch_of_one_logit_is_packed(value):
    image = packed(sample('a', logits=np.full((3, 1, 4, 5), value)))
    low = 2.5 if value == 2.5 else 0.0
    assert (image['logits']['lows'], image['logits']['highs']) == ([low] * 3, [low] * 3)
    json.dumps(image, allow_nan=False)


@pytest.mark.parametrize('shape, size', [((300, 1280), (150, SIDE)), ((1280, 2), (SIDE, 1)), ((30, 40), (30, 40))])
def test_pictures_are_scaled_down_only(shape, size):
    one = sample('a', truth=np.zeros(shape, np.uint8), classes=['sky'])
    one.pictures = [np.full((*shape, 3), 77, np.uint8)]
    image = packed(one)
    for uri, kind in ((image['frames'][0], 'jpeg'), (image['labels']['truth'], 'png')):
        head, body = uri.split(',')
        assert head == f'data:image/{kind};base64'
        assert cv2.imdecode(np.frombuffer(base64.b64decode(body), np.uint8), cv2.IMREAD_COLOR).shape == (*size, 3)


def test_names_do_not_break_out_of_the_page(tmp_path):
    write_page([classified(HOSTILE)], tmp_path / 'page.html', HOSTILE)
    data = embedded(tmp_path / 'page.html')
    assert data['title'] == data['images'][0]['name'] == HOSTILE
    assert '<img' not in (tmp_path / 'page.html').read_text()


def test_the_wheel_has_all_files_of_the_page(monkeypatch):
    import setuptools
    from conftest import ROOT

    given = {}
    monkeypatch.setattr(setuptools, 'setup', given.update)
    exec(
        compile((ROOT / 'setup.py').read_text(), str(ROOT / 'setup.py'), 'exec'), dict(__file__=str(ROOT / 'setup.py'))
    )
    folder, patterns = ROOT / 'mmdyt/engine/visualize', given['package_data']['mmdyt.engine.visualize']
    packed_files = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packed_files == {path for path in folder.iterdir() if path.is_file() and path.suffix != '.py'}


@in_a_browser
def test_numbers_as_it_ran(page):
    script = """const found = []; for (const i of [0, 1, 2]) { choose(i); await wait(); found.push(look()); }
                return found;"""
    for one, seen in zip(samples(), browse(page, script), strict=True):
        assert (seen['summary'], seen['layers']) == numbers_of(one.rates(), one.gmacs)
        assert (seen['name'], seen['chosen'], seen['estimate']) == (one.name, [one.name], '')
        assert seen['frames'] == (len(one.pictures) > 1) and seen['layer'] == 'mean of all'
        assert seen['off'] == (one.logits is None) and seen['asked'] == 'as it ran'
        assert seen['why'].startswith('Cannot be asked' if one.logits is None else 'One threshold')
    assert seen['answers'] == 'truth: dog, prediction: bee (0.70)'


@in_a_browser
@pytest.mark.parametrize('image, rate', [(0, 0.4), (1, 0.4), (0, 0), (1, 1)])
def test_numbers_at_another_rate(page, image, rate):
    seen = browse(page, 'return look();', f'#image={image}&layer=3&frame=1&rate={rate}')
    one = samples()[image]
    rank = (-one.logits.ravel()).argsort().argsort()
    active = (rank < round(rate * one.logits.size)).reshape(3, -1)
    assert (seen['summary'], seen['layers']) == numbers_of(active.mean(1), cost(active.mean(1)), ' (estimate)')
    assert (seen['estimate'], seen['asked'], seen['layer']) == ('estimate', f'{rate:.2f}, estimate', 'layer_2')
    assert f'GMACs, as it ran{one.gmacs:.3f}' in seen['numbers']


@in_a_browser
def test_sliders_ask_and_go_back_and_the_address_keeps_the_state(page):
    script = """choose(0); set('rate', 0.3); set('layer', 2); const moved = look(); find('as-run').click();
                const back = look(); location.hash = '#image=1&rate=0.5&frame=9'; await wait();
                return [moved, back, look()];"""
    moved, back, other = browse(page, script)
    assert moved['summary'].startswith('Rate 0.300') and moved['layer'] == 'layer_1'
    assert moved['hash'] == '#image=0&layer=2&frame=0&opacity=0.55&rate=0.3&show=tokens'
    assert (back['summary'], back['layers']) == numbers_of(samples()[0].rates(), samples()[0].gmacs)
    assert back['estimate'] == '' and 'rate' not in back['hash']
    assert other['name'] == 'clips/clip.mp4' and other['summary'].startswith('Rate 0.500')


@in_a_browser
@pytest.mark.parametrize('image, layer, frame', [(0, 0, 0), (1, 0, 2), (1, 3, 1), (2, 1, 0)])
def test_the_canvas_shows_the_map(page, image, layer, frame):
    places = [(6 + 12 * (i % 5), 5 + 10 * (i // 5)) for i in range(20)]
    seen = browse(
        page, f'return pixels({json.dumps(places)});', f'#image={image}&layer={layer}&frame={frame}&opacity=1'
    )
    maps = samples()[image].masks[:, frame]
    cells = (maps[layer - 1] if layer else maps.mean(0)).ravel()
    expected = heat_map(np.nan_to_num(cells)[None])[0, :, ::-1]
    for cell, (*colour, opaque), wanted in zip(cells, seen, expected.tolist(), strict=True):
        assert opaque == 255
        assert len(set(colour)) == 1 if np.isnan(cell) else colour == wanted  # grey where nothing was seen


@in_a_browser
def test_prediction_and_truth_are_painted_over_and_named(page):
    script = "return [look(), pixels([[2, 38], [50, 15]]), find('legend').hidden];"
    for show, colours in (('prediction', (2, 1)), ('truth', (0, 1))):
        seen, pixels, no_legend = browse(page, script, f'#image=0&show={show}&opacity=1')
        assert [pixel[:3] for pixel in pixels] == [PALETTE[i] for i in colours]
        assert seen['classes'] == 'skycarroad' and no_legend


@in_a_browser
def test_the_list_is_ordered_filtered_and_moved_through_by_keys(page):
    script = """const found = [look()];
        const keys = ['ArrowDown', 'End', 'ArrowDown', 'ArrowUp', 'Home', 'x'];
        for (const key of keys) { press(key); found.push(look()); }
        set('order', 1); found.push(look()); set('filter', 'CLIP'); found.push(look()); press('End');
        found.push(look()); set('filter', 'nowhere'); press('End'); found.push(look()); return found;"""
    first, *moved, cheapest, filtered, last, nothing = browse(page, script)
    names = [one.name for one in sorted(samples(), key=lambda one: -one.gmacs)]
    assert first['list'] == names and first['chosen'] == names[:1]
    assert [one['chosen'] for one in moved] == [[names[i]] for i in (1, 2, 2, 1, 0, 0)]
    assert cheapest['list'] == names[::-1]
    assert filtered['list'] == last['list'] == last['chosen'] == ['clips/clip.mp4']
    assert nothing['list'] == [] and nothing['name'] == 'clips/clip.mp4'


@in_a_browser
def test_a_phone_needs_no_sideways_scroll(tmp_path):
    write_page([segmented('a' * 200), *samples()], tmp_path / 'page.html', 'T' * 100)
    script = (
        'const {scrollWidth, clientWidth} = document.documentElement; return [innerWidth, scrollWidth - clientWidth];'
    )
    assert browse(tmp_path / 'page.html', script, '#rate=0.5', width=360) == [360, 0]


@in_a_browser
def test_hostile_names_are_text(tmp_path):
    name = HOSTILE.replace('\udc80', '')  # no browser prints that
    write_page([classified(name)], tmp_path / 'page.html', name)
    script = "return [look().name, document.title, document.querySelectorAll('img').length];"
    name, title, images = browse(tmp_path / 'page.html', script)
    assert (
        images == 0 and title.startswith('</script><img') and name.startswith('</script><img src=x onerror=alert(1)>')
    )


@in_a_browser
def test_a_page_of_nothing_opens(tmp_path):
    write_page([], tmp_path / 'page.html', 'Empty')
    seen = browse(tmp_path / 'page.html', "return [find('main').hidden, find('shown').textContent];")
    assert seen == [True, '0 of 0 images, with GMACs']


@in_a_browser
def test_samples_without_a_cost_are_told_apart_from_free_ones(tmp_path):
    known, unknown = segmented('known.png'), segmented('unknown.png')
    unknown.gmacs = unknown.gmacs_rest = float('nan')
    write_page([unknown, known], tmp_path / 'page.html', 'costs')
    script = """const texts = () => [...document.querySelectorAll('#images li')].map(item => item.textContent);
        const dearest = texts();
        const order = document.getElementById('order');
        order.value = order.options[1].value;
        order.onchange({target: order});
        return [dearest, texts(), document.getElementById('costs').textContent];"""
    dearest, cheapest, text = browse(tmp_path / 'page.html', script)
    assert dearest == cheapest and dearest[0].startswith('known') and dearest[1].startswith('unknown')
    assert text.startswith(f'GMACs of 1 images: {known.gmacs:.3f} to {known.gmacs:.3f}, mean {known.gmacs:.3f};')
