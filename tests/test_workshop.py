"The workshop, done by a participant: each check refuses the open exercise and the usual mistakes, says why, and accepts the solution"
import ast, contextlib, io, json, os, re, subprocess, sys, tomllib
from pathlib import Path

import matplotlib, pytest, torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from distill_nb.eval import Report
from distill_nb.practice import practice_tokenizer
from distill_nb.synthesis import embedded_teacher

matplotlib.use('agg')
ROOT = Path(__file__).parents[1]
SHOP = ROOT/'nbs/workshop'
LESSONS = sorted(SHOP.glob('*.ipynb'))

def cells(p): return [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

def bound(s):
    "The one name that a cell defines at its top level, else None"
    b = ast.parse(s).body
    if len(b)!=1: return None
    if isinstance(b[0], ast.FunctionDef): return b[0].name
    return b[0].targets[0].id if isinstance(b[0], ast.Assign) and isinstance(b[0].targets[0], ast.Name) else None

def is_open(s): return 'verdict(' not in s and any(isinstance(n, ast.Constant) and n.value is ... for n in ast.walk(ast.parse(s)))

def solutions(p):
    "Name to source of each solution of a lesson"
    parts = (SHOP/f'solutions/{p.stem}.py').read_text(encoding='utf-8').split('\n# %% ')[1:]
    return {bound(s): s for s in (o.split('\n', 1)[1] for o in parts)}

def say(src, ns):
    "What a cell prints"
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(compile(src, 'cell', 'exec'), ns)
    return out.getvalue().strip()

MISTAKES = dict(soften=[('return z.softmax(-1)/T', 'before the softmax'), ('return (z*T).softmax(-1)', 'not multiplied'), ('return z.softmax(-1)', 'T is not used'),
    ('return 1/0', 'your code raised ZeroDivisionError')],
    factor=[('return 1.', 'both 1/T'), ('return T', 'one of the two'), ('return T**3', 'one T too many'), ('return 2*T**2', 'at T=1 nothing')],
    kept=[('return (z/T).topk(k, -1).values.softmax(-1).sum(-1)', 'cannot be'), ('return z.softmax(-1).topk(k, -1).values.sum(-1)', 'does not change with T'),
        ('return (z/T).softmax(-1).topk(k, -1).values', 'has shape')],
    tail=[('return logits[:,k:].logsumexp(-1)', 'T is not used'), ('return logits[:,k:].logsumexp(-1)/T', 'before the logsumexp'),
        ('return (logits/T).logsumexp(-1)', 'from the k-th on')],
    labels_of=[('return torch.cat([torch.full_like(ids[:prompt_len], -100), ids[prompt_len:]])', 'has just read'), ('return ids.roll(-1)', 'write prompts'),
        ('return ids[prompt_len:]', 'one for each position'), ('return torch.full_like(ids, -100)', 'asked of nobody')],
    found=[("dict(A='right', B='right', C='right', D='right')", 'read what a position sees'), ("dict(A='unshifted', B='right')", '0 ends'),
        ("dict(A='unshifted', B='endless', C='right')", 'the rest is prompt'), ("dict(A='padding')", 'none of')],
    their_labels=[('return labels', 'shifts them once more'), ('return labels[:,:-1]', 'becomes free'), ('return labels.roll(-1, 1)', 'must move to i+1')],
    attention=[('return (ids!=2).long()', 'not for the id'), ('return torch.ones_like(ids)', 'padding is visible'),
        ('return (torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:,None]).long()', 'upside down')],
    directions=[('return torch.linalg.matrix_rank(h).float()', 'weigh directions'), ('C = h.T@h; return C.trace()**2/(C@C).trace()', 'subtract the mean'),
        ('C = (h-h.mean(0)).T.cov(); return C.trace()/(C@C).trace()**.5', 'an even cloud'), ('return 1.', 'an even cloud')],
    honest=[('return head', 'still train'), ('return ProjectionHead(576, 64).requires_grad_(False)', 'not the one'),
        ('nn.init.zeros_(head.linear.weight); return head.requires_grad_(False)', 'without content')],
    culprit=[("return min((e for r in rows if r['verdict'] for e in r['examples']), key=lambda e: e[1])[0]", 'take the largest mean KL'), ('return -1', 'in no batch'),
        ("return max(rows, key=lambda r: r['kl'])", 'number of one example')],
    per_token=[('return (kl_sum/n).mean()', 'mean of means'), ('return kl_sum.mean()', 'nats per example'), ('return kl_sum/n', 'one number')],
    interval=[('return ((b-a).sum()/n.sum(),)*2', 'of the width'), ('d = (b-a)[draws].sum(1)/n[draws].sum(1); return d.min(),d.max()', 'not the extremes'),
        ('d = (b-a)[draws].sum(1); return d.quantile(.025),d.quantile(.975)', 'divide by the tokens'),
        ('d = (a-b)[draws].sum(1)/n[draws].sum(1); return d.quantile(.025),d.quantile(.975)', 'the sign is turned'),
        ('w = draws.flip(0); d = b[w].sum(1)/n[w].sum(1) - a[draws].sum(1)/n[draws].sum(1); return d.quantile(.025),d.quantile(.975)', 'same examples for both')],
    sentence=[("return 'better' if low+high>0 else 'worse'", 'zero is inside'), ("return 'better' if low>0 else 'worse'", 'harm cannot')])

def mistaken(src, body):
    "The open exercise `src` with its body, or its value, replaced"
    n = ast.parse(src).body[0]
    return src[:src.index('):')+2]+'\n    '+body if isinstance(n, ast.FunctionDef) else f'{n.targets[0].id} = {body}'

def do(p, config=None):
    "A lesson from top to bottom, perhaps with another `config` cell; yields each exercise with what its check said to it open, mistaken and solved"
    ns,sol,todo = {'__name__': '__main__'},solutions(p),None
    for s in cells(p):
        if config and s.startswith('MODEL,DEVICE,DTYPE = '): s = config
        if is_open(s): todo = s
        elif todo and 'verdict(' in s:
            name = bound(todo)
            tries = [todo] + [mistaken(todo, b) for b,_ in MISTAKES[name]] + [sol.pop(name)]
            said = [(say(t, ns), say(s, ns))[1] for t in tries]
            todo = None
            yield name,said
        else: say(s, ns)
    assert not sol and todo is None, f'solutions without an exercise: {list(sol)}, or an exercise without a check'

@pytest.mark.parametrize('p', LESSONS, ids=lambda p: p.stem)
def test_lesson_solved_and_each_check_says_why(p):
    n = 0
    for name,(first,*wrong,last) in do(p):
        assert first.startswith('Not yet: ') and 'replace' in first, (name, first)
        assert len(wrong)>=2
        for (body,why),got in zip(MISTAKES[name], wrong): assert got.startswith('Not yet: ') and why in got, (name, body, got)
        assert last=='Right.', (name, last)
        n += 1
    assert n>=3

@pytest.fixture(scope='module', params=['<nothing>', None], ids=['own padding', 'no padding'])
def other(request, tmp_path_factory):
    "A random teacher of another family, width and vocabulary, whose padding is not its end, as in Qwen, or missing, as in Llama"
    torch.manual_seed(0)
    tok,d = AutoTokenizer.from_pretrained(embedded_teacher()),tmp_path_factory.mktemp('other')
    if request.param: tok.add_special_tokens(dict(pad_token=request.param))
    else: tok.pad_token = None
    c = Qwen2Config(vocab_size=len(tok)+7, hidden_size=48, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=.4, tie_word_embeddings=True, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    for o in (Qwen2ForCausalLM(c), tok): o.save_pretrained(d)
    return d

@pytest.mark.parametrize('p', LESSONS, ids=lambda p: p.stem)
def test_lesson_with_another_teacher_changes_one_cell(p, other):
    assert sum(s.startswith('MODEL,DEVICE,DTYPE = ') for s in cells(p))==1
    for name,said in do(p, f"MODEL,DEVICE,DTYPE = {str(other)!r}, 'cpu', torch.float32"):
        assert said[0].startswith('Not yet: ') and said[-1]=='Right.', (name, said)

@pytest.mark.parametrize('p', LESSONS, ids=lambda p: p.stem)
def test_lesson_can_be_given_anywhere(p):
    nb,src = json.loads(p.read_text(encoding='utf-8')),cells(p)
    repo = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['urls']['Repository']
    text = '\n'.join(''.join(c['source']) for c in nb['cells'])
    assert f'colab.research.google.com/github/{"/".join(repo.split("/")[-2:])}/blob/main/nbs/workshop/{p.name}' in text
    assert "'google.colab' in sys.modules" in src[0] and f'git+{repo}' in src[0] and say(src[0], {})==''
    assert 'default_exp' not in text and text.count('**Predict.**')>=3 and ' minutes' in text
    assert not any(c.get('outputs') for c in nb['cells']), 'outputs would give the predictions away'

HOWTO = sorted((ROOT/'nbs/howto').glob('*.md'))

def blocks(p, lang):
    "Fenced blocks of a page in one language"
    return re.findall(rf'^```{lang}\n(.*?)^```', p.read_text(encoding='utf-8'), flags=re.M|re.S)

@pytest.mark.parametrize('p', [p for p in HOWTO if p.stem!='two_gpus'], ids=lambda p: p.stem)
def test_howto_runs_as_printed(p, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for s in blocks(p, 'yaml'): (tmp_path/f'{p.stem}.yaml').write_text(s)
    assert (found := blocks(p, 'python'))
    for s in found: say(s, {'__name__': '__main__'})

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "The scripts of the page about two GPUs, by one process and by two: what they printed, and where they ran"
    (cache,train,tensor),d,said = blocks(ROOT/'nbs/howto/two_gpus.md', 'python'),tmp_path_factory.mktemp('two'),{}
    lines = [l.split('#')[0].strip() for b in blocks(ROOT/'nbs/howto/two_gpus.md', 'sh') for l in b.splitlines() if l.startswith('torchrun')]
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')
    for n,s in dict(cache=cache, train=train, tensor=tensor).items(): (d/f'{n}.py').write_text(s)
    for l in ('python cache.py', 'python train.py', *lines, 'python tensor.py'):
        out = subprocess.run(l, shell=True, cwd=d, capture_output=True, text=True, env=env)
        assert out.returncode==0, out.stderr[-3000:]
        said[l] = out.stdout
        if 'train' in l: (d/'two/run').rename(d/l)
    return said,d

@pytest.mark.parametrize('how', ('', ' shares'))
def test_two_processes_take_the_steps_of_one(two, how):
    line = f'torchrun --nproc_per_node 2 train.py{how}'
    one,both = ([json.loads(o) for o in (two[1]/l/'history.jsonl').read_text().splitlines()] for l in ('python train.py', line))
    assert len(one)==len(both)==4 and '2 processes' in two[0][line]
    for a,b in zip(one, both):
        assert a['n_tokens']==b['n_tokens'] and abs(a['kl']-b['kl'])<1e-4*a['kl'] and abs(a['grad_norm']-b['grad_norm'])<1e-3*a['grad_norm']

def test_matrices_in_two_parts_give_the_loss_of_whole_ones(two):
    one,both = ([float(o) for o in two[0][l].split()] for l in ('python tensor.py', 'torchrun --nproc_per_node 2 tensor.py'))
    assert len(one)==4 and one[-1]<one[0] and one==pytest.approx(both, rel=1e-4)

def test_two_models_of_ones_own_go_through_their_page(tmp_path, monkeypatch):
    "Its prompts, YAML and commands as printed, in an empty folder and with a pair that is not the demo's: another family, a tokenizer of its own, fewer words and steps"
    monkeypatch.chdir(tmp_path)
    page,names = ROOT/'nbs/howto/two_models.md',{'Qwen/Qwen2.5-7B-Instruct': 'teacher', 'Qwen/Qwen2.5-0.5B-Instruct': 'student', 'my-student': 'qwen/model'}
    mine = lambda s: re.sub('|'.join(names), lambda m: names[m[0]], s)
    for name,width,layers in (('teacher', 48, 3), ('student', 32, 2)):
        torch.manual_seed(width)
        c = Qwen2Config(vocab_size=600, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=.3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
        for o in (Qwen2ForCausalLM(c), practice_tokenizer(600)): o.save_pretrained(name)
    Path('my.jsonl').write_text(blocks(page, 'json')[0])
    few = dict(max_new_tokens=4, warmup_steps=1, max_steps=4, control_steps=2)
    Path('qwen.yaml').write_text(re.sub(rf"({'|'.join(few)}): \d+", lambda m: f'{m[1]}: {few[m[1]]}', mine(blocks(page, 'yaml')[0])))
    lines = mine('\n'.join(blocks(page, 'sh')).replace('\\\n', ' '))
    said = {l: say(f'import shlex; from distill_nb.plan import main; assert main(shlex.split({l!r}, comments=True)[1:])==0', {}) for l in lines.splitlines() if l.startswith('distill ')}
    assert [l.split()[1] for l in said]==['plan', 'run', 'run', 'eval'] and all(s in ' '.join(said.values()) for s in ('While the student trains', 'Everything is in qwen', 'Everything is in judged'))
    assert say(re.search(r'python -c "\n(.*?)"', lines, re.S)[1], {}).startswith(tuple(f"[{{'generated_text': {q}Name a fruit." for q in '\'"'))
    for out,models in (('qwen', {'teacher', 'start', 'student', 'student @ 2 steps', 'control'}), ('judged', {'teacher', 'before', 'student'})): assert set(Report.load(f'{out}/report').models)==models
    assert Qwen2ForCausalLM.from_pretrained('qwen/model').config.hidden_size==32
