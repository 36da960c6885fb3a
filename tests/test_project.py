"What no single notebook can show: everything in sync, the style floors, one source of metadata"
import ast, hashlib, importlib, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import nbstyle

NBS = sorted(p for p in (ROOT/'nbs').glob('*.ipynb'))
CHAPTERS = [p for p in NBS if p.stem!='index']
ORDER = ['synthesis', 'codecs', 'sparse', 'files', 'shards', 'cache', 'sources', 'practice', 'projection', 'student', 'width', 'loss', 'divergences', 'relations', 'student_space', 'distiller', 'monitor', 'shard', 'memory', 'trainer', 'stages', 'vision', 'watch', 'attention', 'eval', 'benchmarks',
    'export', 'serving', 'winrate', 'config', 'pipeline', 'recipes', 'plan']

def cells(p): return json.loads(p.read_text(encoding='utf-8'))['cells']

def hashes(root, *patterns): return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for g in patterns for p in root.glob(g)}

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The tracked tree, somewhere else, so that a test never changes it"
    d = tmp_path_factory.mktemp('tree')/'distill_nb'
    shutil.copytree(ROOT, d, ignore=shutil.ignore_patterns('.venv', '.git', '_*s', '_proc', '_md', 'demo', 'longer', 'ablation', '*.egg-info', '__pycache__'))
    return d

def tool(d, *args): return subprocess.run([str(Path(sys.executable).with_name(args[0])), *args[1:]], cwd=d, check=True, capture_output=True, text=True)

def test_clean_and_export_leave_no_diff(copy):
    before = hashes(copy, 'nbs/*.ipynb', 'distill_nb/*.py')
    tool(copy, 'nbdev-clean')
    tool(copy, 'nbdev-export')
    after = hashes(copy, 'nbs/*.ipynb', 'distill_nb/*.py')
    assert len(after)>=20 and after==before, {k for k in after|before if after.get(k)!=before.get(k)}

def test_readme_is_in_sync(copy):
    before = hashes(copy, 'README.md', 'assets/*')
    tool(copy, 'python', 'tools/docs.py', '--readme-only')
    assert 'README.md' in before and hashes(copy, 'README.md', 'assets/*')==before

def test_style_floors():
    rs = [nbstyle.measure(p) for p in NBS]
    total = lambda k: sum(r[k] for r in rs)
    lines = sorted(x for r in rs for x in r['exp_lines'])
    assert total('docstring')==total('public') and total('docmented')==total('params')
    assert total('tested')/total('defining')>=.9
    assert lines[len(lines)//2]<=10 and lines[int(.9*len(lines))]<=20 and lines[-1]<=40, lines[-10:]
    assert total('words')/total('code_lines')>=2
    assert not any(total(k) for k in ('mixed_import', 'star', 'forward', 'bad_syntax'))

@pytest.mark.parametrize('p', NBS, ids=lambda p: p.stem)
def test_chapter_is_one_sitting(p):
    "At 200 words and 20 lines of code a minute, a chapter takes a lecture and a half at most"
    text = lambda kind: [''.join(c['source']) for c in cells(p) if c['cell_type']==kind]
    assert sum(len(o.split()) for o in text('markdown'))/200+sum(o.count('\n')+1 for o in text('code'))/20<=75

SIGNATURE = re.compile(r'(\*{0,2}\w+(:.*|=.*)?,|\)(->.*)?:) # ') # an argument with its docment

def sources():
    "Name and code of each file; the cells of a notebook one by one, and with them the modules, which are made of cells"
    for d in ('tests', 'bench', 'tools'):
        for p in sorted((ROOT/d).glob('*.py')): yield p.name,p.read_text(encoding='utf-8')
    for p in sorted((ROOT/'nbs').rglob('*.ipynb')):
        for i,c in enumerate(cells(p)):
            if c['cell_type']=='code': yield f'{p.name}[{i}]',''.join(c['source'])

def repeats(sources, n=6):
    "Blocks of `n` lines in all, and where one stands twice"
    seen,twice = {},[]
    for name,text in sources:
        lines = [(i, s) for i,l in enumerate(text.splitlines(), 1) if (s := l.strip()) and s[0]!='#' and not SIGNATURE.match(s)]
        for block in zip(*(lines[k:] for k in range(n))):
            at = f'{name}:{block[0][0]}'
            if (was := seen.setdefault(tuple(s for _,s in block), at))!=at: twice.append(f'{was} and {at}')
    return len(seen),twice

def test_no_six_lines_stand_twice():
    n,twice = repeats(sources())
    assert n>5000 and not twice, twice
    six = 'a = 1\n\nb = 2\nc = 3\nd = 4\ne = 5\nf = 6\n'
    assert repeats([('x', six), ('y', f'# so\n  {six}')])==(1, ['x:1 and y:2']) and not repeats([('x', six), ('y', six.replace('6', '7'))])[1]

@pytest.mark.parametrize('p', NBS, ids=lambda p: p.stem)
def test_chapter_has_its_parts(p):
    r,outs = nbstyle.measure(p),[o for c in cells(p) for o in c.get('outputs', [])]
    assert r['title'] and r['blurb']
    assert any('image/png' in o.get('data', {}) for o in outs), 'no picture'
    assert not any(o['output_type']=='error' for o in outs)
    text = json.dumps([o.get('text', o.get('data', {}).get('text/plain')) for o in outs])
    assert not re.search(r'/(root|home|work|tmp|Users)/|site-packages', text), 'a path of a machine'
    assert not re.search(r'\d+%\|', text), 'a progress bar'

@pytest.mark.parametrize('name', ORDER)
def test_modules_import_and_only_lower_chapters(name):
    importlib.import_module(f'distill_nb.{name}')
    tree = ast.parse((ROOT/f'distill_nb/{name}.py').read_text())
    used = {n.module.split('.')[-1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('distill_nb'))}
    assert used <= set(ORDER[:ORDER.index(name)]), used

def test_one_source_of_metadata():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    c = ini['DEFAULT']
    assert version('distill_nb')==c['version']
    pinned = {re.split('[=<>]', l)[0].lower().replace('_', '-') for l in (ROOT/'constraints.txt').read_text().split()}
    want = {re.split('[=<>]', r)[0].lower().replace('_', '-') for r in (c['requirements']+' '+c['dev_requirements']+' '+c['export_requirements']+' '+c['eval_requirements']).split()}
    assert want <= pinned, want-pinned

def test_prompts_are_clean():
    rows = [json.loads(l) for l in (ROOT/'distill_nb/data/instructions.jsonl').read_text(encoding='utf-8').splitlines()]
    assert all(set(r)=={'id', 'family', 'split', 'prompt'} and 15<len(r['prompt'])<1000 for r in rows)
    assert len({r['id'] for r in rows})==len(rows)
    words = [frozenset(re.findall(r'\w+', r['prompt'].lower())) for r in rows]
    near = [(rows[i]['id'], rows[j]['id']) for i in range(len(rows)) for j in range(i) if len(words[i]&words[j])>.8*len(words[i]|words[j])]
    assert not near, near
