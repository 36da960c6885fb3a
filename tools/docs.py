"README and docs site from the notebooks, on machines without Quarto: nbdev's cell processors, then Markdown, then MkDocs"
import os, re, shutil, subprocess, sys, yaml, nbformat

from fastcore.script import call_parse, store_true
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.serve import proc_nbs
from pathlib import Path

SPAN = re.compile(r'\[([^\]]*)\]\(([^)]*)\)\{([^}]*)\}')
CALLOUT = re.compile(r'^:::+ *\{\.callout-(\w+)[^}]*\}\n(.*?)^:::+ *$', re.M|re.S)
EMPTY = re.compile(r'```python\s+(?:def|class) [A-Z]\w*\(\s*(?:\*\*data:\s*Any|\*args,\s*\*\*kwargs)\s*\)\s*(?:->\s*None)?:?\s*```\s*') # of a class
CHAPTER = re.compile(r'\]\((\.\./)?(\w+)\.ipynb(#[^)]*)?\)')
LINK = re.compile(r'\]\((?:\.\./)?([\w./-]+)\)')
NESTED = re.compile(r'\[\[(`[^`]+`)\]\([^)]+\)\]\(([^)]+)\)') # a link of ours around a symbol that was linked by itself

def _callout(m): return f'!!! {m[1]}\n\n' + re.sub('^', '    ', m[2].strip(), flags=re.M) + '\n'

def plain(s):
    "Pandoc spans, callouts and divs in `s` as MkDocs Markdown"
    s = SPAN.sub(r'<a href="\2" \3>\1</a>', s)
    return re.sub(r'^:::.*$\n?', '', CALLOUT.sub(_callout, s), flags=re.M)

def mathml(s, display='inline'):
    "LaTeX `s` as MathML, with the thin space after a function's name that latex2mathml leaves out; in a span, or Markdown would take it for a block"
    res = re.sub(r'(<mi>(?:log|exp|ln)</mi>)(?=<m[in]|<msu|<mov|<mfr)', r'\1<mspace width="0.17em" />', convert(s, display=display))
    return f'<span class="display">{res}</span>' if display=='block' else f'<span>{res}</span>'

def math(s):
    "`s` with its LaTeX as MathML, which browsers show without a script; code is left alone"
    parts = re.split(r'(```.*?```|`[^`\n]+`)', s, flags=re.S)
    for i in range(0, len(parts), 2):
        p = re.sub(r'\$\$(.+?)\$\$', lambda m: mathml(m[1].strip(), 'block'), parts[i], flags=re.S)
        parts[i] = re.sub(r'(?<![\\$])\$([^$\n]+?)\$(?!\d)', lambda m: mathml(m[1]), p)
    return ''.join(parts)

def _anchor(m):
    "Heading `m` with its id; a dunder would be read as bold, so its id stands in front"
    if '__' in m[1]: return f'<a id="{m[1].lower()}"></a>\n\n### ' + m[1].replace('_', r'\_')
    return f'{m[0]} {{#{m[1].lower()}}}'

def anchor(s): return re.sub(r'^### ([\w.]+)$', _anchor, s, flags=re.M)

def options(c):
    "Quarto options of `c`, removed from its source"
    opts,lines = {},c.source.splitlines()
    while lines and lines[0].startswith('#|'):
        k,_,v = lines.pop(0)[2:].partition(':')
        opts[k.strip()] = v.strip().strip('"') or 'true'
    c.source = '\n'.join(lines)
    return opts

def new_md(s): return nbformat.v4.new_markdown_cell(plain(s))

def text_outputs(outputs):
    "`outputs` without the warnings and progress bars that went to stderr"
    return [o for o in outputs if o.get('name')!='stderr']

def page(c):
    "The cells that stand for `c` on a page"
    if c.cell_type=='raw':
        fm = yaml.safe_load(c.source.strip('-\n '))
        return [new_md(f"# {fm['title']}\n\n> {fm.get('description','')}")]
    if c.cell_type=='markdown': return [new_md(c.source)]
    o = options(c)
    shown = [x.data['text/markdown'] for x in c.outputs if 'text/markdown' in x.get('data', {})]
    if o.get('output')=='asis' and shown: return [new_md(anchor(EMPTY.sub('', s))) for s in shown]
    res = nbformat.v4.new_code_cell(c.source, outputs=[] if o.get('output')=='false' else text_outputs(c.outputs))
    if o.get('echo')=='false': res.source = ''
    return [res] + ([new_md(f"*{o['fig-cap']}*")] if 'fig-cap' in o else [])

def to_md(fn, dest):
    "Write processed notebook `fn` as Markdown at `dest`, with its figures in a folder beside it"
    nb = nbformat.read(fn, 4)
    nb.cells = [x for c in nb.cells for x in page(c)]
    nb.metadata.language_info = dict(name='python')
    md,res = MarkdownExporter().from_notebook_node(nb, resources=dict(output_files_dir=f'{dest.stem}_files', unique_key=dest.stem))
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(re.sub(r'\n{3,}', '\n\n', md.replace('__main__.', ''))) # a class of the notebook itself, in a signature
    for k,v in res['outputs'].items():
        p = dest.parent/k
        p.parent.mkdir(exist_ok=True)
        p.write_bytes(v)

def page_name(nb): return re.sub(r'^\d+[a-z]?_', '', nb)

def from_root(s, root):
    "`s` with its links to files of the repository (`../` from a notebook) as seen from `root`"
    return LINK.sub(lambda m: f']({m[1]})' if (root/m[1]).is_file() else m[0], s)

def repo_files(md, root, more):
    "Copy the files of the repository that pages in `md` link to, and `more`, so that the site has them"
    for k in {m[1] for f in md.glob('*.md') for m in LINK.finditer(f.read_text())}.union(more):
        if not (root/k).is_file(): continue
        (md/k).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/k, md/k)

def readme(md, dest):
    "README.md in folder `dest` from the index page: chapters are links to notebooks, figures live in `assets`"
    s = CHAPTER.sub(lambda m: f'](nbs/{m[2]}.ipynb{m[3] or ""})', from_root((md/'index.md').read_text(), dest))
    figs = sorted((md/'index_files').glob('*')) if (md/'index_files').exists() else []
    shutil.rmtree(dest/'assets', ignore_errors=True)
    for f in figs:
        (dest/'assets').mkdir(exist_ok=True)
        shutil.copy(f, dest/'assets'/f.name)
    s = re.sub(r'\]\((workshop|howto)/', r'](nbs/\1/', s)
    (dest/'README.md').write_text(s.replace('index_files/', 'assets/').rstrip()+'\n')

def symbols(s, name, up, site):
    "`s` of page `name` with its links to symbols as links within the site: private ones have no place there, the page's own come first"
    def to(m):
        if m[1].startswith('_'): return f'`{m[1]}`'
        return f'[`{m[1]}`]({"" if m[2]==name or f"{{#{m[3]}}}" in s else f"{up}{m[2]}.md"}#{m[3]})'
    return re.sub(rf'\[`([^`]+)`\]\({re.escape(site)}/(\w+)\.html#([^)]+)\)', to, s)

def pages(root, md):
    "Copy the pages that are Markdown already, their symbols linked: the how-to pages, and the workshop's page for its teacher"
    lookup = NbdevLookup(incl_libs='distill_nb')
    for f in [*root.glob('nbs/howto/*.md'), root/'nbs/workshop/README.md']:
        p = md/f.relative_to(root/'nbs')
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(lookup.linkify(f.read_text()).replace('../../assets/', '../index_files/')+'\n')

@call_parse
def main(
    readme_only:store_true=False, # Write README.md and its figures, and no site
):
    "Write README.md from the index notebook, and the site into `_docs`"
    cfg = get_config()
    cache,root = proc_nbs(n_workers=0, force=True),cfg.config_path
    md = root/'_md'
    shutil.rmtree(md, ignore_errors=True)
    for f in sorted(cache.rglob('*.ipynb')): to_md(f, md/nbpath2html(f.relative_to(cache)).with_suffix('.md'))
    readme(md, root)
    if readme_only: return
    pages(root, md)
    for f in md.rglob('*.md'):
        s = CHAPTER.sub(lambda m: f']({m[1] or ""}{page_name(m[2])}.md{m[3] or ""})', math(from_root(NESTED.sub(r'[\1](\2)', f.read_text()), root)))
        f.write_text(symbols(s, f.stem, '../'*(len(f.relative_to(md).parts)-1), cfg.doc_host+cfg.doc_baseurl))
    shutil.copytree(root/'tools/site', md, dirs_exist_ok=True)
    repo_files(md, root, ['CONTRIBUTING.md', 'CHANGELOG.md', 'bench/RESULTS.md', 'bench/quality.png', 'bench/LOG.md'])
    mkdocs = Path(sys.executable).with_name('mkdocs')
    subprocess.run([str(mkdocs), 'build', '-q', '--strict'], check=True, cwd=root, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
