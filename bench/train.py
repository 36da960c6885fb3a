#!/usr/bin/env python3
"""CPU seconds and peak memory of one optimizer step: distillation from a cache against plain cross-entropy fine-tuning.

usage: train.py [--batch 4] [--lengths 512 128] [--layers 10] [--k 50] [--pairs 3] [--trl FOLDER] [--distillkit FOLDER] [--no-write] [--quick]

A student with SmolLM2-135M's widths and a tied head, all positions are targets, fp32, one thread, each run in a fresh process. Targets are made
before the clock starts, as the cache of a teacher in bf16 would hold them, its head in bf16 too;
the product with it is then in bf16 where the processor has instructions for that, and beside it stands one in fp32, and one with selective recomputation
of activations, as one does of plain. With FOLDER, where `pip install --no-deps --target FOLDER trl` put TRL, also its GKD, the teacher of
30 layers online, without recomputation and with that of whole blocks, which is TRL's default, and its SFT; and with a checkout of
https://github.com/arcee-ai/DistillKit (whose trainer is a TRL one) its loss from stored log-probabilities.
Of these, `compute_loss` of the trainer is called as the trainer calls it. Prints a table, then one line per bar, writes both as the section "Train" of RESULTS.md, and exits 1 unless one setting, with recomputation
or without, holds all its bars and top-k its own. `--quick`
takes the shortest length and one pair, and writes nothing. Linux only.

Memory is the peak of resident memory during the first step (VmHWM) less what was resident before it. glibc is told (MALLOC_MMAP_THRESHOLD_) to give back
every block of 128 KiB or more as soon as it is freed, so that this is what the step holds, the same in each run, and not which holes of the heap it found.
Seconds are the median of three later steps, in memory that stays with the process, for every contender, as a `DistillTrainer` has it: the price of fresh pages changes from machine to machine and hour to hour.
"Kept" is the peak with these steps.
"""
import argparse, json, os, subprocess, sys, time
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_nb.divergences import top_k
from distill_nb.loss import DistillationLoss
from distill_nb.synthesis import Head
from distill_nb.distiller import Distiller
from distill_nb.memory import kept_memory, recompute
from distill_nb.trainer import adamw
from loss import machine, status, write

V,D = 49152,576
BARS = {'hidden': (1.12, .65), 'hidden, selective': (1.12, .65), 'hidden, fp32 product': (None, None), 'topk': (1., None)} # largest ratio to plain of time, and of memory
TRL_BARS = 1/1.6,1/3 # largest ratio of hidden, either way, to TRL's GKD without recomputation, of time and of memory

def student(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048)).train()

def batch_of(B, L, kind, head, k):
    "A batch as `cache.collate` makes it"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(V, (B, L), generator=g)
    hidden = torch.randn(B*L, D, generator=g).bfloat16()
    res = dict(input_ids=x, attention_mask=torch.ones_like(x), labels=x.roll(-1, 1), index=torch.arange(B))
    if kind=='hidden': return res | dict(teacher_hidden=hidden)
    parts = [top_k(head(o), k)[:3] for o in hidden.split(128)]
    ids,logits,tail = map(torch.cat, zip(*parts))
    return res | dict(teacher_topk=SimpleNamespace(ids=ids, logits=logits, tails=tail[:,None]))

def teacher_head(): return Head((torch.randn(V, D, generator=torch.Generator().manual_seed(1))*3/D**.5).bfloat16())

def text(b): return {k: b[k] for k in ('input_ids', 'attention_mask')} | dict(labels=b['input_ids'])

def gkd(model):
    "TRL's GKD, teacher online"
    from trl.experimental.gkd import GKDTrainer
    own = SimpleNamespace(teacher_model=student(30).requires_grad_(False), beta=0., generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
    return lambda b: GKDTrainer.compute_loss(own, model, text(b))

def sft(model):
    "TRL's fine-tuning on the text alone, with its fused head and its metrics"
    from trl import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head
    add_fused_lm_head(model, outputs=('log_probs', 'entropy', 'is_top1'))
    one = SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda o: o, num_processes=1)
    own = SimpleNamespace(model=model, accelerator=one, args=SimpleNamespace(loss_type='nll', average_tokens_across_devices=False, max_length=None),
        aux_loss_enabled=False, compute_loss_func=None, label_smoother=None, _metrics=dict(train=defaultdict(list)), _total_train_tokens=0, _tp_size=1)
    return lambda b: SFTTrainer.compute_loss(own, model, text(b))

def distillkit(model):
    "DistillKit's loss on stored log-probabilities; what they lack of 1 is one outcome more"
    from distillkit.lossfuncs.common import MissingProbabilityHandling
    from distillkit.lossfuncs.kl import KLDLoss
    from distillkit.signals import SparseSignal
    from distillkit.trainer import DistillationTrainer as theirs
    def signal(b, **kw): return SparseSignal(1., None, V, b['ids'], b['logprobs'], True)
    part,loss = SimpleNamespace(weight=1., function=SimpleNamespace(value='kl')),KLDLoss(1., MissingProbabilityHandling.SYMMETRIC_UNIFORM)
    conf = SimpleNamespace(loss_functions=[part], dataset=SimpleNamespace(eos_label_token_ids=None))
    own = SimpleNamespace(need_hidden_states=False, true_vocab_size=V, hidden_state_mapping=None, signal_source=SimpleNamespace(get_signal=signal),
        log=lambda d: None, config=conf, loss_functions=[loss])
    own.total_distillation_loss = lambda *args, **kw: theirs.total_distillation_loss(own, *args, **kw)
    def _f(b):
        ids,z,tail = b['teacher_topk'].ids,b['teacher_topk'].logits,b['teacher_topk'].tails
        v = z-torch.logaddexp(z.logsumexp(-1, keepdim=True), tail)
        rows = lambda o: o.view(*b['input_ids'].shape, -1)
        return theirs.compute_loss(own, model, text(b) | dict(ids=rows(ids), logprobs=rows(v)))
    return _f

PLAIN = 'plain','plain, selective'
PEERS = {'gkd': gkd, 'gkd, recomputed': gkd, 'sft': sft, 'distillkit': distillkit}

def step_fn(a, kind, model):
    "A function of (B, L) that prepares a step and returns it"
    if ',' in kind and 'product' not in kind: recompute(model, 'selective' if 'selective' in kind else True)
    if kind in PEERS:
        loss,gives = PEERS[kind](model),'topk' if kind=='distillkit' else 'hidden'
        make = lambda B, L: batch_of(B, L, gives, teacher_head(), a.k)
    elif kind in PLAIN:
        def loss(b): return model(input_ids=b['input_ids'], attention_mask=b['attention_mask'], labels=b['input_ids'], use_cache=False).loss
        make = lambda B, L: batch_of(B, L, 'hidden', None, a.k)
    else:
        head = teacher_head()
        codec = SimpleNamespace(temperatures=torch.tensor([1.]))
        gives,wide = kind.split(',')[0],torch.float32 if 'fp32' in kind else None
        dist = Distiller(model, SimpleNamespace(head=head, codec=codec, gives=gives, manifest=dict(layers=[])), DistillationLoss(1., 1.), teacher_dtype=wide)
        loss,make = lambda b: dist(b)['loss'], lambda B, L: batch_of(B, L, gives, head, a.k)
    opt = adamw(model.parameters())
    def prepare(B, L):
        b = make(B, L)
        def step():
            loss(b).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            opt.zero_grad()
        return step
    return prepare

def one(a):
    "A small step that makes the optimizer's state, one whose memory is measured, one that warms up, and three that are timed"
    torch.set_num_threads(1)
    prepare = step_fn(a, a.one, student(a.layers))
    prepare(1, 8)()
    step = prepare(a.batch, a.lengths[0])
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    step()
    peak = status('VmHWM')-before
    with kept_memory():
        step()
        spent = [time.process_time()]
        for _ in range(3):
            step()
            spent.append(time.process_time())
        kept = status('VmHWM')-before
    print(json.dumps(dict(s=median(b-a for a,b in zip(spent, spent[1:])), mib=peak, kept=kept)))

def spawn(a, kind, length):
    args = [sys.executable, __file__, '--batch', str(a.batch), '--lengths', str(length), '--layers', str(a.layers), '--k', str(a.k), '--one', kind]
    for k in ('trl', 'distillkit'): args += [f'--{k}', getattr(a, k)] if getattr(a, k) else []
    out = subprocess.run(args, capture_output=True, text=True, check=True, env=os.environ|dict(OMP_NUM_THREADS='1', MALLOC_MMAP_THRESHOLD_=str(2**17)))
    return json.loads(out.stdout.splitlines()[-1])

def measure(a, length):
    "Medians of interleaved runs: `{contender: (CPU seconds, MiB, MiB in kept memory)}`"
    runs = {k: [] for k in (*PLAIN, *BARS, *(['gkd', 'gkd, recomputed', 'sft'] if a.trl else []), *(['distillkit'] if a.distillkit else []))}
    for _ in range(a.pairs):
        for k in runs: runs[k].append(spawn(a, k, length))
    return {k: tuple(median(r[o] for r in v) for o in ('s', 'mib', 'kept')) for k,v in runs.items()}

def bars(a, length, res):
    "Contender, name, value and limit of each bar of one length"
    s0,m0,_ = res['plain']
    found = [(k, what, v, lim) for k,lims in BARS.items() for what,v,lim in zip(('time', 'memory'), (res[k][0]/s0, res[k][1]/m0), lims) if lim]
    found += [(k, f'{what}_of_gkd', h/g, lim) for k in ('hidden', 'hidden, selective') if a.trl for what,h,g,lim in zip(('time', 'memory'), res[k], res['gkd'], TRL_BARS)]
    return [(k, f"{k.replace(', ', '_')}_{what}_{a.batch}x{length}", v, lim) for k,what,v,lim in found]

def table(a, length, res):
    (s0,m0,k0),head = res['plain'],[f'| {a.batch} x {length} | CPU s | MiB | kept | time ratio | memory ratio | kept ratio |', '|---|---|---|---|---|---|---|']
    return '\n'.join(head + [f'| {n} | {s:.2f} | {m:.0f} | {k:.0f} | {s/s0:.2f} | {m/m0:.2f} | {k/k0:.2f} |' for n,(s,m,k) in res.items()])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(batch=4, layers=10, k=50, pairs=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--lengths', type=int, nargs='+', default=[512, 128])
    p.add_argument('--trl', help='folder that TRL was installed into')
    p.add_argument('--distillkit', help='a checkout of DistillKit; needs --trl')
    p.add_argument('--no-write', action='store_true', help='print only')
    p.add_argument('--quick', action='store_true', help='the shortest length, one pair, printed only')
    p.add_argument('--one', choices=(*PLAIN, *BARS, *PEERS), help=argparse.SUPPRESS)
    a = p.parse_args()
    sys.path += [o for o in (a.trl, a.distillkit) if o]
    if a.one: return one(a)
    if a.quick: a.pairs,a.lengths,a.no_write = 1,[min(a.lengths)],True
    size = sum(o.numel() for o in student(a.layers).parameters())/1e6
    what = f'One optimizer step, {a.layers} layers, {size:.1f} M parameters, all positions are targets, k = {a.k}, fp32, one thread. Medians of {a.pairs} interleaved runs, each in a fresh process and the median of three steps. Bars are against a plain step and a GKD that recompute nothing.'
    floor = f'The gradients alone are {size*4e6/2**20:.0f} MiB, and {V*D*4/2**20:.0f} more where the weight that embedding and head share makes two.'
    res = {n: measure(a, n) for n in a.lengths}
    found = [o for n in a.lengths for o in bars(a, n, res[n])]
    said = '\n'.join(f"BAR {n} {v:.2f} {lim:.2f} {'ok' if v<=lim else 'short'}" for _,n,v,lim in found)
    held = {k for k,*_ in found}-{k for k,_,v,lim in found if v>lim}
    text = '\n\n'.join(['## Train', f'{what} {floor}', f'Machine: {machine()}.', *[table(a, n, o) for n,o in res.items()], f'```\n{said}\n```'])
    print(f"{text}\n\nheld at every length by {' and by '.join(sorted(held)) or 'none'}")
    if not a.no_write: write(text)
    return 0 if 'topk' in held and len(held)>1 else 1

if __name__=='__main__': sys.exit(main())
