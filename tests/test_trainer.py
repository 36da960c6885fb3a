"What chapter 03 cannot show: processes that are killed, files that rot, two processes, other trainers"
import io, json, math, os, shutil, signal, subprocess, sys, tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from accelerate.utils import AORecipeKwargs
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, LlamaForCausalLM

import distill_nb.files, distill_nb.trainer
from distill_nb import practice
from distill_nb.cache import TeacherCache, build_cache
from distill_nb.files import load_tensors
from distill_nb.loss import DistillationLoss
from distill_nb.projection import ProjectionHead
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, load_prompts, weights_sha256
from distill_nb.distiller import Distiller
from distill_nb.monitor import KLMonitor, token_mean
from distill_nb.shard import collect
from distill_nb.export import export_safetensors
from distill_nb.trainer import AsModel, Callback, DistillTrainer, EarlyStopping, Evaluate, KeepBest, Stage, adamw8bit
from distill_nb.trainer import decay_groups, held_out, train_distillation
from distill_nb.watch import Diagnose, Track, Watch

KILLS = dict(first=1, unfreezing=7, mid_window=12, stage_change=13, later=16, last=24) # forward passes before SIGKILL; two make a step
SAVES = ('fsync', 'replace', 'sidecar', 'unlink') # where the checkpoint after step 9 dies

tiny = partial(practice.tiny, vocab_size=600, hidden_size=16, intermediate_size=32)

def make(root, name, cls=Distiller, stages=None, cache=None, dtype=torch.float32, dropout=0., **kw):
    "A run of two stages with an unfreezing, features, averages and an evaluation"
    cache = cache or TeacherCache(root/'cache')
    stages = stages or [Stage('logits', 6, lr=5e-3, unfreeze=[(0., 1), (.5, 'all')]), Stage('features', 6, lr=2e-3, alpha=.5, temperature=2., ce=.1)]
    torch.manual_seed(3)
    dist = cls(tiny(2, .02, 1).to(dtype), cache, DistillationLoss(), {1: (1, ProjectionHead(16, 16, direction='student_to_teacher').to(dtype))})
    for l in dist.student.model.layers: l.self_attn.attention_dropout = dropout
    args = dict(indices=range(8), batch_size=2, accum_steps=2, save_every=3, device='cpu', progress=False, ema=.9) | kw
    return DistillTrainer(dist, cache, stages, root/name, **args)

def judged(tr):
    with tr.averaged(): return token_mean(held_out(tr.distiller, [8, 9]))

def watch(tr): return Evaluate(judged, 4)

class Picky(KLMonitor):
    "Objects to two steps, whatever they are like"
    def judge(self, rows, row): return {5: 'example', 8: 'batch'}.get(row['step'], '')

class Dies(Distiller):
    left = -1
    def forward(self, batch, n_tokens=None):
        if self.training: Dies.left -= 1
        if not Dies.left: os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch, n_tokens)

def die(*args, **kw): os.kill(os.getpid(), signal.SIGKILL)

def arm(where):
    "From now on the process dies at one place of `save`"
    count = []
    def second(a, b):
        count.append(1)
        os.rename(a, b) if len(count)<2 else die()
    def unlink(self, missing_ok=False):
        if self.name.startswith('checkpoint-000003'): die()
        if self.exists(): os.unlink(self)
    if where=='unlink': Path.unlink = unlink
    else: distill_nb.files.os = SimpleNamespace(**{**vars(os), 'replace' if where=='sidecar' else where: second if where=='sidecar' else die})

def in_child(f):
    "Run `f` in a forked process; returns the signal that ended it"
    pid = os.fork()
    if not pid:
        f()
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def kill(root):
    "Script: runs that are killed, each in a child of its own"
    def at_pass(name, n):
        Dies.left = n
        tr = make(root, name, Dies)
        tr.callbacks = [watch(tr)]
        tr.fit()
    def in_save(where):
        tr = make(root, f'save-{where}')
        save = tr.save
        def deadly(step):
            if step==9: arm(where)
            save(step)
        tr.callbacks,tr.save = [watch(tr)],deadly
        tr.fit()
    for k,n in KILLS.items(): assert in_child(lambda: at_pass(k, n))==signal.SIGKILL, k
    for w in SAVES: assert in_child(lambda: in_save(w))==signal.SIGKILL, w

def two(root):
    "Script for torchrun: the same run, its windows shared by two processes; then one that breaks off and goes on. With copies of the weights, and with shares"
    def run(name, **kw):
        tr = make(root, name, dtype=torch.float64, accum_steps=1, device=None, indices=range(16), save_every=6, dropout=.3, monitor=Picky(), **kw)
        tr.callbacks = [watch(tr), KeepBest(), Watch(3), Diagnose(), *tr.callbacks]
        return tr
    class Breaks(Callback):
        def after_step(self, tr):
            if tr.recorder.rows[-1]['step']==7: raise KeyboardInterrupt
    def same(name, tr, broken, resumed):
        with pytest.raises(KeyboardInterrupt): run(name, shard=broken, callbacks=[Breaks()]).fit()
        again = run(name, shard=resumed)
        torch.manual_seed(99)
        assert 'resuming after step 6 of 12' in fit(again) or not again.accelerator.is_main_process
        if broken==resumed: assert again.recorder.rows==tr.recorder.rows
        for n,p in tr.names.items(): torch.testing.assert_close(collect(again.names[n]), collect(p), rtol=0, atol=0 if broken==resumed else 1e-9)
    for name,shard in (('copies', False), ('shares', True)):
        tr = run(name, shard=shard)
        tr.fit()
        assert tr.accelerator.num_processes==2 and isinstance(next(iter(tr.names.values())), DTensor)==shard
        tr.save_student(root/f'{name}-student')
        same(f'{name}-broken', tr, shard, shard)
    same('copies-to-shares', tr, False, True)

@pytest.fixture(scope='module')
def root():
    d = Path(tempfile.mkdtemp())
    tok = AutoTokenizer.from_pretrained(embedded_teacher()).train_new_from_iterator(load_prompts('train', 660)['prompt'][:100], 600)
    teacher = TeacherSynthesizer(tiny(2, .4, 0), tokenizer=tok, device='cpu')
    build_cache(teacher, load_prompts('train', 16), d/'cache', layers=(1,), max_new_tokens=8, temperature=1., progress=False)
    yield d
    shutil.rmtree(d)

@pytest.fixture(scope='module')
def teacher(root):
    t = TeacherSynthesizer(tiny(2, .4, 0), tokenizer=TeacherCache(root/'cache').tokenizer, device='cpu')
    t.cache = TeacherCache(root/'cache')
    return t

@pytest.fixture(scope='module')
def through(root):
    "The run that nothing happened to"
    tr = make(root, 'through')
    tr.callbacks = [watch(tr)]
    tr.fit()
    return tr

@pytest.fixture(scope='module')
def killed(root): subprocess.run([sys.executable, __file__, 'kill', str(root)], check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))

def fit(tr):
    said = io.StringIO()
    with redirect_stdout(said): tr.fit()
    return said.getvalue()

def resume(root, name, through):
    "Start a killed run again; returns what it says, after checking that nothing else can be told from the whole run"
    tr = make(root, name)
    tr.callbacks = [watch(tr)]
    said = fit(tr)
    assert tr.recorder.rows==through.recorder.rows
    assert [json.loads(l) for l in (tr.out/'history.jsonl').read_text().splitlines()]==through.recorder.rows
    for a,b in ((tr.names, through.names), (tr.averages, through.averages)):
        assert a.keys()==b.keys() and all(torch.equal(a[n], b[n]) for n in b)
    return said

@pytest.mark.parametrize('name', KILLS)
def test_killed_and_resumed(name, root, through, killed):
    back = (KILLS[name]-1)//2//3*3
    assert (f'resuming after step {back} of 12' in (said := resume(root, name, through)))==(back>0), said

@pytest.mark.parametrize('where', SAVES)
def test_killed_while_saving(where, root, through, killed):
    said = resume(root, f'save-{where}', through)
    assert f"resuming after step {9 if where=='unlink' else 6} of 12" in said
    assert ('checkpoint-000009.safetensors is not whole' in said)==(where=='sidecar')

def flip(p):
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 1
    p.write_bytes(b)

DAMAGE = dict(missing=Path.unlink, truncated=lambda p: p.write_bytes(p.read_bytes()[:-1]), flipped=flip, empty=lambda p: p.write_bytes(b''))

@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('suffix', ('.safetensors', '.json'))
def test_damaged_checkpoint(kind, suffix, root, through, tmp_path):
    out = shutil.copytree(through.out, tmp_path/'run')
    assert sorted(p.stem for p in out.glob('*.json'))==['checkpoint-000009', 'checkpoint-000012']
    DAMAGE[kind](out/f'checkpoint-000012{suffix}')
    (tmp_path/'cache').symlink_to(root/'cache')
    said = resume(tmp_path, 'run', through)
    assert 'checkpoint-000012.safetensors is not whole, trying the one before' in said and 'resuming after step 9 of 12' in said

def test_all_checkpoints_damaged(root, through, tmp_path):
    out = shutil.copytree(through.out, tmp_path/'run')
    for p in out.glob('*.safetensors'): flip(p)
    (tmp_path/'cache').symlink_to(root/'cache')
    said = resume(tmp_path, 'run', through)
    assert said.count('is not whole')==2 and 'resuming' not in said

def test_pickle_is_not_a_checkpoint(root, through, tmp_path):
    "Row 22: a pickle under a checkpoint's name is refused, and never run"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    out = shutil.copytree(through.out, tmp_path/'run')
    torch.save(Evil(), out/'checkpoint-000012.safetensors')
    (tmp_path/'cache').symlink_to(root/'cache')
    assert 'is not whole' in resume(tmp_path, 'run', through) and not (tmp_path/'evil').exists()

def test_resume_false_starts_a_new_history(root):
    tr = make(root, 'anew', stages=[Stage('a', 2)])
    tr.fit()
    tr = make(root, 'anew', stages=[Stage('a', 3)])
    tr.fit(resume=False)
    assert [json.loads(l)['step'] for l in (tr.out/'history.jsonl').read_text().splitlines()]==[0, 1, 2]

def test_rollback_leaves_one_history(root):
    "A batch that is corrupt once: the run goes back, and every step is in the history once"
    class Once(Distiller):
        seen = 0
        def forward(self, batch, n_tokens=None):
            Once.seen += 1
            return super().forward({**batch, 'teacher_hidden': -30*batch['teacher_hidden']} if Once.seen==21 else batch, n_tokens)
    tr = make(root, 'rollback', Once, stages=[Stage('a', 12, lr=1e-3)], monitor=KLMonitor('rollback'))
    assert 'step 10: KL' in fit(tr) and tr.lr_scale==.5
    rows = [json.loads(l) for l in (tr.out/'history.jsonl').read_text().splitlines()]
    assert rows==tr.recorder.rows and [r['step'] for r in rows]==list(range(12))

@pytest.mark.parametrize('last', [False, True])
def test_accumulation_in_the_trainer(root, last):
    "1x8, 4x2, 8x1 over unequal lengths, features, last states and their balance among them: one run, in float64"
    class Short(TeacherCache):
        def __getitem__(self, i):
            e,r = super().__getitem__(i),1+i%8
            return {**e, 'input_ids': e['input_ids'][:e['prompt_len']+r], 'hidden': e['hidden'][:r], 'layers': {k: v[:r] for k,v in e['layers'].items()}}
    cache,runs = Short(root/'cache'),[]
    for size in (8, 2, 1):
        tr = make(root, f'acc{size}{last}', cache=cache, dtype=torch.float64, batch_size=size, accum_steps=8//size, stages=[Stage('a', 2, lr=1e-3, alpha=.5, temperature=2., ce=.1)])
        tr.distiller.last = last
        tr.fit()
        runs.append(tr)
    assert sorted(e[2] for e in runs[0].recorder.rows[0]['examples'])==list(range(1, 9)) and runs[0].distiller.balance!=1
    for tr in runs[1:]:
        for n,p in runs[0].names.items(): torch.testing.assert_close(tr.names[n], p, rtol=0, atol=1e-6)
        assert [r['n_tokens'] for r in tr.recorder.rows]==[r['n_tokens'] for r in runs[0].recorder.rows]

@pytest.fixture(scope='module')
def together(root):
    env = os.environ|dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1')
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_addr', '127.0.0.1', '--master_port', '29617', __file__, 'two', str(root)]
    out = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode==0, out.stderr[-3000:]
    one = make(root, 'one', dtype=torch.float64, indices=range(16), save_every=6, dropout=.3, monitor=Picky())
    one.callbacks = [watch(one), KeepBest(), Watch(3), Diagnose()]
    one.fit()
    return one

def names_in(folder):
    "What is in the weights of an export, by its file alone: a loader may pass over what it does not know"
    with safe_open(folder/'model.safetensors', 'pt') as f: return set(f.keys())

def test_heads_are_in_checkpoints_and_not_in_exports(root, through):
    heads = {f'param.heads.1.{n}' for n,_ in through.distiller.heads['1'].named_parameters()}
    own = {n for n,_ in through.distiller.student.named_parameters()}
    assert heads and heads<=load_tensors(through.checkpoints()[0])[0].keys()
    through.save_student(root/'saved')
    export_safetensors(through.distiller.student, through.cache.tokenizer, root/'exported')
    assert names_in(root/'saved')==names_in(root/'exported')==own

@pytest.mark.parametrize('name', ('copies', 'shares'))
def test_two_processes_are_one(name, root, together):
    "And one that was broken off and resumed: dropout is the same, whoever draws it and when"
    tr = make(root, name, dtype=torch.float64, accum_steps=1, indices=range(16), save_every=6)
    with pytest.raises(ValueError, match='other stages, data or settings'): tr.fit()
    (t,meta),(best,_) = load_tensors(tr.checkpoints()[0]),load_tensors(tr.out/'best.safetensors')
    assert meta['step']==12 and all(t[f'param.{n}'].shape==p.shape for n,p in together.names.items())
    assert names_in(root/f'{name}-student')=={n for n,_ in together.distiller.student.named_parameters()}
    for n,p in LlamaForCausalLM.from_pretrained(root/f'{name}-student', dtype=torch.float64).named_parameters(): torch.testing.assert_close(best[f'student.{n}'], p, rtol=0, atol=1e-7)
    for n,p in together.names.items(): torch.testing.assert_close(best[n], p, rtol=0, atol=1e-5)
    for a,b in zip(together.recorder.rows, meta['rows'], strict=True):
        assert (a['step'], a['n_tokens'], a['trains'])==(b['step'], b['n_tokens'], b['trains'])
        assert ('cause' in a)==(a['step'] in (5, 8)) and a.get('cause', '').split(':')[0]==b.get('cause', '').split(':')[0]
        assert all(abs(a[k]-b[k])<1e-5 for k in ('kl', 'grad_norm', 'heldout_kl', 'entropy', 'teacher_entropy', 'overlap') if k in a or k in b)
        assert sorted(e[0] for e in a['examples'])==sorted(e[0] for e in b['examples'])
        assert ('details' in a)==('details' in b)==(a['step']%3==0)
        for x,y in zip(*(sorted(o.get('details', [])) for o in (a, b)), strict=True): assert x[0]==y[0] and all(abs(i-j)<1e-5 for i,j in zip(x, y, strict=True))

def test_dropout_is_on_in_these_runs(root, together):
    dry = make(root, 'dry', dtype=torch.float64, indices=range(16), save_every=6, stages=[Stage('logits', 1)])
    dry.fit()
    assert dry.recorder.rows[0]['kl']!=together.recorder.rows[0]['kl']

@pytest.mark.parametrize('how', (dict(mixed_precision='fp16'), dict(optimizer=adamw8bit)))
def test_what_cannot_be_shared_out_is_refused(how, root):
    with pytest.raises(ValueError, match='shard=True works with'): make(root, 'refused', shard=True, **how)

def test_one_process_has_nobody_to_share_with(root):
    with pytest.raises(RuntimeError, match='there is one process: start several with torchrun'): make(root, 'alone', shard=True).fit()

def test_transformers_trainer_has_the_same_gradients(root, tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments
    tr = make(root, 'hf', dtype=torch.float64)
    dist,cache,seen,grads = tr.distiller,tr.cache,[],{}
    dist.loss = DistillationLoss(2., .5, ce=.1)
    class Seen(AsModel):
        def forward(self, num_items_in_batch=None, **batch):
            seen.append(batch['index'].tolist())
            return super().forward(num_items_in_batch, **batch)
    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kw): grads.update({n: p.grad.clone() for n,p in dist.named_parameters()})
    args = TrainingArguments(tmp_path, use_cpu=True, report_to=[], save_strategy='no', remove_unused_columns=False, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, max_steps=1, max_grad_norm=0., disable_tqdm=True)
    with redirect_stdout(io.StringIO()): Trainer(Seen(dist), args, train_dataset=cache, data_collator=cache.collate, callbacks=[Grab()]).train()
    assert len(seen)==3 and len(set(sum(seen, [])))==6
    mine = make(root, 'hf', dtype=torch.float64).distiller
    mine.loss = dist.loss
    window = [cache.collate([cache[i] for i in b]) for b in seen]
    n = sum(int((b['labels']!=-100).sum()) for b in window)
    for b in window: mine(b, n)['loss'].backward()
    for k,p in mine.named_parameters(): torch.testing.assert_close(grads[k], p.grad, rtol=0, atol=1e-6*p.grad.abs().max().item())

def test_tensorboard_by_name(root):
    "What a tracker of accelerate was sent, read back from its file: records of a length, its checksum, an event, its checksum"
    from tensorboardX.proto import event_pb2 as events
    tr = make(root, 'tracked', stages=[Stage('a', 3)], callbacks=[Track('tensorboard', project='mine')])
    tr.fit()
    [path],found,at = (tr.out/'mine').glob('events*'),{},0
    data = path.read_bytes()
    while at<len(data):
        n = int.from_bytes(data[at:at+8], 'little')
        e = events.Event.FromString(data[at+12:at+12+n])
        found |= {(v.tag, e.step): v.simple_value for v in e.summary.value}
        at += n+16
    assert all(abs(found['kl', r['step']]-r['kl'])<1e-6 for r in tr.recorder.rows) and ('grad_norm', 2) in found

def test_teacher_is_never_trained(teacher):
    before,batches = weights_sha256(teacher.model),torch.utils.data.DataLoader(teacher.cache, 4, collate_fn=teacher.cache.collate)
    student,loss = tiny(1, .02, 1),DistillationLoss(1., 1.)
    go = lambda s: train_distillation(s, teacher, batches, torch.optim.SGD(s.parameters(), .1), loss, 'cpu', 1, 1)
    assert len(go(student))==1 and weights_sha256(teacher.model)==before
    student.lm_head.weight = student.model.embed_tokens.weight = teacher.model.model.embed_tokens.weight
    with pytest.raises(ValueError, match='shares memory'): go(student)
    teacher.model.requires_grad_(True)
    try:
        with pytest.raises(ValueError, match='teacher is trainable'): go(tiny(1, .02, 1))
    finally: teacher.model.requires_grad_(False)
    assert weights_sha256(teacher.model)==before

def test_loss_scaling(root, monkeypatch):
    "fp16's scaler, on the CPU: a scale changes nothing, too much of it costs a step, and a checkpoint keeps it"
    scale,engine = [2.**10],distill_nb.trainer.engine
    def scaled(*args):
        acc = engine('no', 'cpu')
        acc.scaler = torch.amp.GradScaler('cpu', init_scale=scale[0])
        return acc
    stages = [Stage('a', 6, lr=1e-3)]
    plain = make(root, 'unscaled', stages=stages)
    plain.fit()
    monkeypatch.setattr(distill_nb.trainer, 'engine', scaled)
    tr = make(root, 'scaled', stages=stages)
    tr.fit()
    for n,p in plain.names.items(): torch.testing.assert_close(tr.names[n], p, rtol=0, atol=1e-6)
    scale[0] = 2.**127
    tr = make(root, 'overscaled', stages=stages, save_every=6)
    fit(tr)
    skipped,now = tr.recorder.column('skipped'),tr.accelerator.scaler.get_scale()
    assert skipped[0] and not skipped[-1] and now==2.**(127-sum(skipped))
    again = make(root, 'overscaled', stages=stages, save_every=6)
    fit(again)
    assert again.accelerator.scaler.get_scale()==now
    for policy in ('rollback', 'stop'): # an overflow is the scaler's affair, and none of theirs
        tr = make(root, f'overscaled-{policy}', stages=stages, save_every=6, monitor=KLMonitor(policy))
        assert 'smaller loss scale' in fit(tr) and tr.lr_scale==1 and tr.recorder.column('skipped')==skipped

def test_what_is_refused_before_anything_is_made(root, teacher, tmp_path):
    cache = TeacherCache(root/'cache')
    small = build_cache(teacher, load_prompts('train', 4), tmp_path/'small', 'topk', k=8, temperatures=(1, 2), max_new_tokens=4, temperature=1., progress=False)
    teacher.cache = cache
    def refused(c, its, said, indices=None, student=None, **stage):
        dist,stages = Distiller(student or tiny(1, .1, 1), c, DistillationLoss()),[Stage('a', 1), Stage('b', 1, **stage)]
        with pytest.raises(ValueError, match=said): DistillTrainer(dist, its, stages, tmp_path/'no', indices, device='cpu')
        assert not (tmp_path/'no').exists()
    refused(cache, cache, 'indices is empty', [])
    refused(cache, cache, "no kernel for '<lambda>'", divergence=lambda z, zt, T: (z-zt).pow(2).sum(-1))
    refused(cache, small, 'another teacher or codec')
    for stage,said in ((dict(temperature=4.), 'not at 4'), (dict(divergence='reverse_kl'), 'forward KL only')): refused(small, small, said, **stage)
    refused(cache, cache, r'resize_token_embeddings\(', student=tiny(1, .1, 1, vocab_size=99))

def test_one_distiller_in_several_precisions(root):
    "accelerate wraps a model's forward and leaves it so; the trainer takes that off"
    dist = lambda: Distiller(tiny(2, .02, 1), TeacherCache(root/'cache'), DistillationLoss())
    def first_kl(dist, how):
        tr = DistillTrainer(dist, dist.cache, [Stage('a', 1, lr=0.)], root/f'first-{how}', range(8), device='cpu', progress=False, mixed_precision=how)
        return tr.fit(resume=False).column('kl')[0]
    alone,shared = {how: first_kl(dist(), how) for how in ('no', 'bf16')},dist()
    assert [first_kl(shared, how) for how in ('no', 'bf16', 'no')]==[alone[how] for how in ('no', 'bf16', 'no')] and alone['no']!=alone['bf16']

def test_a_run_that_a_callback_ended(root):
    "It is over, and goes on when it is asked to"
    def run(*calls): return make(root, 'ended', stages=[Stage('a', 8)], callbacks=calls)
    level = lambda: Evaluate(lambda tr: 1., 1)
    fit(run(level(), EarlyStopping(2)))
    again = run()
    assert 'stopped there; fit(resume=True) goes on, 3 steps' in fit(again) and len(again.recorder.rows)==3
    for patience,n in ((4, 5), (9, 8)):
        with redirect_stdout(io.StringIO()): assert len(run(level(), EarlyStopping(patience)).fit(resume=True).rows)==n
    with pytest.raises(ValueError, match="use 'auto', True or False"): run().fit('on')

def test_the_best_of_nothing(root):
    "A KeepBest that stands before what measures keeps nothing, not even what another run has left"
    tr = make(root, 'blind', callbacks=[watch(None), KeepBest()])
    tr.fit()
    assert (tr.out/'best.safetensors').exists()
    tr = make(root, 'blind', callbacks=[KeepBest(), watch(None)])
    with pytest.warns(UserWarning, match='put it behind the callback that measures it'): tr.fit(resume=False)
    assert not (tr.out/'best.safetensors').exists()
    kept,values = [],iter([math.nan, 2., math.nan, 1., 3., math.nan])
    class Which(KeepBest):
        def after_step(self, tr):
            super().after_step(tr)
            if (tr.out/'best.json').exists(): kept.append((tr.out/'best.json').stat().st_mtime_ns)
    tr = make(root, 'blind', stages=[Stage('a', 6)], callbacks=[Evaluate(lambda tr: next(values), 1), Which()])
    tr.fit(resume=False)
    assert len(kept)==5 and kept[0]==kept[1]<kept[2]==kept[3]==kept[4]

def test_gradients_are_clipped(root):
    norms = []
    class Norm(Callback):
        def before_step(self, tr): norms.append(torch.stack([p.grad.norm() for p in tr.names.values() if p.grad is not None]).norm().item())
    tr = make(root, 'clipped', stages=[Stage('a', 2)], max_grad_norm=1e-3, callbacks=[Norm()])
    tr.fit()
    assert norms==pytest.approx([1e-3]*2, rel=1e-3) and min(tr.recorder.column('grad_norm'))>1e-2

@pytest.mark.parametrize('flag', (False, True))
def test_fp8_of_torchao_trains_the_weights_that_are_there(flag, root, monkeypatch):
    "On a CPU, which emulates the products; as accelerate sets it up, the optimizer is left with weights that nobody uses"
    float8 = pytest.importorskip('torchao.float8', reason='torchao is asked for by nothing here but fp8: pip install torchao, and this runs')
    asked = []
    def recipe(**kw):
        asked.append(kw)
        return AORecipeKwargs(config=float8.Float8LinearConfig(emulate=True, pad_inner_dim=True, enable_fsdp_float8_all_gather=flag))
    monkeypatch.setattr(distill_nb.trainer, 'check_fp8', lambda device: None)
    monkeypatch.setattr(distill_nb.trainer, 'AORecipeKwargs', recipe)
    tr = make(root, f'fp8-{flag}', mixed_precision='fp8', stages=[Stage('a', 3, alpha=.5)])
    was = {n: p.clone() for n,p in tr.names.items()}
    tr.fit()
    assert asked==[dict(enable_fsdp_float8_all_gather=False)] and any(isinstance(m, float8.float8_linear.Float8Linear) for m in tr.distiller.modules())
    still = {n for n,p in tr.names.items() if torch.equal(p, was[n])}
    assert {n.split('.')[2] for n in still}==({'layers'} if flag else set()), still
    if flag: return
    tr.save_student(root/'fp8-student')
    assert names_in(root/'fp8-student')=={n.removeprefix('student.') for n in was if n.startswith('student.')}

def test_8bit_adam_goes_on_from_a_checkpoint(root):
    "The optimizer of bitsandbytes itself, which emulates itself on a CPU, and for which `adamw8bit` therefore wants a GPU"
    eight = pytest.importorskip('bitsandbytes', reason='bitsandbytes is asked for by nothing here but adamw8bit: pip install bitsandbytes, and this runs').optim.AdamW8bit
    def run(name, callbacks=()):
        make_opt = lambda params, decay, betas: eight(decay_groups(params, decay), lr=0., betas=betas)
        return make(root, name, stages=[Stage('a', 6, lr=1e-3)], optimizer=make_opt, callbacks=callbacks)
    class Breaks(Callback):
        def after_step(self, tr):
            if tr.recorder.rows[-1]['step']==4: raise KeyboardInterrupt
    whole = run('eight')
    fit(whole)
    assert any(v.dtype==torch.uint8 for s in whole.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    with pytest.raises(KeyboardInterrupt): run('eight-broken', [Breaks()]).fit()
    again = run('eight-broken')
    assert 'resuming after step 3 of 6' in fit(again) and again.recorder.rows==whole.recorder.rows
    for n,p in whole.names.items(): assert torch.equal(again.names[n], p)

if __name__=='__main__': dict(kill=kill, two=two)[sys.argv[1]](Path(sys.argv[2]))

@pytest.mark.parametrize('codec,how,T', [('topk', dict(k=64, temperatures=(1, 2)), 2.), ('sampled', dict(nbytes=60), 1.), ('full', {}, 2.)])
def test_real_sparse_caches_train(codec, how, T, teacher, root, tmp_path):
    "Gradients from a cache of each kind point where those of the hidden states do; a temperature that it cannot serve is refused"
    rows = [o['meta'] for o in TeacherCache(root/'cache')]
    cache = build_cache(teacher, rows, tmp_path/'cache', codec, max_new_tokens=8, temperature=1., progress=False, **how)
    teacher.cache = TeacherCache(root/'cache')
    def grads(c):
        dist = Distiller(tiny(2, .02, 1), c, DistillationLoss(T, 1.))
        dist(c.collate([c[i] for i in range(16)]))['loss'].backward()
        return torch.cat([p.grad.flatten() for p in dist.parameters() if p.grad is not None])
    a,b = grads(cache),grads(teacher.cache)
    assert torch.cosine_similarity(a, b, 0)>dict(topk=.9, sampled=.5, full=.9999)[codec]
    if codec!='full':
        with pytest.raises(ValueError, match='temperature'):
            Distiller(tiny(2, .02, 1), cache, DistillationLoss(4., 1.))(cache.collate([cache[0]]))
