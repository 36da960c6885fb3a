#!/usr/bin/env python3
"""Does a run need the memory that `distill plan` states, and cost its projections what it says? On the demo's pair, on the CPU.

usage: plan.py [--demo demo] [--prompts 12] [--steps 2] [--rows 64] [--no-write] [--quick]

Teacher: the demo's own writes answers to the longest `--prompts` of its training prompts, into a cache. Student: the start of a finished demo (`make demo`, for
its folder) trains on the four longest examples. Each is a fresh process, and its growth (VmHWM less what was resident before the model was loaded, libraries included) is compared with the sum of the plan.
Projections: the parts of a training step of the preset `low_latency` at their true widths, `--rows` tokens, all of them targets: one block with activation checkpointing (times
the student's blocks), the loss against both heads (on a sixteenth of the vocabulary, times sixteen), and one projection (times two). Its share is also the FLOP ratio of `projection_cost`.
Writes the section "Plan" of RESULTS.md, ends with lines `BAR name value limit ok|short`, and exits 1 where one is short; `--quick` measures the projections at an
eighth of their widths, and writes nothing. One thread, Linux only.
"""
import argparse, ctypes, json, os, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill_nb.cache import TeacherCache, build_cache
from distill_nb.config import preset
from distill_nb.loss import hidden_loss, linear_divergence
from distill_nb.plan import projection_cost, shape, student_memory, teacher_memory
from distill_nb.projection import ProjectionHead
from distill_nb.pipeline import codec, prompt_rows
from distill_nb.student import freeze_below
from distill_nb.synthesis import Head, TeacherSynthesizer, embedded_teacher, fast_dtype
from distill_nb.distiller import Distiller
from distill_nb.trainer import DistillTrainer, Stage
from loss import machine, status, write

def sums(parts, before, length):
    "Planned parts and the measured growth, in GB"
    return dict(parts={k: v/1e9 for k,v in parts.items() if v}, planned=sum(parts.values())/1e9, measured=(status('VmHWM')-before)*2**20/1e9, length=length)

def small():
    "A random model of the demo's vocabulary: using it first loads what torch loads late"
    size = dict(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**size, eos_token_id=2, pad_token_id=2))

def teacher(a):
    "Answer the longest prompts"
    tok = AutoTokenizer.from_pretrained(embedded_teacher())
    first = TeacherSynthesizer(small().to(fast_dtype()), tokenizer=tok, device='cpu')
    with tempfile.TemporaryDirectory() as out: build_cache(first, ['Name a fruit.'], out, max_new_tokens=4, progress=False)
    ctypes.CDLL(None).malloc_trim(0)
    config,before = preset('demo'),status('VmRSS')
    rows = [r for r in prompt_rows(config.prompts) if r['split']=='train'][-a.prompts:]
    g = config.teacher.synthesis
    g.batch_size = len(rows)
    t = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=fast_dtype())
    with tempfile.TemporaryDirectory() as out:
        cache = build_cache(t, rows, out, **codec(config), max_new_tokens=g.max_new_tokens, temperature=g.temperature, batch_size=g.batch_size, progress=False)
        starts = [cache[i]['prompt_len'] for i in range(len(cache))]
        length = max(starts) + max(n-p for n,p in zip(cache.lengths(), starts))
    return sums(teacher_memory(config, length, fast_dtype().itemsize), before, length)

def student(a):
    "Train on the longest examples"
    config,cache,before = preset('demo'),TeacherCache(a.demo/'cache'),status('VmRSS')
    lens = cache.lengths()
    idx = sorted(cache.select(split='train'), key=lambda i: -lens[i])[:config.training.memory.batch_size]
    model = freeze_below(AutoModelForCausalLM.from_pretrained(a.demo/'start', dtype=torch.float32), config.student.freeze_below)
    stage = Stage('bench', a.steps, config.training.optimizer.lr)
    with tempfile.TemporaryDirectory() as out:
        DistillTrainer(Distiller(model, cache, stage.loss()), cache, [stage], out, idx, len(idx), progress=False, device='cpu').fit()
    return sums(student_memory(config, lens[idx[0]], bf16=False), before, lens[idx[0]])

def seconds(f, n=3):
    "Least CPU seconds of a few calls"
    def once():
        start = time.process_time()
        f()
        return time.process_time()-start
    return min(once() for _ in range(n))

def block(c, x):
    "Forward and backward pass of one block, recomputed"
    c.num_hidden_layers,c.vocab_size = 1,8
    model = AutoModelForCausalLM.from_config(c).model.train()
    model.activation_checkpointing_enable()
    return lambda: model(inputs_embeds=x[None], use_cache=False).last_hidden_state.sum().backward()

def projection(a):
    "Seconds of the parts of a step of `low_latency`"
    torch.manual_seed(0)
    c,t = preset('low_latency'),shape(preset('low_latency').teacher.model_id)
    s,p = shape(c.student.model_id),c.student.projection
    ds,dt,V,n = s.hidden_size//a.shrink,t.hidden_size//a.shrink,s.vocab_size//16,s.num_hidden_layers
    x,y = torch.randn(a.rows, ds, requires_grad=True),torch.randn(a.rows, dt)
    heads = torch.nn.Linear(ds, V, bias=False),Head(torch.randn(V, dt)/dt**.5)
    head = ProjectionHead(dt, ds, p.use_layernorm, 'student_to_teacher')
    for k in ('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_key_value_heads'): setattr(s, k, getattr(s, k)//a.shrink)
    loss = lambda: linear_divergence(x, heads[0], (y, heads[1]), c.training.loss.temperature).loss.backward()
    parts = dict(blocks=n*seconds(block(s, x)), loss=16*seconds(loss), projections=p.n_layers*seconds(lambda: hidden_loss(head(x), y).mean().backward()))
    return dict(parts=parts, share=parts['projections']/(parts['blocks']+parts['loss']), flops=projection_cost(c))

PARTS = dict(teacher=teacher, student=student, projection=projection)

def spawn(a, part):
    args = [sys.executable, __file__, '--one', part, '--demo', str(a.demo), *[o for k in ('prompts', 'steps', 'rows', 'shrink') for o in (f'--{k}', str(getattr(a, k)))]]
    out = subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    return json.loads(out.stdout.splitlines()[-1])

def section(a, res):
    "The section of RESULTS.md"
    rows = ['| | planned, GB | measured, GB | largest parts of the plan |', '|---|---|---|---|']
    for k,what in dict(teacher=f'teacher writes {a.prompts} answers', student='student trains').items():
        if k not in res: continue
        o = res[k]
        most = ', '.join(f"{n.replace('_', ' ')} {v:.2f}" for n,v in sorted(o['parts'].items(), key=lambda i: -i[1])[:3])
        rows.append(f"| {what}, sequences of up to {o['length']} tokens | {o['planned']:.2f} | {o['measured']:.2f} | {most} |")
    p = res['projection']
    share = f"A step of `low_latency`, seconds: {', '.join(f'{k} {v:.2f}' for k,v in p['parts'].items())}. The projections are {p['share']:.2%} of the rest; by operations {p['flops']:.2%}."
    return '\n\n'.join(['## Plan', "Growth of a process on the demo's pair, against `distill plan` for the same lengths; and the projections of the preset `low_latency`, by the clock. One thread.",
        f'Machine: {machine()}.', *['\n'.join(rows)]*(len(rows)>2), share])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--demo', type=Path, default=Path('demo'))
    for k,v in dict(prompts=12, steps=2, rows=64).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--shrink', type=int, default=1, help=argparse.SUPPRESS)
    p.add_argument('--no-write', action='store_true', help='print only')
    p.add_argument('--quick', action='store_true', help='projections only, narrow, printed only')
    p.add_argument('--one', choices=PARTS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return print(json.dumps(PARTS[a.one](a)))
    if a.quick: a.shrink,a.rows,a.no_write = 8,32,True
    res = {k: spawn(a, k) for k in PARTS if not a.quick or k=='projection'}
    bars = [(f'plan_memory_error_{k}', abs(res[k]['planned']/res[k]['measured']-1), .2) for k in ('teacher', 'student') if k in res]
    bars += [('projection_share', res['projection']['share'], .02)] if not a.quick else []
    text = section(a, res)
    print(text)
    said = [f"BAR {n} {v:.3f} {lim:.2f} {'ok' if v<=lim else 'short'}" for n,v,lim in bars]
    if not a.no_write: write(text+'\n\n```\n'+'\n'.join(said)+'\n```')
    print('\n'.join(said))
    return int(any(v>lim for _,v,lim in bars))

if __name__=='__main__': sys.exit(main())
