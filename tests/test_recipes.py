"Files of users: each preset and the template run on tiny models, and broken files stop before anything runs"
import contextlib, io, json, math, re, shutil, subprocess, sys, textwrap, time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest, torch, yaml
from peft import PeftModel
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging

from distill_nb import pipeline, practice, recipes, winrate
from distill_nb.cache import TeacherCache
from distill_nb.files import CacheError, claim, load_json
from distill_nb.config import Config, Loader, preset, read_yaml, tables
from distill_nb.eval import Report, level
from distill_nb.monitor import KLMonitor
from distill_nb.plan import main, make_plan, projection_cost, verify
from distill_nb.pipeline import Run, prompt_rows
from distill_nb.recipes import judge_model, run
from distill_nb.synthesis import embedded_teacher, weights_sha256

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

def save_tiny(path, width, layers, seed, vocab=49152):
    "A random Llama with the embedded teacher's tokenizer, on disk"
    return str(practice.save_tiny(path, layers, .15, seed, vocab_size=vocab, hidden_size=width, intermediate_size=2*width))

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Folders of a teacher and of a student, 48 and 32 wide"
    logging.disable_progress_bar()
    d = tmp_path_factory.mktemp('models')
    return save_tiny(d/'teacher', 48, 3, 0), save_tiny(d/'student', 32, 2, 1)

def save_seeing(path, width, layers, seed):
    "A random LLaVA with an eye of one layer and the embedded teacher's tokenizer, on disk"
    torch.manual_seed(seed)
    tok = AutoTokenizer.from_pretrained(embedded_teacher())
    tok.add_tokens(['<image>'], special_tokens=True)
    chat = "{% for m in messages %}{% for c in m['content'] %}{{ '<image>' if c['type']=='image' else c['text'] }}{% endfor %}\n{% endfor %}"
    side = dict(height=16, width=16)
    eye = CLIPImageProcessor(size=side, crop_size=side)
    proc = LlavaProcessor(eye, tok, patch_size=4, vision_feature_select_strategy='default', num_additional_image_tokens=1, chat_template=chat)
    text = LlamaConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=2*width, num_hidden_layers=layers, num_attention_heads=2,
        initializer_range=.15, tie_word_embeddings=True, pad_token_id=2, eos_token_id=2, bos_token_id=1)
    eye = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    m = LlavaForConditionalGeneration(LlavaConfig(vision_config=eye, text_config=text, image_token_index=len(tok)-1, vision_feature_layer=-1))
    m.generation_config.suppress_tokens = [len(tok)-1]
    for o in (m, proc): o.save_pretrained(path)
    return str(path)

@pytest.fixture(scope='module')
def seeing(tmp_path_factory):
    "Folders of a teacher and a student that see, and a file of prompts about drawn pictures"
    d = tmp_path_factory.mktemp('seeing')
    rows = []
    for i,(c,s) in enumerate((c, s) for c in ('red', 'green', 'blue') for s in ('ellipse', 'rectangle')):
        im = Image.new('RGB', (32, 32), 'white')
        getattr(ImageDraw.Draw(im), s)((6, 6, 26, 26), fill=c)
        im.save(d/f'{i}.png')
        asks = dict(caption='Say what you see.', question='Which colour is it?')
        rows += [dict(prompt=q, image=str(d/f'{i}.png'), family=k, split='train' if i<4 else 'heldout') for k,q in asks.items()]
    (d/'images.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    return save_seeing(d/'teacher', 48, 3, 0), save_seeing(d/'student', 32, 2, 1), d/'images.jsonl'

def small(o, pair, out):
    "The content of a file with model ids, sizes, steps, folders and precision changed"
    c = o['distillation']
    c['teacher'].update(model_id=pair[0], cache_dir=str(out/'cache'))
    c['teacher']['synthesis'].update(max_new_tokens=4, batch_size=64)
    c['student']['model_id'],c['out'] = pair[1],str(out/'run')
    if 'projection' in c['student']: c['student']['projection'].update(teacher_dim=48, student_dim=32)
    c['training']['schedule']['warmup_steps'] = 1
    if 'stages' not in c['training']: c['training']['schedule']['max_steps'] = 4
    for s in c['training'].get('stages', []): s['steps'] = 2
    if 'unfreeze' in c['training'].get('stages', [{}])[0]: c['training']['stages'][0]['unfreeze'] = [[0., 1], [.5, 'all']]
    c['training']['memory']['mixed_precision'] = 'no'
    c['validation']['eval_frequency'] = 2
    if 'limit' in c['validation']: c['validation']['limit'] = 2
    if 'control_steps' in c['training']: c['training']['control_steps'] = 2
    return o

def use_card(folder):
    "Run what a model card says on how to use it; the card"
    card = (folder/'README.md').read_text()
    with contextlib.chdir(folder): quiet(exec, card.split('```python\n')[1].split('```')[0], {})
    return card

def quiet(f, *args):
    "Call without what it prints"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): return f(*args)

@pytest.mark.parametrize('name', ['edge', 'low_latency', 'budget'])
def test_preset_runs_end_to_end(name, pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/f'data/{name}.yaml')[0], pair, tmp_path)
    c = o['distillation']
    c['prompts'],c['validation']['answers'] = dict(train=24, heldout=8, ood=8),0
    config = Config.from_dict(o)
    rep = quiet(run, config, False)
    rows = load_json(tmp_path/'run/history-student.json')['rows']
    n = 6 if name=='budget' else 4
    assert set(rep.models)=={'teacher', 'start', 'student', 'control', 'student @ 2 steps'} and len(rows)==n and (tmp_path/'run/report/kl.png').exists()
    assert rep.models['student']['heldout'].kl!=rep.models['start']['heldout'].kl
    assert [i for i,r in enumerate(rows) if 'heldout_kl' in r]==list(range(1, n, 2))
    assert all(('feature' in r)==(name=='low_latency') for r in rows)
    assert set(rep.benchmarks)=={'teacher', 'before', 'student', 'control'} and all(o['reasoning']['n']==2 and 'verifier' in o['reasoning']['how'] for o in rep.benchmarks.values())
    assert (rows[0]['trains']<rows[-1]['trains'])==(name=='budget')
    m = LlamaForCausalLM.from_pretrained(tmp_path/'run/model')
    assert (m.config.hidden_size, m.config.num_hidden_layers)==(32, 2) and Report.load(tmp_path/'run/report').at==rep.at
    manifest = load_json(tmp_path/'cache/manifest.json')
    want = dict(edge=('transform', []), low_latency=('transform', [2]), budget=('topk', []))[name]
    assert (manifest['codec'], manifest['layers'])==want, manifest

def seeing_config(seeing, tmp_path):
    "The preset `multimodal` on tiny models"
    *pair,file = seeing
    o = small(read_yaml(files('distill_nb')/'data/multimodal.yaml')[0], pair, tmp_path)
    c = o['distillation']
    c['prompts']['file'],c['training']['control_steps'],c['validation']['answers'] = str(file),8,2
    c['training']['stages'][0].update(steps=4, lr=2e-2)
    c['training']['memory'].update(gradient_accumulation=1)
    return o

def test_multimodal_runs_end_to_end(seeing, tmp_path):
    config = Config.from_dict(seeing_config(seeing, tmp_path))
    rep = quiet(run, config, False)
    assert set(rep.models)=={'teacher', 'start', 'student', 'control', 'adapter caption', 'adapter question'}
    kls = {n: v['heldout'].kl for n,v in rep.models.items()}
    assert kls['teacher']<.01 and len(set(kls.values()))==6 and kls['student']<kls['start']
    rows = load_json(tmp_path/'run/history-student.json')['rows']
    assert [r['stage'] for r in rows]==['student-caption']*4+['student-question']*4 and all(r['feature']>0 for r in rows)
    assert rep.at['adapter caption']+rep.at['adapter question']==rep.at['student'] and rep.at['student']==rep.at['control']
    pixels = 3*16*16*4
    assert sum(p.stat().st_size for p in (tmp_path/'cache').glob('shard-*'))<12*pixels and 'sha256' in (tmp_path/'cache/shard-00000.json').read_text()
    assert rep.samples[0]['prompt'].startswith('[') and set(rep.samples[0]['answers'])=={'teacher', 'before', 'after'}
    m = AutoModelForImageTextToText.from_pretrained(tmp_path/'run/model')
    assert m.config.text_config.hidden_size==32 and not [k for k,_ in m.named_parameters() if 'lora' in k]
    assert (tmp_path/'run/model/processor_config.json').exists()
    shutil.copytree(tmp_path/'run/model', tmp_path/'used')
    shutil.copy(seeing[2].parent/'0.png', tmp_path/'used/picture.png')
    assert 'pipeline_tag: image-text-to-text' in use_card(tmp_path/'used')
    with mock.patch.object(pipeline, 'evaluate', side_effect=AssertionError('judged twice')): again = quiet(run, config, False)
    assert {n: v['heldout'].kl for n,v in again.models.items()}==kls
    make_plan(config)

def test_what_images_cannot_do_is_refused_before_anything_runs(seeing, pair, tmp_path):
    for key,value,want in (('validation.benchmarks', ['arithmetic'], 'validation.benchmarks: is for prompts of text'), ('student.model_id', pair[1], 'does not see'),
        ('student.lora.tasks', dict(caption=1., other=1.), "no prompt for training is of family 'other'"), ('training.control_steps', 3, 'as many steps as the student: 8, or 0'),
        ('student.relations.n_heads', 5, '5 does not divide the width of the teacher, 48'), ('prompts.file', 'none.jsonl', 'none.jsonl: no such file')):
        o = seeing_config(seeing, tmp_path)
        put(o['distillation'], key, value)
        with pytest.raises(ValueError, match=want): quiet(lambda: Run(Config.from_dict(o), False).synth())
    assert not (tmp_path/'cache').exists()

def test_student_that_sees_is_judged_against_any_teacher(seeing, pair, tmp_path):
    teacher,student,file = seeing
    kw = dict(prompts=str(file), tokens=4, out=str(tmp_path/'judged'), progress=False)
    rep = quiet(lambda: judge_model(student, teacher, **kw))
    assert set(rep.models)=={'teacher', 'student'} and len(rep.models['student']['heldout'].n)==4
    assert rep.models['teacher']['heldout'].kl<.01<rep.models['student']['heldout'].kl
    with pytest.raises(ValueError, match='does not see'): judge_model(pair[1], teacher, **kw | dict(out=str(tmp_path/'none')))
    assert not (tmp_path/'none').exists()

def test_projection_of_low_latency_costs_less_than_two_percent():
    c = preset('low_latency')
    assert 0<projection_cost(c)<.02
    assert f'adds {projection_cost(c):.2%} to the operations of training' in str(make_plan(c))

def test_plan_of_low_latency_says_that_a_token_takes_less_than_20_ms(tmp_path, capsys):
    (tmp_path/'t.yaml').write_text((files('distill_nb')/'data/low_latency.yaml').read_text())
    for gbps,least,most in ((400, 15, 20), (200, 30, 40)):
        main(['plan', str(tmp_path/'t.yaml'), '--gbps', str(gbps)])
        ms, = re.findall(rf'at least ([\d.]+) ms a token at {gbps} GB/s', capsys.readouterr().out)
        assert least<float(ms)<most

def test_template_means_what_it_says(tmp_path):
    (tmp_path/'t.yaml').write_text(TEMPLATE)
    c = Config.from_yaml(tmp_path/'t.yaml')
    got = c.model_dump(exclude_unset=True)
    want = read_yaml(tmp_path/'t.yaml')[0]['distillation']
    assert yaml.load(practice.TEMPLATE, Loader)==dict(distillation=want) # the same file, in fewer lines
    assert got==want and got['training']['optimizer']['lr']==2e-5
    with pytest.raises(ValueError, match='fp16.*needs a GPU'): Run(c)
    assert not Path(c.out).exists()
    p = make_plan(c)
    assert 140e9<sum(p.teacher.values())<160e9 and 40e9<sum(p.student.values())<80e9

def test_template_runs_to_a_report(pair, tmp_path):
    (tmp_path/'t.yaml').write_text(TEMPLATE)
    o = small(read_yaml(tmp_path/'t.yaml')[0], pair, tmp_path)
    o['distillation']['validation'].update(benchmarks=['arithmetic', 'bbh', 'alpaca_eval'], limit=2, speed=1) # what needs no download
    config = Config.from_dict(o)
    rep = quiet(run, config, False)
    assert set(rep.models)=={'teacher', 'start', 'student'} and len(rep.models['student']['heldout'].n)==132 and len(rep.samples)==5
    assert all(set(o)=={'arithmetic', 'bbh', 'alpaca_eval'} and o['arithmetic']['n']==2 for o in rep.benchmarks.values())
    assert set(rep.speed)=={'teacher', 'student'} and all(o['engine'].startswith('transformers, float32') for o in rep.speed.values())
    assert all(o['tokens_per_s']>0 and o['first_token_s']>0 for o in rep.speed.values()) and 'peak memory, MB' in str(rep)
    assert all(rep.benchmarks['student'][k]['not_run'].startswith('not run') for k in ('bbh', 'alpaca_eval'))
    rows = load_json(tmp_path/'run/history-student.json')['rows']
    assert len(rows)==4 and all(len(r['examples'])==16 and r['feature']>0 for r in rows)

def test_attention_is_learned_from_a_file(pair, tmp_path):
    "Extras in the cache, eager models, and a loss that falls; what does not fit is refused before the teacher is asked"
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    c = o['distillation']
    c['prompts'],c['validation'],c['student'] = dict(train=8, heldout=3, ood=2),dict(answers=0),dict(model_id=pair[1], attention=dict(n_heads=8, block=1, maps=1))
    c['training'] = dict(stages=[dict(kind='attention', steps=12, lr=5e-3, loss=dict(alpha=.5))], schedule=dict(warmup_steps=1), memory=dict(mixed_precision='no', batch_size=4))
    for key,value,want in (('n_heads', 5, 'n_heads: 5 does not divide the widths of queries and keys of the teacher, 48 and 48'), ('block', 3, 'block: the teacher has 3 blocks'),
        ('maps', 3, 'maps: the student has 2 blocks')):
        wrong = json.loads(json.dumps(o))
        wrong['distillation']['student']['attention'][key] = value
        with pytest.raises(ValueError, match=want): Run(Config.from_dict(wrong), False)
    rep = quiet(run, Config.from_dict(o), False)
    m,rows = load_json(tmp_path/'cache/manifest.json'),load_json(tmp_path/'run/history-student.json')['rows']
    assert (m['attention'], m['relations'], m['teacher']['attention'])==([2], 1, 'eager')
    per = [r['feature']/r['n_tokens'] for r in rows]
    assert len(rows)==12 and sum(per[-3:])<.9*sum(per[:3]) and rep.models['student']['heldout'].kl!=rep.models['start']['heldout'].kl
    make_plan(Config.from_dict(o))
    (tmp_path/'o.yaml').write_text(yaml.safe_dump(o))
    (tmp_path/'cache/shard-00000.json').unlink()
    assert quiet(verify, str(tmp_path/'cache'), str(tmp_path/'o.yaml'))==0==quiet(verify, str(tmp_path/'cache'))
    for change,want in ((dict(n_heads=0), 'student.attention: matches nothing'), (dict(n_heads=0, maps=1, block=1), 'student.attention.block: is for relations')):
        with pytest.raises(ValueError, match=want): Config.from_dict(dict(distillation=c | dict(student=dict(model_id=pair[1], attention=change))))
    with pytest.raises(ValueError, match="has no effect without a stage of kind 'attention'"): Config.from_dict(dict(distillation=c | dict(training=dict(schedule=dict(max_steps=4)))))
    with pytest.raises(ValueError, match='give `student.attention`'): Config.from_dict(dict(distillation=c | dict(student=dict(model_id=pair[1]))))

BROKEN = {'unknown key': ('lr: 2e-5', 'Ir: 2e-5', 'line 23', "did you mean 'lr'?"), 'type': ('lr: 2e-5', 'lr: "2e-5"', 'line 23', 'should be a valid number'),
    'boolean': ('max_steps: 8000', 'max_steps: true', 'line 27', 'should be a valid integer'), 'infinite': ('lr: 2e-5', 'lr: .inf', 'line 23', 'finite'),
    'duplicate': ('patience: 3', 'patience: 3\n      patience: 4', 'line 37', 'second time, first in line 36'),
    'python tag': ('max_new_tokens: 512', 'max_new_tokens: !!python/object/apply:os.mkdir [TOUCHED]', 'line 7', 'could not determine a constructor'),
    'indentation': ('  student:', ' student:', 'line 10', ''), 'empty': (TEMPLATE, '', 'line 1', 'the file is empty'), 'one comment': (TEMPLATE, '# nothing', 'line 1', 'the file is empty'),
    'two roots': ('  validation:', 'validation:', 'line 32', 'expected one top-level key'),
    'tracker': ('    optimizer:', '    trackers: [wandb]\n    optimizer:', 'line 21', "training.trackers: unknown key, did you mean 'training.watch.trackers'?"),
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

FITTING = """distillation:
  teacher:
    model_id: TEACHER
    cache_dir: cache
    store: bf16
  student:
    model_id: STUDENT
    freeze_below: 1
  prompts:
    train: 8
  training:
    schedule: {max_steps: 4, warmup_steps: 1}
    memory:
      mixed_precision: auto
  validation: {answers: 0}
"""

@pytest.mark.parametrize('old,new,line,want', [('freeze_below: 1', 'freeze_below: 2', 8, 'student.freeze_below: the student has 2 blocks'),
    ('train: 8', 'train: 99999', 10, 'prompts.train: 99999 are asked for'), ('train: 8', 'file: none.jsonl', 10, 'prompts.file: none.jsonl: no such file'),
    ('freeze_below: 1', 'attention: {maps: 3}', 8, 'student.attention.maps: the student has 2 blocks'), ('auto', 'fp16', 14, "training.memory.mixed_precision: 'fp16' needs a GPU"),
    ('    memory', '    watch: {trackers: [aim]}\n    memory', 13, 'training.watch.trackers: ')])
def test_what_does_not_fit_the_models_is_named_with_its_line(old, new, line, want, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = FITTING.replace(old, new).replace('TEACHER', pair[0]).replace('STUDENT', pair[1])
    if 'maps' in new: text = text.replace('schedule: {max_steps: 4, warmup_steps: 1}', 'stages: [{kind: attention, steps: 4, loss: {alpha: .5}}]').replace('    memory', '    schedule: {warmup_steps: 1}\n    memory')
    (tmp_path/'t.yaml').write_text(text)
    for words in (['run', 't.yaml'], ['run', 't.yaml', '--dry-run']):
        with mock.patch.object(Run, 'load_teacher', side_effect=AssertionError('loaded')): assert main(words)==1
        assert f't.yaml, line {line}: {want}' in ''.join(capsys.readouterr())

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

def test_states_of_two_widths_are_refused_before_anything_runs(pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    o['distillation']['training']['loss'] = dict(last=True, alpha=.5)
    with pytest.raises(ValueError, match='training.loss.last: teacher and student are 48 and 32 wide'): Run(Config.from_dict(o))

@pytest.mark.parametrize('command', ['synth', 'verify'])
def test_a_second_writer_is_refused_before_the_teacher_is_loaded(command, pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    (tmp_path/'o.yaml').write_text(yaml.safe_dump(o))
    path = o['distillation']['teacher']['cache_dir']
    there,loads = mock.patch('distill_nb.plan.load_manifest'),mock.patch.object(Run, 'load_teacher', side_effect=AssertionError('loaded'))
    with claim(path), there, loads, pytest.raises(CacheError, match='is writing this cache'):
        Run(Config.from_dict(o), False).synth() if command=='synth' else verify(path, str(tmp_path/'o.yaml'))

def test_training_without_the_teacher_is_the_same_training(pair, tmp_path):
    "A cache made where the teacher is, a run where it is not: the same steps and scores, and no word of its weights"
    shutil.copytree(pair[0], tmp_path/'teacher')
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], (str(tmp_path/'teacher'), pair[1]), tmp_path)
    o['distillation']['validation'] = dict(answers=2, speed=0)
    whole = quiet(run, Config.from_dict(o), False)
    (tmp_path/'teacher/model.safetensors').unlink()
    o['distillation']['teacher']['present'],o['distillation']['out'] = False,str(tmp_path/'apart')
    said = io.StringIO()
    with contextlib.redirect_stdout(said): apart = run(Config.from_dict(o), False)
    assert 'without its teacher' in said.getvalue() and set(apart.models)==set(whole.models)-{'teacher'}
    assert apart.history==whole.history and apart.models['student']['heldout'].kl==whole.models['student']['heldout'].kl
    assert set(apart.samples[0]['answers'])=={'before', 'after'}
    for key,value,said in (('nats', 1e-3, '0.001'), ('synthesis', dict(max_new_tokens=9), '9 is asked for')):
        wrong = json.loads(json.dumps(o))
        wrong['distillation']['teacher'][key] = value
        with pytest.raises(CacheError, match=said): Run(Config.from_dict(wrong), False).synth()
    more = json.loads(json.dumps(o))
    for k,v in HYBRID.items(): put(more['distillation'], k, v)
    with pytest.raises(CacheError, match="holds {'layers': .*}, and the file needs"): Run(Config.from_dict(more), False).synth()
    assert 'teacher writes' not in str(make_plan(Config.from_dict(o), 'cpu'))
    o['distillation']['prompts'] = dict(train=4)
    with pytest.raises(CacheError, match='other prompts'): Run(Config.from_dict(o), False).synth()

def test_seconds_of_a_killed_part_are_on_the_bill(pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    (tmp_path/'o.json').write_text(json.dumps(o))
    code = f'''
import json, time
from distill_nb.config import Config
from distill_nb.pipeline import Run
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

class Seen(Exception): "What was wanted is known"

def given(name, act):
    "What `act` gives to the function `name` of a run: `(args, kwargs)`"
    def look(r):
        at, = [m for m in (pipeline, recipes) if hasattr(m, name)]
        with mock.patch.object(at, name, side_effect=Seen) as m, mock.patch.object(pipeline, 'claim', contextlib.nullcontext), contextlib.suppress(Seen): act(r)
        return m.call_args.args,m.call_args.kwargs
    return look

def trainer(r, i=0): return r.trainer(r.distiller(r.learner(), i), r.stage(i))
def tr(f): return lambda r: f(trainer(r))
def kw(k): return lambda r: given('build_cache', Run.synth)(r)[1].get(k)
def pruned(f, name='prune_student'): return lambda r: f(given(name, Run.start)(r)[0])
def stage(k): return lambda r: getattr(r.stage(0), k)
def rows(split): return lambda r: sum(o['split']==split for o in prompt_rows(r.config.prompts))
def formats(name): return lambda r: given(name, lambda r: r.formats(None, Path('x')))(r)[0][1:]
def loaded(k): return lambda r: given('TeacherSynthesizer', Run.load_teacher)(r)[1].get(k)
def watching(r): return [type(o).__name__ for o in trainer(r).callbacks]
def wide(r): return next(iter(trainer(r).distiller.heads.values()))

def watched(r):
    "Evaluations until `watch` stops, where KL falls, agreement falls and perplexity rises"
    t = SimpleNamespace(averaged=contextlib.nullcontext, stop=False, recorder=SimpleNamespace(rows=[]), distiller=SimpleNamespace(student=None))
    for i in range(40):
        t.recorder.rows.append(dict(step=i))
        got = SimpleNamespace(kl=1/(i+1), agreement=1/(i+1), perplexity=i+1.)
        with mock.patch.object(pipeline, 'evaluate', return_value=got), mock.patch.object(pipeline, 'KeepBest'): r.watch(t)
        if t.stop: break
    return sum('heldout_kl' in o for o in t.recorder.rows)

def kept_best(r):
    "How often the weights of the best evaluation are saved"
    t = SimpleNamespace(averaged=contextlib.nullcontext, stop=False, recorder=SimpleNamespace(rows=[dict(step=0)]), distiller=SimpleNamespace(student=None))
    got = SimpleNamespace(kl=1., agreement=1., perplexity=1.)
    with mock.patch.object(pipeline, 'KeepBest') as m, mock.patch.object(pipeline, 'evaluate', return_value=got): r.watch(t)
    return m.call_count

def asked_at_the_end(r):
    "Prompts that the models answer in the report"
    idle = [mock.patch.multiple(o, **dict.fromkeys(ks, mock.DEFAULT)) for o,ks in
        ((Run, ('judge', 'card', 'formats', 'speed', 'save')), (recipes, ('export_safetensors', 'check_parity', 'weights_sha256')))]
    with idle[0], idle[1], mock.patch.object(Run, 'answers', side_effect=Seen) as m, contextlib.suppress(Seen): r.finish(dict(student=None))
    return len(m.call_args.args[1])

HYBRID = {'student.projection': dict(teacher_dim=48, student_dim=32), 'training.loss': dict(type='hybrid', alpha=.5)}
STAGES = [dict(steps=3), dict(kind='features', steps=4, loss=dict(alpha=.5))]
def staged(i=0, **k): return {'training.schedule': {}, 'training.stages': [STAGES[0]|k, STAGES[1]] if i==0 else [STAGES[0], STAGES[1]|k], 'student.projection': HYBRID['student.projection']}
PRUNE = {'student': dict(prune=dict(n_layers=2))}
RELATIONS = {'student.relations': dict(n_heads=8), 'training.schedule': {}, 'training.stages': [dict(kind='relations', steps=3, loss=dict(alpha=.5))]}
STOP = {'validation.eval_frequency': 1}
AWAY = {'teacher.cache_dir': 'elsewhere'} # what is there is kept otherwise

# key: what else the file must say, the value, what sees it, and what is seen
TASK = """task: everyday
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [odd, even]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
def told(r):
    "How many sums were asked, and how long an answer might be"
    o = r.benchmarks(dict(student=r.learner()))['student']['arithmetic']
    return o['n'],o['how'].split(', ')[1]

JUDGE = {'validation.benchmarks': ['alpaca_eval'], 'validation.limit': 2, 'validation.judge': dict(url='http://a')}

def judge_asked(r):
    "How the judge is asked, by the answers of two models to the held-out prompts"
    with mock.patch.object(recipes, 'alpaca_prompts', side_effect=OSError('no hub')), mock.patch.object(recipes, 'alpaca_eval', side_effect=lambda *a: dict(n=len(a[0]))) as m:
        res = r.benchmarks(dict(student=r.learner()))
    assert m.call_count==2 and not any('alpaca_eval' in o for o in res.values()) and res['teacher'][recipes.WINS]==dict(not_run='the reference')
    assert res['student'][recipes.WINS]['source']=='held-out prompts' and res['before'][recipes.WINS]['n']==2
    url,path,*rest = m.call_args[0][3:]
    assert path.parent==r.out
    return url,*rest

EFFECTS = {
    'teacher.model_id': ({}, 'STUDENT', lambda r: r.load_teacher().model.config.hidden_size, 32), 'teacher.cache_dir': ({}, 'elsewhere', lambda r: given('build_cache', Run.synth)(r)[0][2], 'elsewhere'),
    'teacher.present': ({}, False, lambda r: str(pytest.raises(ValueError, r.load_teacher).value)[:26], 'teacher.present: is false,'),
    'teacher.dtype': ({}, 'bfloat16', lambda r: r.load_teacher().model.dtype, torch.bfloat16), 'teacher.store': (AWAY, 'int8', kw('dtype'), 'int8'),
    'teacher.nats': (AWAY | {'teacher.store': 'transform'}, 1e-3, kw('nats'), 1e-3), 'teacher.k': (AWAY | {'teacher.store': 'topk'}, 7, kw('k'), 7),
    'teacher.synthesis.max_new_tokens': ({}, 9, kw('max_new_tokens'), 9), 'teacher.synthesis.temperature': ({}, .3, kw('temperature'), .3),
    'teacher.synthesis.batch_size': ({}, 3, kw('batch_size'), 3), 'teacher.synthesis.seed': ({}, 5, kw('seed'), 5),
    'teacher.synthesis.score_tokens': ({}, 99, kw('score_tokens'), 99), 'teacher.synthesis.too_long': ({}, 'skip', kw('too_long'), 'skip'), 'teacher.synthesis.not_finite': ({}, 'skip', kw('not_finite'), 'skip'),
    'teacher.device_map': ({}, 'cpu', loaded('device_map'), 'cpu'), 'teacher.max_memory': ({'teacher.device_map': 'auto'}, {0: '9GB', 'cpu': '20GiB'}, loaded('max_memory'), {0: '9GB', 'cpu': '20GiB'}),
    'teacher.synthesis.n_responses': ({}, 3, lambda r: [(o['split'], o.get('draw')) for o in given('build_cache', Run.synth)(r)[0][1] if o['split']!='ood'].count(('train', 2)), 8),
    'student.model_id': ({}, 'TEACHER', lambda r: r.learner().config.hidden_size, 48), 'student.prune.n_layers': (PRUNE, 1, pruned(lambda a: a[1]), 1),
    'student.prune.how': (PRUNE, 'uniform', pruned(lambda a: a[3]), 'uniform'), 'student.prune.n_prompts': (PRUNE, 3, pruned(lambda a: len(a[2])), 3),
    'student.prune.refit': (PRUNE, 3, pruned(lambda a: len(a[2]), 'refit_gaps'), 3),
    'student.prune.intermediate_size': (PRUNE, 64, lambda r: r.load_student(r.start()).config.intermediate_size, 64),
    'student.prune.num_attention_heads': (PRUNE, 1, pruned(lambda a: a[3], 'prune_width'), 1),
    'student.projection.teacher_dim': (HYBRID, 48, lambda r: wide(r).linear.out_features, 48), 'student.projection.student_dim': (HYBRID, 32, lambda r: wide(r).linear.in_features, 32),
    'student.projection.use_layernorm': (HYBRID, False, lambda r: type(wide(r).norm), torch.nn.Identity), 'student.projection.n_layers': (HYBRID, 5, lambda r: len(r.layer_map(30, 20, r.config.student.projection)), 5),
    'student.relations.n_heads': (RELATIONS, 16, tr(lambda t: t.distiller.n_heads), 16), 'student.relations.n_layers': (RELATIONS, 5, lambda r: len(r.layer_map(30, 20, r.config.student.relations)), 5),
    'student.projection.layer_map': (HYBRID, [[1, 2], [2, 3]], lambda r: r.layer_map(3, 2, r.config.student.projection), {1: 2, 2: 3}),
    'student.relations.layer_map': (RELATIONS, 'last', lambda r: r.layer_map(30, 20, r.config.student.relations), {20: 30}),
    'student.lora.keep': ({}, True, lambda r: given('export_adapter', lambda r: r.merged(r.learner(), True))(r)[0][2].name, 'adapter'),
    'student.freeze_below': ({}, 1, tr(lambda t: any('layers.0.' in n for n in t.names)), False),
    'student.lora.r': ({}, 3, lambda r: r.learner().peft_config['default'].r, 3), 'student.lora.alpha': ({}, 5., lambda r: r.learner().peft_config['default'].lora_alpha, 5.),
    'student.lora.tasks': ({}, dict(classify=.5, compare=.5), lambda r: [Path(t.out).name for t in fitted(r, lambda r: r.learn_tasks(r.learner(), r.learn, False))], ['student-classify', 'student-compare']),
    'student.unfreeze': ({}, [[0., 1], [.5, 'all']], stage('unfreeze'), [(0., 1), (.5, 'all')]),
    'training.loss.type': (HYBRID, 'hybrid', tr(lambda t: len(t.distiller.heads)), 1), 'training.loss.temperature': ({}, 3., stage('temperature'), 3.), 'training.loss.alpha': (HYBRID, .25, stage('alpha'), .25),
    'training.loss.divergence': ({}, 'jsd', stage('divergence'), 'jsd'), 'training.loss.ce': ({}, .5, stage('ce'), .5), 'training.loss.last': (PRUNE | {'training.loss.alpha': .25}, True, tr(lambda t: (t.distiller.matches, t.stages[0].alpha)), (True, .25)),
    'training.optimizer.type': ({}, 'adamw8bit', tr(lambda t: type(t.opt)), torch.optim.SGD), 'training.optimizer.lr': ({}, .25, stage('lr'), .25),
    'training.optimizer.weight_decay': ({}, .25, tr(lambda t: t.opt.param_groups[0]['weight_decay']), .25),
    'training.optimizer.betas': ({}, [.8, .9], tr(lambda t: t.opt.param_groups[0]['betas']), (.8, .9)),
    'training.schedule.warmup_steps': ({}, 2, stage('warmup'), .5), 'training.schedule.max_steps': ({}, 8, stage('steps'), 8), 'training.schedule.decay': ({}, 'linear', stage('decay'), 'linear'),
    'training.stages.kind': (staged(), None, lambda r: [type(trainer(r, i).distiller.heads).__name__+str(len(trainer(r, i).distiller.heads)) for i in (0, 1)], ['ModuleDict0', 'ModuleDict1']),
    'training.stages.steps': (staged(steps=7), None, stage('steps'), 7), 'training.stages.lr': (staged(lr=.5), None, stage('lr'), .5), 'training.stages.unfreeze': (staged(unfreeze=[[0, 1]]), None, stage('unfreeze'), [(0., 1)]),
    'training.stages.loss.type': (staged(), None, lambda r: [s.loss.type for s in r.stages], ['kl', 'hybrid']), 'training.stages.loss.temperature': (staged(loss=dict(temperature=3.)), None, stage('temperature'), 3.),
    'training.stages.loss.alpha': (staged(1, loss=dict(alpha=.2)), None, lambda r: r.stage(1).alpha, .2), 'training.stages.loss.divergence': (staged(loss=dict(divergence='tvd')), None, stage('divergence'), 'tvd'),
    'training.stages.loss.ce': (staged(loss=dict(ce=.5)), None, stage('ce'), .5),
    'training.stages.loss.last': (PRUNE | staged(loss=dict(last=True, alpha=.25)), None, tr(lambda t: (t.distiller.matches, t.stages[0].alpha)), (True, .25)),
    'training.stages.heads_first': (staged(1, heads_first=2), None, lambda r: [t.stages[0].steps for t in fitted(r)], [3, 2, 2]),
    'training.stages.mix': ({'training.schedule': dict(warmup_steps=1), 'training.stages': [dict(steps=1), dict(kind='self', steps=1, mix=.9)]}, None,
        lambda r: given('self_distill', lambda r: r.distiller(r.learner(), 1))(r)[0][-1], .9),
    'training.memory.batch_size': ({}, 3, tr(lambda t: t.batch_size), 3), 'training.memory.gradient_accumulation': ({}, 3, tr(lambda t: t.accum_steps), 3),
    'training.memory.mixed_precision': ({}, 'bf16', tr(lambda t: (t.mixed_precision, t.distiller.asked)), ('bf16', torch.bfloat16)),
    'training.memory.activation_checkpointing': ({}, 'selective', tr(lambda t: 'context_fn' in t.distiller.student.model._gradient_checkpointing_func.keywords), True),
    'training.memory.save_every': ({}, 3, tr(lambda t: t.save_every), 3), 'training.monitor.policy': ({}, 'stop', tr(lambda t: t.monitor.policy), 'stop'),
    'training.monitor.window': ({}, 9, tr(lambda t: t.monitor.window), 9), 'training.monitor.k': ({}, 9., tr(lambda t: t.monitor.k), 9.),
    'training.watch.diagnose': ({}, False, watching, []), 'training.watch.every': ({}, 3, tr(lambda t: t.callbacks[0].every), 3),
    'training.watch.trackers': ({}, ['wandb'], tr(lambda t: t.callbacks[-1].trackers), ['wandb']), 'training.watch.project': ({'training.watch.trackers': ['wandb']}, 'mine', tr(lambda t: t.callbacks[-1].project), 'mine'),
    'training.ema': ({}, .9, tr(lambda t: t.ema), .9), 'training.control_steps': ({}, 3, lambda r: [t.stages[0].steps for t in fitted(r, Run.train)], [4, 3]), 'training.seed': ({}, 5, tr(lambda t: t.seed), 5),
    'validation.benchmarks': ({'validation.limit': 2}, ['arithmetic'], lambda r: r.benchmarks(dict(student=r.learner()))['student'].keys(), {'arithmetic'}), 'validation.limit': ({'validation.benchmarks': ['arithmetic']}, 3, lambda r: r.benchmarks(dict(student=r.learner()))['student']['arithmetic']['n'], 3),
    'validation.tasks': ({'validation.benchmarks': ['lm_eval-everyday'], 'validation.limit': 2}, 'TASKS', lambda r: r.benchmarks(dict(student=r.learner()))['student']['lm_eval-everyday']['n'], 2),
    'validation.benchmark_settings': ({'validation.benchmarks': ['arithmetic'], 'validation.limit': 3}, dict(arithmetic=dict(limit=2, max_new_tokens=4)), told, (2, 'at most 4 tokens')),
    'validation.judge.url': (JUDGE, 'http://b', judge_asked, ('http://b', '', 'OPENAI_API_KEY')), 'validation.judge.model': (JUDGE, 'large', judge_asked, ('http://a', 'large', 'OPENAI_API_KEY')),
    'validation.judge.key_from': (JUDGE, 'MY_KEY', judge_asked, ('http://a', '', 'MY_KEY')),
    'validation.eval_frequency': ({}, 8, watched, 5), 'validation.early_stopping.patience': (STOP | {'validation.early_stopping.metric': 'agreement'}, 6, watched, 7),
    'validation.early_stopping.metric': (STOP, 'perplexity', watched, 4), 'validation.early_stopping.best': (STOP, False, kept_best, 0), 'validation.answers': ({}, 2, asked_at_the_end, 2),
    'validation.own_text': ({}, 2, lambda r: r.on_own_text(r.learner())['student']['n'], 2),
    'validation.speed': ({}, 2, lambda r: len(given('bench_models', lambda r: r.speed(Path('x')))(r)[0][1]), 2),
    'prompts.file': ({'prompts': {}}, 'FILE', rows('train'), 1), 'prompts.train': ({}, 5, rows('train'), 5), 'prompts.heldout': ({}, 5, rows('heldout'), 5), 'prompts.ood': ({}, 5, rows('ood'), 5), 'prompts.domain': ({'prompts': dict(file='DOMAIN')}, 1, rows('domain'), 1),
    'export.gguf': ({}, ['q8_0'], lambda r: formats('export_gguf')(r)[-1], 'q8_0'), 'export.onnx': ({}, True, formats('export_onnx'), None), 'out': ({}, 'OUT', lambda r: r.out.name, 'other')}

def fitted(r, act=None):
    "The trainers that a run fits, in turn"
    got = []
    def fit(self, t, past=()):
        got.append(t)
        return [*past, *[dict(stage=t.stages[0].name)]*t.stages[0].steps]
    with mock.patch.object(Run, 'fit', fit): quiet(act or (lambda r: r.learn(r.learner())), r)
    return got

ATTENTION = {'student.attention': dict(n_heads=8), 'training.schedule': {}, 'training.stages': [dict(kind='attention', steps=3, loss=dict(alpha=.5))]}
learns = given('AttentionDistiller', lambda r: r.distiller(r.learner(), 0))
EFFECTS |= {'student.attention.n_heads': (ATTENTION, 4, lambda r: learns(r)[0][3:], ({}, -1, 4)), 'student.attention.block': (ATTENTION, 1, kw('relations'), 1),
    'student.attention.maps': (ATTENTION, 2, lambda r: (learns(r)[0][3], kw('attention')(r), r.learner().config._attn_implementation), ({0: 1, 1: 2}, [1, 2], 'eager'))}

def put(o, key, value):
    "Set a dotted key"
    *at,last = key.split('.')
    for k in at: o = o.setdefault(k, {})
    o[last] = value

@pytest.fixture(scope='module')
def asked(pair, tmp_path_factory):
    "A file of few words, and its cache"
    d = tmp_path_factory.mktemp('keys')
    (d/'one.jsonl').write_text(json.dumps(dict(prompt='Say hello.', split='train'))+'\n')
    (d/'tasks').mkdir()
    (d/'rows.jsonl').write_text(''.join(json.dumps(dict(question=f'{i} is', answer=i%2))+'\n' for i in range(3)))
    (d/'tasks/everyday.yaml').write_text(TASK.format(rows=d/'rows.jsonl'))
    (d/'domain.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Say {i}.', split=s))+'\n' for s in ('train', 'domain') for i in range(2)))
    o = dict(teacher=dict(model_id=pair[0], cache_dir=str(d/'cache'), dtype='float32', store='bf16', synthesis=dict(max_new_tokens=4)),
        student=dict(model_id=pair[1]), prompts=dict(train=8, heldout=3, ood=2),
        training=dict(schedule=dict(max_steps=4, warmup_steps=1), memory=dict(mixed_precision='no')), validation=dict(answers=0), out=str(d/'out'))
    h = json.loads(json.dumps(o))
    for k,v in HYBRID.items(): put(h, k, v)
    return d,o,quiet(Run(Config.from_dict(dict(distillation=h)), False).synth)

def test_every_key_is_in_the_table():
    ts = tables()
    leaves = {'.'.join((*w, k)) for w,t in ts.items() for k in t.model_fields if (*w, k) not in ts}
    assert set(EFFECTS)==leaves

@pytest.mark.parametrize('key', EFFECTS)
def test_key_has_its_effect(key, asked, pair, tmp_path):
    d,base,cache = asked
    more,value,look,want = EFFECTS[key]
    o = json.loads(json.dumps(base))
    more = json.loads(json.dumps(more).replace('DOMAIN', str(d/'domain.jsonl')))
    for k,v in more.items(): put(o, k, v)
    names = dict(STUDENT=pair[1], TEACHER=pair[0], TASKS=str(d/'tasks'), FILE=str(d/'one.jsonl'), OUT=str(tmp_path/'other'))
    if key!='out': o['out'] = str(tmp_path/'out')
    if value is not None: put(o, key, names.get(value, value) if isinstance(value, str) else value)
    here = dict(check_models=lambda c: None, fast_dtype=lambda *a: torch.float32, adamw8bit=lambda params, *a: torch.optim.SGD(params, lr=0))
    with mock.patch('distill_nb.watch.filter_trackers', lambda names, out: names), mock.patch.multiple(pipeline, **here): r = Run(Config.from_dict(dict(distillation=o)), False)
    r.cache = r.judged = cache
    got = quiet(look, r)
    assert got==want if want is not None else got, (key, got)

def tiny_run(base, out, **more):
    "A run of the file of few words, with keys changed"
    o = json.loads(json.dumps(base)) | dict(out=str(out/'out'))
    for k,v in more.items(): put(o, k.replace('__', '.'), v)
    with mock.patch.object(pipeline, 'fast_dtype', return_value=torch.float32): return Run(Config.from_dict(dict(distillation=o)), False)

def test_adapter_beside_the_student_is_the_student(asked, tmp_path):
    r = tiny_run(asked[1], tmp_path, student__lora=dict(r=2, keep=True))
    r.cache = r.judged = asked[2]
    student = quiet(r.train)['student']
    beside = PeftModel.from_pretrained(r.load_student(r.start()), tmp_path/'out/adapter')
    x = torch.arange(5, 25)[None]
    assert not [k for k,_ in student.named_parameters() if 'lora' in k] and (beside(x).logits-student(x).logits).abs().max()<1e-4
    assert (r.load_student(r.start())(x).logits-student(x).logits).abs().max()>1e-3
    with pytest.raises(ValueError, match='student.lora.keep: with `tasks`'): tiny_run(asked[1], tmp_path, student__lora=dict(keep=True, tasks=dict(classify=1., compare=1.)))

def test_a_run_that_the_monitor_stops_goes_no_further(asked, tmp_path, monkeypatch):
    "Training raises, again when it is asked again, so nothing follows; under another policy it goes on"
    monkeypatch.setattr(KLMonitor, 'judge', lambda self, rows, row: 'batch' if row['step']==1 else '')
    def make(policy):
        r = tiny_run(asked[1], tmp_path, training__monitor=dict(policy=policy), training__control_steps=1)
        r.cache = r.judged = asked[2]
        return r
    for _ in range(2):
        with pytest.raises(RuntimeError, match='student: stopped by the monitor at step 1, batch: to go on from there, choose another training.monitor.policy'): quiet(make('stop').train)
    r = make('log')
    assert 'student' in quiet(r.train) and r.scores('student @ 1 steps') # judged before it was stopped

def test_more_patience_goes_on_where_a_run_had_ended(asked, tmp_path, monkeypatch):
    "Weights that were kept by one number are not taken for the best by another"
    seen = []
    def worse(*a):
        seen.append(1)
        return SimpleNamespace(kl=float(len(seen)), agreement=1/len(seen), perplexity=float(len(seen)))
    monkeypatch.setattr(pipeline, 'evaluate', worse)
    def learned(**stop):
        r = tiny_run(asked[1], tmp_path, validation=dict(eval_frequency=1, early_stopping=stop) if stop else dict(eval_frequency=1))
        r.cache = r.judged = asked[2]
        m = r.learner()
        return quiet(r.learn, m),weights_sha256(m)
    first,_ = learned(patience=1)
    assert [len(first), len(learned(patience=1)[0]), len(seen)]==[2, 2, 2]
    rows,kept = learned(patience=2)
    assert [len(rows), rows[1]['stopped'], rows[2]['stopped']]==[3, 'callback', 'callback']
    rows,last = learned()
    assert [len(rows), sum('least_kl' in o for o in rows), last!=kept]==[4, 3, True]
    assert learned(patience=9, metric='perplexity')[1]==last and learned(patience=9)[1]==kept

def test_checkpoints_of_another_student_are_refused(asked, pair, tmp_path):
    def make(path):
        r = tiny_run(asked[1], tmp_path, student__model_id=path)
        r.cache = r.judged = asked[2]
        return r
    r = make(pair[1])
    quiet(lambda: r.learn(r.learner()))
    r = make(save_tiny(tmp_path/'twin', 32, 2, 7))
    with pytest.raises(ValueError, match='belongs to a run with another student'): quiet(lambda: r.learn(r.learner()))

def test_code_of_a_student_never_runs(asked, pair, tmp_path, monkeypatch, capsys):
    "Nobody is asked on the terminal either, where a yes would run it"
    monkeypatch.setattr('builtins.input', lambda *a: 'y')
    own = Path(shutil.copytree(pair[1], tmp_path/'own'))
    c = json.loads((own/'config.json').read_text())
    (own/'config.json').write_text(json.dumps(c | dict(model_type='own', auto_map=dict(AutoConfig='own.C', AutoModelForCausalLM='own.M'))))
    (own/'own.py').write_text(f'import os; os.mkdir({str(tmp_path/"marker")!r})')
    o = asked[1] | dict(student=dict(model_id=str(own)), out=str(tmp_path/'out'))
    (tmp_path/'own.yaml').write_text(yaml.safe_dump(dict(distillation=o)))
    for words in (['run'], ['plan'], ['run', '--dry-run']):
        assert main([*words, str(tmp_path/'own.yaml')])==1
        assert 'brings code of its own' in capsys.readouterr().err and not (tmp_path/'marker').exists()
    with pytest.raises(ValueError, match='brings code of its own'): tiny_run(o, tmp_path)

@pytest.mark.parametrize('command', ['run', 'synth', 'train'])
def test_one_process_works_in_a_folder(asked, tmp_path, command, capsys):
    (tmp_path/'a.yaml').write_text(yaml.safe_dump(dict(distillation=asked[1] | dict(out=str(tmp_path/'out')))))
    with tiny_run(asked[1], tmp_path).alone(), mock.patch.object(Run, 'synth', side_effect=AssertionError): assert main([command, str(tmp_path/'a.yaml')])==1
    assert 'another process is at work in this folder' in capsys.readouterr().err

@pytest.mark.parametrize('error', [FloatingPointError('lower the learning rate'), pipeline.Stopped('by the monitor'), OSError('no space left')])
def test_designed_stop_is_one_line(asked, tmp_path, error, capsys):
    (tmp_path/'a.yaml').write_text(yaml.safe_dump(dict(distillation=asked[1] | dict(out=str(tmp_path/'out')))))
    with mock.patch('distill_nb.plan.run', side_effect=error): assert main(['run', str(tmp_path/'a.yaml')])==1
    assert capsys.readouterr().err==f'distill: {error}\n'

def test_layers_that_are_most_alike_are_matched(pair, asked, tmp_path):
    "The student is the teacher's first two blocks, so its first looks like the teacher's first, and not like its second as in an even map"
    t = LlamaForCausalLM.from_pretrained(pair[0])
    m = LlamaForCausalLM(LlamaConfig(**t.config.to_dict() | dict(num_hidden_layers=2)))
    m.load_state_dict({k: v for k,v in t.state_dict().items() if 'layers.2.' not in k})
    for o in (m, AutoTokenizer.from_pretrained(pair[0])): o.save_pretrained(tmp_path/'student')
    more = dict(student__model_id=str(tmp_path/'student'), student__projection=dict(teacher_dim=48, student_dim=48, n_layers=1), training__loss=dict(type='hybrid', alpha=.5))
    r = tiny_run(asked[1], tmp_path, **more | dict(teacher__cache_dir=str(tmp_path/'cache'), student__projection__layer_map='similarity'))
    assert quiet(r.synth).manifest['layers']==[1]
    sim = r.similarity()
    assert sim.shape==(2, 3) and sim[0,0]>.999 and sim[0,1]<.99
    with mock.patch.object(r, 'load_teacher', side_effect=AssertionError('asked twice')): assert r.layer_map(3, 2, r.config.student.projection)=={1: 1}
    gone = dict(prune=dict(n_layers=2), projection=dict(teacher_dim=48, student_dim=48, layer_map='similarity'))
    with pytest.raises(ValueError, match="'similarity' looks at the student before"): tiny_run(asked[1], tmp_path, student=gone, training__loss=more['training__loss'])

def test_step_that_stands_out_is_diagnosed(asked, tmp_path):
    r = tiny_run(asked[1], tmp_path, training__schedule__max_steps=8, training__watch=dict(every=4))
    r.cache = r.judged = asked[2]
    judge = pipeline.KLMonitor.judge
    with mock.patch.object(pipeline.KLMonitor, 'judge', lambda self, rows, row: 'batch' if row['step']==6 else judge(self, rows, row)): quiet(r.train)
    rows = load_json(tmp_path/'out/history-student.json')['rows']
    assert [o['step'] for o in rows if 'cause' in o]==[6] and [o['step'] for o in rows if 'overlap' in o]==[0, 4]
    with mock.patch('distill_nb.watch.filter_trackers', return_value=[]), pytest.raises(ValueError, match='training.watch.trackers: .*not installed'):
        tiny_run(asked[1], tmp_path/'none', training__watch=dict(trackers=['wandb']))
    assert not (tmp_path/'none').exists()

def test_a_notebook_shows_the_curve_and_a_terminal_does_not(asked, tmp_path):
    r = tiny_run(asked[1], tmp_path, training__control_steps=2)
    for name,progress,shown in (('terminal', True, 0), ('notebook', True, 2), ('quiet', False, 0)):
        c = r.config.model_copy(update=dict(out=str(tmp_path/name)))
        with mock.patch.object(pipeline, 'fast_dtype', return_value=torch.float32): r = Run(c, progress)
        r.cache = r.judged = asked[2]
        display = mock.Mock()
        here = mock.Mock(version_info=(9, 0), display=mock.Mock(display=display), get_ipython=lambda: None if name=='terminal' else 'a notebook')
        with mock.patch.dict(sys.modules, {'IPython': here}): quiet(r.train)
        assert display.call_count==shown and all('<img' in o.args[0]['text/html'] for o in display.call_args_list)

def test_what_the_teacher_leaves_out_is_in_the_report(asked, tmp_path):
    rows = [dict(prompt=p, split=s) for p,s in (('Say hello.', 'train'), ('word '*3000, 'train'), ('Say bye.', 'train'), ('Say why.', 'heldout'))]
    (tmp_path/'long.jsonl').write_text(''.join(json.dumps(o)+'\n' for o in rows))
    kw = dict(prompts=dict(file=str(tmp_path/'long.jsonl')), teacher__cache_dir=str(tmp_path/'cache'))
    with pytest.raises(ValueError, match='prompt 3 has .* tokens'): tiny_run(asked[1], tmp_path, **kw).synth()
    r = tiny_run(asked[1], tmp_path, **kw, teacher__synthesis__too_long='skip')
    said = io.StringIO()
    with contextlib.redirect_stdout(said): assert len(r.synth())==3
    assert r.settings()['left out of the cache']=={'prompts that are too long': 1} and "left out are {'prompts that are too long': 1}" in said.getvalue()
    with mock.patch('distill_nb.cache._not_finite', return_value=[0]):
        r = tiny_run(asked[1], tmp_path, **kw | dict(teacher__cache_dir=str(tmp_path/'bad')), teacher__synthesis=dict(max_new_tokens=4, too_long='skip', not_finite='skip'))
        quiet(r.synth)
    assert len(r.cache)==2 and r.left_out()=={'prompts that are too long': 1, 'answers that are not finite': 1}

def test_teacher_that_is_partly_on_disk_is_the_same_teacher(asked, tmp_path):
    near,away = (tiny_run(asked[1], tmp_path/k, teacher__cache_dir=str(tmp_path/k/'cache'), **more)
        for k,more in (('near', {}), ('away', dict(teacher__device_map='auto', teacher__max_memory=dict(cpu='9700KB')))))
    for r in (near, away): quiet(r.synth)
    assert {p.device.type for p in away.teacher.model.parameters()}=={'cpu', 'meta'} and list(away.out.glob('offload-*'))
    a,b = [(r.cache.path/'shard-00000.safetensors').read_bytes() for r in (near, away)]
    assert a==b
    rows = [quiet(r.train) and load_json(r.out/'history-student.json')['rows'] for r in (near, away)]
    assert rows[0]==rows[1] and away.teacher is None and not list(away.out.glob('offload-*')) and away.scores('teacher')['heldout'].kl<1e-4
    with pytest.raises(ValueError, match='teacher.max_memory: leaves the embeddings no room'): tiny_run(asked[1], tmp_path, teacher__device_map='auto', teacher__max_memory=dict(cpu='1KB')).load_teacher()
    with pytest.raises(ValueError, match='teacher.device_map: spreads the blocks'): tiny_run(asked[1], tmp_path, teacher__device_map='auto', student=dict(prune=dict(n_layers=2)))

@pytest.mark.parametrize('sizes,store', [((49152, 49216), 'topk'), ((49280, 49152), 'bf16'), ((49280, 49216), 'bf16'), ((49280, 49152), 'topk')])
def test_padded_vocabularies_run_to_a_report(sizes, store, asked, tmp_path):
    for k,w,v,n in (('teacher', 48, sizes[0], 0), ('student', 32, sizes[1], 1)): save_tiny(tmp_path/k, w, 2, n, v)
    make = lambda: tiny_run(asked[1], tmp_path, teacher__model_id=str(tmp_path/'teacher'), teacher__cache_dir=str(tmp_path/'cache'), teacher__store=store,
        student__model_id=str(tmp_path/'student'), training__control_steps=2, training__watch=dict(every=2) if store=='bf16' else {})
    if store=='topk' and sizes[0]>sizes[1]:
        with pytest.raises(ValueError, match="teacher.store: 'topk' may keep ids that the student lacks"): make()
        return
    r = make()
    with pytest.warns(UserWarning, match=f'comparing the first {min(sizes)} ids, the rest is padding') as said: rep = quiet(run, r.config, False)
    assert len([o for o in said if 'padding' in str(o.message)])==1 and set(rep.models)=={'teacher', 'start', 'student', 'student @ 2 steps', 'control'}
    kl = {k: o['heldout'].kl for k,o in rep.models.items()}
    assert kl['teacher']<1e-3 and kl['student']!=kl['start'] and all(math.isfinite(o) for o in kl.values())
    assert LlamaForCausalLM.from_pretrained(tmp_path/'out/model').config.vocab_size==sizes[1]

def test_torchrun_is_refused_with_the_way_to_go(asked, tmp_path, monkeypatch):
    for k,v in dict(RANK='0', WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match='torchrun started 2: `distill run FILE`'): tiny_run(asked[1], tmp_path)
    assert not (tmp_path/'out').exists()

def test_set_of_ones_own_field_is_judged_and_never_trained_on(pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    rows = [dict(prompt=f'{w} the number {i}.', split=s) for s,w in (('train', 'Say'), ('heldout', 'Write'), ('domain', 'Spell')) for i in range(6)]
    rows.append(dict(prompt='Say the number 3.', split='domain'))
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    o['distillation'] |= dict(prompts=dict(file=str(tmp_path/'my.jsonl')), validation=dict(answers=0), export={})
    rep = quiet(run, Config.from_dict(o), False)
    assert {s: len(v.n) for s,v in rep.models['student'].items()}==dict(heldout=6, domain=7)
    assert rep.models['teacher']['domain'].kl<.01<rep.models['student']['domain'].kl
    assert len(rep.contamination['domain']['shared'])==1 and not rep.contamination['heldout']['shared'] and '| domain | student |' in str(rep)
    used = {i for r in load_json(tmp_path/'run/history-student.json')['rows'] for i,*_ in r['examples']}
    assert used and used<=set(TeacherCache(tmp_path/'cache').select(split='train'))

def test_pair_is_judged_on_a_domain_alone_with_benchmarks_own_text_and_speed(pair, tmp_path, capsys):
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Say {i}.', split='domain'))+'\n' for i in range(3)))
    words = ['eval', pair[1], '--against', pair[0], '--prompts', tmp_path/'my.jsonl', '--tokens', 4, '--out', tmp_path/'judged']
    assert main([str(w) for w in (*words, '--benchmarks', 'arithmetic', '--limit', 2, '--own-text', 2, '--speed', 1)])==0
    rep = Report.load(tmp_path/'judged/report')
    assert list(rep.models['student'])==['domain'] and set(rep.benchmarks)==set(rep.own)==set(rep.speed)=={'teacher', 'student'}
    assert rep.benchmarks['student']['arithmetic']['n']==rep.own['student']['n']==2 and 'peak memory, MB' in capsys.readouterr().out
    with mock.patch.object(recipes, 'run_benchmarks', side_effect=AssertionError('asked twice')), mock.patch.object(recipes, 'bench_models', side_effect=AssertionError('timed twice')):
        assert main([str(w) for w in (*words, '--benchmarks', 'arithmetic', '--limit', 2, '--speed', 1)])==0
    assert main([str(w) for w in (*words, '--benchmarks', 'arithmetik')])==1 and "did you mean 'arithmetic'" in capsys.readouterr().err

def test_judge_that_sees_a_place_is_named_and_its_row_is_not_called_alpaca_eval(pair, tmp_path):
    (tmp_path/'my.jsonl').write_text(''.join(json.dumps(dict(prompt=f'Say {i}.', split='heldout'))+'\n' for i in range(3)))
    words = ['eval', pair[1], '--against', pair[0], '--prompts', tmp_path/'my.jsonl', '--tokens', 4, '--out', tmp_path/'judged', '--judge', 'http://a/v1', '--judge-model', 'large']
    always_a = lambda url, asked, *a, **kw: [dict(response='A')]*len(asked)
    with mock.patch.object(recipes, 'alpaca_prompts', side_effect=OSError('no hub')), mock.patch.object(winrate, 'ask_server', side_effect=always_a) as m:
        assert quiet(main, [str(w) for w in words])==0
    rep = Report.load(tmp_path/'judged/report')
    assert m.call_args[0][0]=='http://a/v1' and m.call_args[0][3]=='large' and rep.benchmarks['teacher']=={recipes.WINS: dict(not_run='the reference')}
    said = [o for o in rep.statements() if 'noise' in o]
    assert said==[f'Warning: {recipes.WINS}: the judge kept only 0% (student) of its verdicts when the answers changed places, so this win rate is noise.']
    assert f'<li class="warning"><b>warning:</b> {said[0].removeprefix("Warning: ")}' in (tmp_path/'judged/report/report.html').read_text() and level(said[0])=='warning'

def test_failed_export_and_changed_judging_lose_nothing(pair, tmp_path, capsys):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    o['distillation'] |= dict(prompts=dict(train=8, heldout=3, ood=2), validation=dict(answers=0), export=dict(gguf=['q8_0']))
    (tmp_path/'t.yaml').write_text(json.dumps(o))
    with mock.patch.object(recipes, 'export_gguf', side_effect=ValueError('llama.cpp does not know it')): assert main(['run', str(tmp_path/'t.yaml')])==1
    rep,said = Report.load(tmp_path/'run/report'),capsys.readouterr()
    assert 'vllm serve .' in (tmp_path/'run/model/README.md').read_text()
    assert f"to serve it: vllm serve {tmp_path}/run/model" in said.out
    assert rep.settings['exports']=={'model-q8_0.gguf': dict(failed='llama.cpp does not know it')} and 'model-q8_0.gguf: not exported' in said.err
    o['distillation'] |= dict(validation=dict(answers=0, benchmarks=['arithmetic'], limit=2), export={})
    (tmp_path/'t.yaml').write_text(json.dumps(o))
    with mock.patch.object(pipeline, 'evaluate', side_effect=AssertionError('judged twice')): assert main(['eval', str(tmp_path/'t.yaml')])==0
    new = Report.load(tmp_path/'run/report')
    assert new.models.keys()==rep.models.keys() and set(new.benchmarks)=={'teacher', 'before', 'student', 'control'}

def test_what_was_not_run_is_tried_again_and_the_rest_is_kept(asked, tmp_path):
    d,base,cache = asked
    o = json.loads(json.dumps(base)) | dict(out=str(tmp_path), validation=dict(benchmarks=['arithmetic', 'bbh'], limit=2))
    with mock.patch.object(pipeline, 'check_models'), mock.patch.object(pipeline, 'fast_dtype', return_value=torch.float32): r = Run(Config.from_dict(dict(distillation=o)), False)
    r.cache = r.judged = cache
    models,tried = dict(student=r.learner()),[]
    def had(model, tok, names, *a, **kw):
        tried.extend(names)
        return {n: dict(n=2, accuracy=.5) if n=='arithmetic' or tried.count('bbh')>3 else dict(not_run='not run: no hub') for n in names}
    with mock.patch.object(recipes, 'run_benchmarks', had): first,second,third = [quiet(r.benchmarks, models)['student'] for _ in range(3)]
    assert first['arithmetic']==third['arithmetic'] and 'not_run' in first['bbh'] and second['bbh']==third['bbh']==dict(n=2, accuracy=.5)
    assert (tried.count('arithmetic'), tried.count('bbh'))==(3, 6)

def test_report_is_there_when_what_follows_fails(pair, tmp_path):
    o = small(read_yaml(files('distill_nb')/'data/edge.yaml')[0], pair, tmp_path)
    o['distillation'] |= dict(prompts=dict(train=8, heldout=3, ood=2), validation=dict(answers=0))
    with mock.patch.object(recipes, 'export_safetensors', side_effect=OSError('disk full')), pytest.raises(OSError, match='disk full'): quiet(run, Config.from_dict(o), False)
    assert 'student' in Report.load(tmp_path/'run/report').models

def test_pair_of_another_family_without_chat_template(tmp_path, capsys):
    tok = AutoTokenizer.from_pretrained(embedded_teacher())
    tok.chat_template = None
    for name,width,seed in (('teacher', 48, 0), ('student', 32, 1)):
        torch.manual_seed(seed)
        c = GPT2Config(vocab_size=len(tok), n_embd=width, n_layer=2, n_head=2, n_positions=256, initializer_range=.15, bos_token_id=1, eos_token_id=2)
        for o in (GPT2LMHeadModel(c), tok): o.save_pretrained(tmp_path/name)
    o = dict(teacher=dict(model_id=str(tmp_path/'teacher'), cache_dir=str(tmp_path/'cache'), synthesis=dict(max_new_tokens=4)),
        student=dict(model_id=str(tmp_path/'student')), prompts=dict(train=12, heldout=4, ood=0), validation=dict(answers=1), out=str(tmp_path/'run'),
        training=dict(schedule=dict(max_steps=4, warmup_steps=1), control_steps=2))
    (tmp_path/'t.yaml').write_text(json.dumps(dict(distillation=o)))
    assert main(['plan', str(tmp_path/'t.yaml')])==main(['run', str(tmp_path/'t.yaml'), '--dry-run'])==0 and not (tmp_path/'run').exists()
    assert main(['run', str(tmp_path/'t.yaml')])==0
    rep = Report.load(tmp_path/'run/report')
    assert set(rep.models)=={'teacher', 'start', 'student', 'student @ 2 steps', 'control'} and set(rep.samples[0]['answers'])=={'teacher', 'before', 'after'}
    assert GPT2LMHeadModel.from_pretrained(tmp_path/'run/model').config.n_embd==32
    assert 'apply_chat_template' not in use_card(tmp_path/'run/model')
