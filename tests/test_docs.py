"The site builds without network, nothing on it points nowhere, and a browser shows all of it"
import functools, http.server, itertools, json, os, re, select, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).parents[1]

class Links(HTMLParser):
    "Targets, pictures and anchors of a page"
    def __init__(self):
        super().__init__()
        self.to,self.imgs,self.ids = [],[],set()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if (url := a.get('href') if tag=='a' else a.get('src') if tag=='img' else None): self.to.append(url)
        if tag=='img': self.imgs.append(a.get('src'))

@functools.cache
def links(p):
    res = Links()
    res.feed(p.read_text(encoding='utf-8'))
    return res

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy of the tree"
    d = tmp_path_factory.mktemp('site')/'distill_nb'
    shutil.copytree(ROOT, d, ignore=shutil.ignore_patterns('.venv', '.git', '_*s', '_proc', '_md', 'demo', 'longer', 'ablation', '*.egg-info', '__pycache__'))
    subprocess.run([sys.executable, 'tools/docs.py'], cwd=d, check=True, capture_output=True)
    return d/'_docs'

def test_each_notebook_has_a_page(site):
    pages = {p.stem for p in site.rglob('*.html')}
    assert {p.stem.split('_', 1)[-1] for p in (ROOT/'nbs').rglob('*.ipynb')} <= pages

def plots(nb):
    "Pictures in a notebook's outputs, which its page must show; hidden cells have no page"
    cells = [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code' and not ''.join(c['source']).startswith('#| hide\n')]
    return sum('image/png' in o.get('data', {}) or '<img' in ''.join(o.get('data', {}).get('text/html', '')) for c in cells for o in c['outputs'])

def test_every_plot_is_on_its_page(site):
    root,found = ROOT/'nbs',{}
    for nb in root.rglob('*.ipynb'):
        page = site/nb.relative_to(root).with_name(nb.stem.split('_', 1)[-1]+'.html')
        found[nb.stem] = plots(nb),len(set(links(page).imgs))
    assert sum(n for n,_ in found.values())>40 and all(n==shown for n,shown in found.values()), {k: v for k,v in found.items() if v[0]!=v[1]}

def test_no_link_points_nowhere(site):
    bad = []
    for p in site.rglob('*.html'):
        for url in links(p).to:
            u = urlparse(url)
            if u.scheme or u.netloc or p.name=='404.html': continue
            target = (p.parent/unquote(u.path)).resolve() if u.path else p
            if target.is_dir(): target = target/'index.html'
            if not target.exists() or (u.fragment and target.suffix=='.html' and u.fragment not in links(target).ids): bad.append((p.name, url))
    assert not bad, bad

def test_no_link_is_left_as_text(site):
    prose = lambda p: re.sub(r'<code.*?</code>|<[^>]*>', '', p.read_text(encoding='utf-8'), flags=re.S)
    bad = [p.name for p in site.rglob('*.html') if re.search(r'\]\([\w./-]+\.(md|ipynb)', prose(p))]
    assert not bad, bad

def test_nothing_is_loaded_from_elsewhere(site):
    for p in site.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        assert '<script src="http' not in text and 'fonts.googleapis' not in text, p.name

CHROME = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chrome')
FLAGS = '--headless --no-sandbox --disable-gpu --no-first-run --disable-extensions --disable-background-networking --disable-component-update --mute-audio'

class Browser:
    "One headless Chromium, spoken to over its DevTools pipe: requests and answers are JSON that ends in a zero byte"
    def __init__(self, profile):
        (inr,self.w),(self.r,outw) = os.pipe(),os.pipe()
        high = [os.dup2(f, n) for f,n in ((inr, 103), (outw, 104))]
        self.p = subprocess.Popen(['bash', '-c', f'exec {CHROME} {FLAGS} --user-data-dir="$0" --remote-debugging-pipe 3<&103 4>&104 103<&- 104>&-', str(profile)],
            pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for f in (inr, outw, *high): os.close(f)
        self.ids,self.buf,self.events,self.session = itertools.count(1),b'',[],None
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for o in ('Page', 'Runtime', 'Log', 'Network'): self(f'{o}.enable')

    def read(self, timeout=60):
        "The next message"
        while b'\0' not in self.buf:
            if not select.select([self.r], [], [], timeout)[0]: raise TimeoutError('the browser does not answer')
            if not (got := os.read(self.r, 1<<20)): raise ConnectionError('the browser is gone')
            self.buf += got
        head,_,self.buf = self.buf.partition(b'\0')
        return json.loads(head)

    def __call__(self, method, **params):
        "What the browser answers to `method`; events that come meanwhile are kept"
        n = next(self.ids)
        os.write(self.w, json.dumps(dict(id=n, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})).encode()+b'\0')
        while (m := self.read()).get('id')!=n: self.events.append(m)
        assert 'error' not in m, (method, m['error'])
        return m['result']

    def js(self, code):
        "The value of `code`, awaited"
        r = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in r, r['exceptionDetails']
        return r['result'].get('value')

    def open(self, url):
        "Go to `url`; the events until it is loaded"
        self.events = []
        self('Page.navigate', url=url)
        while not any(e.get('method')=='Page.loadEventFired' for e in self.events): self.events.append(self.read())
        return self.events

    def size(self, width, height): self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def close(self):
        self.p.terminate()
        self.p.wait()
        os.close(self.r)
        os.close(self.w)

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROME: pytest.skip('no Chromium on this machine')
    b = Browser(tmp_path_factory.mktemp('profile'))
    yield b
    b.close()

@pytest.fixture(scope='module')
def served(site):
    "The address of the site, served on this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()
    s.server_close()

def complaints(events, root):
    "Errors of a page, and requests that leave this machine"
    for e in events:
        m,p = e.get('method'),e.get('params', {})
        if m=='Runtime.exceptionThrown': yield p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text'])
        if m=='Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): yield str([a.get('value', a.get('description')) for a in p['args']])
        if m=='Log.entryAdded' and p['entry']['level']=='error': yield f"{p['entry']['text']} {p['entry'].get('url', '')}"
        if m=='Network.requestWillBeSent' and not p['request']['url'].startswith((root, 'data:', 'blob:')): yield f"asks {p['request']['url']}"

LOOK = """(async () => {
  const imgs = [...document.images].filter(o => o.checkVisibility());
  await Promise.all(imgs.map(o => { o.loading = 'eager'; return o.decode().catch(() => 0) }));
  const w = innerWidth, out = [];
  for (const o of imgs) if (!o.naturalWidth) out.push('no picture ' + o.src);
  if (document.documentElement.scrollWidth > w) {
    out.push('is ' + document.documentElement.scrollWidth + ' wide on ' + w);
    const boxed = o => { for (let p = o.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX != 'visible') return true; return false };
    for (const o of document.querySelectorAll('main *')) if (o.getBoundingClientRect().right > w + 1 && !boxed(o)) out.push(o.tagName + ' ' + o.textContent.trim().slice(0, 60));
  }
  return out.slice(0, 8) })()"""

SCHEME = """(() => {
  const dark = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(v => v < 80);
  return document.body.dataset.mdColorScheme + (dark ? ', dark' : ', light') })()"""

@pytest.mark.parametrize('width,scheme', [(390, 'default, light'), (1280, 'slate, dark')])
def test_each_page_in_a_browser(site, served, browser, width, scheme):
    "On a phone by day, on a desk by night; the button is pressed once, and the site remembers it"
    browser.size(width, 844)
    browser.open(f'{served}/index.html')
    browser.js(f"document.querySelector('#__palette_{int('dark' in scheme)}').click()")
    bad = {}
    for p in sorted(site.rglob('*.html')):
        if p.name=='404.html': continue
        events = browser.open(f'{served}/{p.relative_to(site)}')
        found = [*browser.js(LOOK), *([] if (got := browser.js(SCHEME))==scheme else [f'is {got}']), *complaints(events, served)]
        if found: bad[p.name] = found
    assert not bad, bad

SEARCH = """(async () => {
  const wait = async f => { for (let i = 0; i < 200 && !f(); i++) await new Promise(r => setTimeout(r, 50)); return f() };
  const q = document.querySelector('.md-search__input');
  if (!q) return 'no field';
  q.focus();
  q.value = 'WORD';
  q.dispatchEvent(new InputEvent('input', {bubbles: true}));
  q.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
  const a = await wait(() => document.querySelector('.md-search-result__link'));
  return a ? a.href : 'nothing found' })()"""

@pytest.mark.parametrize('how', ['served', 'folder'])
def test_search_works_without_network(site, served, browser, how):
    root = served if how=='served' else site.as_uri()
    browser.size(1280, 900)
    events = browser.open(f'{root}/index.html')
    assert browser.js(SEARCH.replace('WORD', 'linear_divergence')).startswith(f'{root}/loss.html')
    assert not [*complaints(events, root)]
