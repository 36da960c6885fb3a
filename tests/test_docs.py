"The site builds without network, and nothing on it points nowhere"
import functools, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).parents[1]

class Links(HTMLParser):
    "Targets and anchors of a page"
    def __init__(self):
        super().__init__()
        self.to,self.ids = [],set()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if (url := a.get('href') if tag=='a' else a.get('src') if tag=='img' else None): self.to.append(url)

@functools.cache
def links(p):
    res = Links()
    res.feed(p.read_text(encoding='utf-8'))
    return res

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built in a copy of the tree"
    d = tmp_path_factory.mktemp('site')/'distill_nb'
    shutil.copytree(ROOT, d, ignore=shutil.ignore_patterns('.venv', '.git', '_*s', '_proc', '_md', 'demo', '*.egg-info', '__pycache__'))
    subprocess.run([sys.executable, 'tools/docs.py'], cwd=d, check=True, capture_output=True)
    return d/'_docs'

def test_each_notebook_has_a_page(site):
    pages = {p.stem for p in site.rglob('*.html')}
    assert {p.stem.split('_', 1)[-1] for p in (ROOT/'nbs').rglob('*.ipynb')} <= pages

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

def test_nothing_is_loaded_from_elsewhere(site):
    for p in site.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        assert '<script src="http' not in text and 'fonts.googleapis' not in text, p.name
