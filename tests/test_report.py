"What a page says of a bad student: made from real models, opened in a browser, on a phone and in the dark"
import base64, re

import pytest, torch
from test_docs import LOOK, browser, complaints # chkstyle: ignore

from distill_nb.benchmarks import run_benchmarks
from distill_nb.cache import build_cache
from distill_nb.eval import Report, contamination, evaluate, on_policy_kl
from distill_nb.student import drop_layers
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, load_prompts
from distill_nb.winrate import win_rate

SAID = {'Held out: THE STUDENT IS WORSE than': 'bad', 'Out of distribution: THE STUDENT IS WORSE than': 'bad', 'Held out: THE STUDENT IS FAR FROM THE TEACHER': 'bad',
    'Held out: THE STUDENT IS OVERCONFIDENT by': 'bad', 'Out of distribution: THE SET IS CONTAMINATED: 2 of 9': 'bad', 'Held out: no equal-token control': 'warning',
    'best of 9 evaluations on these same prompts': 'warning', 'has fewer than four families (3)': 'warning', 'has only 9 prompts': 'warning', 'the judge kept only 0% (student)': 'warning'}

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The report of a student without ten of thirty blocks, not trained, its logits doubled, on a set of which two prompts were trained on"
    d,long = tmp_path_factory.mktemp('bad'),'a-folder-with-a-long-name/'*9
    teacher,rows = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=torch.float32),list(load_prompts('ood'))
    families = list(dict.fromkeys(r['family'] for r in rows))[:3]
    ood = [r for f in families for r in [o for o in rows if o['family']==f][:3]]
    cache = build_cache(teacher, [*load_prompts('heldout', 20), *ood], d/'cache', max_new_tokens=8, progress=False)
    cut = lambda: drop_layers(teacher.model, [*range(10), *range(20, 30)])
    models = dict(teacher=teacher.model, pruned=cut(), student=cut())
    with torch.no_grad(): models['student'].model.norm.weight.mul_(2)
    scores = {n: {s: evaluate(m, cache, cache.select(split=s)) for s in ('heldout', 'ood')} for n,m in models.items()}
    asked = {n: run_benchmarks(m, cache.tokenizer, ['arithmetic'], 4) for n,m in models.items()}
    asked['student']['alpaca_eval'] = win_rate([.5]*4, ['Yes.']*4, ['No.']*4, n_boot=50) | dict(consistent=0.)
    own = {n: on_policy_kl(models[n], teacher, load_prompts('heldout', 4)['prompt'], 12) for n in ('student', 'teacher')}
    leaks = dict(ood=contamination([*load_prompts('train', 50)['prompt'], *[o['prompt'] for o in ood[:2]]], [o['prompt'] for o in ood]))
    Report(f'A bad student, {long}', scores, 'student', 'pruned', picked=dict(heldout=9), contamination=leaks, own=own, benchmarks=asked,
        history=[3., 4., 5.], samples=[dict(prompt=long, answers=dict(student=long))], settings=dict(folder=long)).save(d/'report')
    return d/'report/report.html'

LINES = """[...document.querySelectorAll('.said li')].map(o => { const c = getComputedStyle(o), r = o.getBoundingClientRect();
  return [o.textContent, o.className, o.checkVisibility() && r.width > 100 && r.height > 10, c.color, c.backgroundColor, c.borderLeftColor, parseFloat(c.borderLeftWidth)] })"""

def contrast(a, b):
    "Of two CSS colours, as WCAG has it"
    def _light(c):
        rgb = [int(o)/255 for o in re.findall(r'\d+', c)[:3]]
        return sum(k*(o/12.92 if o<=.04045 else ((o+.055)/1.055)**2.4) for k,o in zip((.2126, .7152, .0722), rgb))
    x,y = sorted(map(_light, (a, b)))
    return (y+.05)/(x+.05)

def look(browser, page, scheme, width):
    "Open the page in a scheme of colours; what it complains of, the sentences, and the colours of page and text"
    browser.size(width, 844)
    browser('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
    events = browser.open(page.as_uri())
    return [*browser.js(LOOK), *complaints(events, page.as_uri())],browser.js(LINES),[browser.js(f'getComputedStyle(document.body).{k}') for k in ('backgroundColor', 'color')]

@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_a_bad_student_is_called_bad_in_words_and_colours(browser, page, scheme, width):
    bad,lines,(back,ink) = look(browser, page, scheme, width)
    assert not bad and contrast(back, ink)>7 and (contrast(back, 'rgb(0, 0, 0)')>10)==(scheme=='light')
    for want,kind in SAID.items():
        found = [o for o in lines if want in o[0]]
        assert found, want
        for text,cls,seen,color,ground,border,wide in found:
            assert cls==kind and text.startswith(f'{kind}: ') and seen and wide>=4, text
            assert ground!=back and contrast(ground, color)>4.5 and contrast(border, back)>2, (text, color, ground, border)
    assert len({(o[4], o[5]) for o in lines})==len({o[1] for o in lines})>=2
    shot = base64.b64decode(browser('Page.captureScreenshot', captureBeyondViewport=True)['data'])
    (page.parent/f'{scheme}-{width}.png').write_bytes(shot)
    assert len(shot)>20000
