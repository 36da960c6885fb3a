"Files of users: each preset and the template run on tiny models, and broken files stop before anything runs"
import contextlib, io, json, subprocess, sys, textwrap, time
from importlib.resources import files
from pathlib import Path

import pytest, torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from distill_nb.cache import load_json
from distill_nb.eval import Report
from distill_nb.plan import main, make_plan, projection_cost
from distill_nb.recipes import Config, Run, preset, read_yaml, run
from distill_nb.synthesis import embedded_teacher

TEMPLATE = textwrap.dedent('''\
    # Keys that a user's file has. All of it must load, as it stands, and mean what it says.
    distillation:
      teacher:
        model_id: "meta-llama/Meta-Llama-3.1-70B-Instruct"
        cache_dir: "/data/teacher_cache"
        synthesis:
          max_new_tokens: 512
          temperature: 0.8
          batch_size: 16
      student:
        model_id: "meta-llama/Llama-3.2-3B-Instruct"
        projection:
          teacher_dim: 8192
          student_dim: 3072
          use_layernorm: true
      training:
        loss:
          type: "hybrid"
          temperature: 2.5
          alpha: 0.75
        optimizer:
          type: "adamw"
          lr: 2e-5
          weight_decay: 0.01
        schedule:
          warmup_steps: 500
          max_steps: 8000
        memory:
          gradient_accumulation: 4
          mixed_precision: "fp16"
          activation_checkpointing: true
      validation:
        benchmarks: ["mmlu", "gsm8k", "alpaca_eval"]
        eval_frequency: 1000
        early_stopping:
          patience: 3
          metric: "loss"
    ''')

def save_tiny(path, width, layers, seed):
    "A random Llama with the embedded teacher's tokenizer, on disk"
    torch.manual_seed(seed)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=width, intermediate_size=2*width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=.15, tie_word_embeddings=True, pad_token_id=2, eos_token_id=2, bos_token_id=1))
    for o in (m, AutoTokenizer.from_pretrained(embedded_teacher())): o.save_pretrained(path)
    return str(path)

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Folders of a teacher and of a student, 48 and 32 wide"
    logging.disable_progress_bar()
    d = tmp_path_factory.mktemp('models')
    return save_tiny(d/'teacher', 48, 3, 0), save_tiny(d/'student', 32, 2, 1)

def small(o, pair, out):
    "The content of a file with model ids, sizes, steps, folders and precision changed"
    c = o['distillation']
    c['teacher'].update(model_id=pair[0], cache_dir=str(out/'cache'))
    c['teacher']['synthesis'].update(max_new_tokens=4, batch_size=64)
    c['student']['model_id'],c['out'] = pair[1],str(out/'run')
    if 'projection' in c['student']: c['student']['projection'].update(teacher_dim=48, student_dim=32)
    c['training']['schedule'].update(warmup_steps=1, max_steps=4)
    c['training']['memory']['mixed_precision'] = 'no'
    c['validation']['eval_frequency'] = 2
    if 'control_steps' in c['training']: c['training']['control_steps'] = 2
    return o

def quiet(f, *args):
    "Call without what it prints"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): return f(*args)

@pytest.mark.parametrize('name', ['edge', 'low_latency', 'budget'])
def test_preset_runs_end_to_end(name, pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/f'data/{name}.yaml')[0], pair, tmp_path)
    c = o['distillation']
    c['prompts'],c['validation']['answers'] = dict(train=24, heldout=8, ood=8),0
    if 'unfreeze' in c['student']: c['student']['unfreeze'] = [[0., 1], [.5, 'all']]
    config = Config.from_dict(o)
    rep = quiet(run, config, False)
    rows = load_json(tmp_path/'run/history-student.json')['rows']
    assert set(rep.models)=={'start', 'student', 'control', 'student @ 2 steps'} and len(rows)==4
    assert rep.models['student']['heldout'].kl!=rep.models['start']['heldout'].kl
    assert [i for i,r in enumerate(rows) if 'heldout_kl' in r]==[1, 3]
    assert all(('feature' in r)==(name=='low_latency') for r in rows)
    assert (rows[0]['trains']<rows[-1]['trains'])==(name=='budget')
    m = LlamaForCausalLM.from_pretrained(tmp_path/'run/model')
    assert (m.config.hidden_size, m.config.num_hidden_layers)==(32, 2) and Report.load(tmp_path/'run/report').at==rep.at
    manifest = load_json(tmp_path/'cache/manifest.json')
    want = dict(edge=('transform', []), low_latency=('hidden', [2]), budget=('hidden', []))[name]
    assert (manifest['codec'], manifest['layers'])==want, manifest

def test_projection_of_low_latency_costs_less_than_two_percent():
    c = preset('low_latency')
    assert 0<projection_cost(c)<.02
    print(f'projection: {projection_cost(c):.2%} of the operations of training')

def test_template_means_what_it_says(tmp_path):
    (tmp_path/'t.yaml').write_text(TEMPLATE)
    c = Config.from_yaml(tmp_path/'t.yaml')
    got = c.model_dump(exclude_unset=True)
    want = read_yaml(tmp_path/'t.yaml')[0]['distillation']
    assert got==want and got['training']['optimizer']['lr']==2e-5
    with pytest.raises(ValueError, match='fp16.*needs a GPU'): Run(c)
    assert not Path(c.out).exists()
    p = make_plan(c)
    assert 140e9<sum(p.teacher.values())<160e9 and 40e9<sum(p.student.values())<80e9

def test_template_runs_to_a_report(pair, tmp_path):
    (tmp_path/'t.yaml').write_text(TEMPLATE)
    o = small(read_yaml(tmp_path/'t.yaml')[0], pair, tmp_path)
    o['distillation']['validation'].update(benchmarks=['arithmetic', 'bbh', 'alpaca_eval'], limit=2) # what needs no download
    config = Config.from_dict(o)
    rep = quiet(run, config, False)
    assert set(rep.models)=={'start', 'student'} and len(rep.models['student']['heldout'].n)==132 and len(rep.samples)==5
    assert all(set(o)=={'arithmetic', 'bbh', 'alpaca_eval'} and o['arithmetic']['n']==2 for o in rep.benchmarks.values())
    assert all(rep.benchmarks['student'][k]['not_run'].startswith('not run') for k in ('bbh', 'alpaca_eval'))
    rows = load_json(tmp_path/'run/history-student.json')['rows']
    assert len(rows)==4 and all(len(r['examples'])==16 and r['feature']>0 for r in rows)

BROKEN = {'unknown key': ('lr: 2e-5', 'Ir: 2e-5', 'line 23', "did you mean 'lr'?"), 'type': ('lr: 2e-5', 'lr: "2e-5"', 'line 23', 'should be a valid number'),
    'boolean': ('max_steps: 8000', 'max_steps: true', 'line 27', 'should be a valid integer'), 'infinite': ('lr: 2e-5', 'lr: .inf', 'line 23', 'finite'),
    'duplicate': ('patience: 3', 'patience: 3\n      patience: 4', 'line 37', 'second time, first in line 36'),
    'python tag': ('max_new_tokens: 512', 'max_new_tokens: !!python/object/apply:os.mkdir [TOUCHED]', 'line 7', 'could not determine a constructor'),
    'indentation': ('  student:', ' student:', 'line 10', ''), 'empty': (TEMPLATE, '', '', 'the file is empty'), 'one comment': (TEMPLATE, '# nothing', '', 'the file is empty'),
    'elsewhere': ('type: "adamw"', 'batch_size: 4', 'line 22', "did you mean 'training.memory.batch_size'?")}

@pytest.mark.parametrize('kind', BROKEN)
def test_broken_file_is_one_message_with_its_line_and_nothing_runs(kind, tmp_path, monkeypatch, capsys):
    old,new,*want = BROKEN[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path/'t.yaml').write_text(TEMPLATE.replace(old, new.replace('TOUCHED', str(tmp_path/'touched'))))
    assert main(['run', 't.yaml'])==1
    said = capsys.readouterr().err
    assert said.startswith('distill: t.yaml') and all(w in said for w in want) and said.count('\n')==1, said
    assert [p.name for p in tmp_path.iterdir()]==['t.yaml']

@pytest.mark.parametrize('value,want', [('2e-5', 2e-5), ('2E-5', 2e-5), ('+1.5e3', 1500.), ('1e-05', 1e-5), ('.5e-1', .05), ('0.1', .1)])
def test_numbers_are_floats(value, want, tmp_path):
    (tmp_path/'t.yaml').write_text(f'x: {value}')
    o,lines = read_yaml(tmp_path/'t.yaml')
    assert o=={'x': want} and type(o['x']) is float and lines=={('x',): 1}

def test_other_tokenizer_is_refused_before_anything_runs(pair, tmp_path):
    tok = AutoTokenizer.from_pretrained(pair[1])
    tok.add_tokens(['<new>'])
    LlamaForCausalLM.from_pretrained(pair[1]).save_pretrained(tmp_path/'student')
    tok.save_pretrained(tmp_path/'student')
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], (pair[0], str(tmp_path/'student')), tmp_path)
    with pytest.raises(ValueError, match='tokenizers differ'): Run(Config.from_dict(o))
    assert not (tmp_path/'run').exists()

def test_seconds_of_a_killed_part_are_on_the_bill(pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    (tmp_path/'o.json').write_text(json.dumps(o))
    code = f'''
import json, time
from distill_nb.recipes import Config, Run
r = Run(Config.from_dict(json.load(open({str(tmp_path/'o.json')!r}))), False)
with r.timed('long', every=.1):
    print('started', flush=True)
    time.sleep(60)
'''
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline()=='started\n'
        time.sleep(1)
        p.kill()
    assert .5<load_json(tmp_path/'run/cost.json')['long']<30
