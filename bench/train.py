#!/usr/bin/env python3
"""CPU seconds and peak memory of one optimizer step: distillation from a cache against plain cross-entropy fine-tuning.

usage: train.py [--batch 4] [--lengths 512 128] [--layers 10] [--k 50] [--pairs 3] [--quick]

A student with SmolLM2-135M's widths and a tied head, all positions are targets, fp32, one thread, each run in a fresh process. Targets are made
before the clock starts, as a cache would hold them. Prints a table, then one line per bar, and exits 1 where one is short. `--quick` takes the
shortest length and one pair. Memory is the peak of resident memory during the step (VmHWM) less what was resident before it. Linux only.
"""
import argparse, json, os, subprocess, sys, time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_nb.divergences import top_k
from distill_nb.loss import DistillationLoss
from distill_nb.synthesis import Head
from distill_nb.trainer import Distiller, adamw
from loss import machine, status

V,D = 49152,576
BARS = dict(hidden=(1.12, .65), topk=(1., None)) # largest ratio to plain of time, and of memory

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

def step_fn(a, kind, model):
    "A function of (B, L) that prepares a step and returns it"
    if kind=='plain':
        def loss(b): return model(input_ids=b['input_ids'], attention_mask=b['attention_mask'], labels=b['input_ids'], use_cache=False).loss
        make = lambda B, L: batch_of(B, L, 'hidden', None, a.k)
    else:
        head = Head(torch.randn(V, D, generator=torch.Generator().manual_seed(1))*3/D**.5)
        codec = SimpleNamespace(temperatures=torch.tensor([1.]))
        dist = Distiller(model, SimpleNamespace(head=head, codec=codec, gives=kind, manifest=dict(layers=[])), DistillationLoss(1., 1.))
        loss,make = lambda b: dist(b)['loss'], lambda B, L: batch_of(B, L, kind, head, a.k)
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
    "A small step that makes the optimizer's state, then the measured one"
    torch.set_num_threads(1)
    prepare = step_fn(a, a.one, student(a.layers))
    prepare(1, 8)()
    step = prepare(a.batch, a.lengths[0])
    Path('/proc/self/clear_refs').write_text('5')
    before,start = status('VmRSS'),time.process_time()
    step()
    print(json.dumps(dict(s=time.process_time()-start, mib=status('VmHWM')-before)))

def spawn(a, kind, length):
    args = [sys.executable, __file__, '--batch', str(a.batch), '--lengths', str(length), '--layers', str(a.layers), '--k', str(a.k), '--one', kind]
    out = subprocess.run(args, capture_output=True, text=True, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    return json.loads(out.stdout.splitlines()[-1])

def measure(a, length):
    "Medians of interleaved runs: `{contender: (CPU seconds, MiB)}`"
    runs = {k: [] for k in ('plain', *BARS)}
    for _ in range(a.pairs):
        for k in runs: runs[k].append(spawn(a, k, length))
    return {k: tuple(median(r[o] for r in v) for o in ('s','mib')) for k,v in runs.items()}

def report(a, length, res):
    "Table and bars of one length; returns whether all bars hold"
    (s0,m0),ok = res['plain'],True
    print(f'| {a.batch} x {length} | CPU s | MiB | time ratio | memory ratio |\n|---|---|---|---|---|')
    for k,(s,m) in res.items(): print(f'| {k} | {s:.2f} | {m:.0f} | {s/s0:.2f} | {m/m0:.2f} |')
    print()
    for k,limits in BARS.items():
        for what,value,limit in zip(('time', 'memory'), (res[k][0]/s0, res[k][1]/m0), limits):
            if limit is None: continue
            ok &= value<=limit
            print(f"BAR {k}_{what}_{a.batch}x{length} {value:.2f} {limit} {'ok' if value<=limit else 'short'}")
    print(flush=True)
    return ok

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(batch=4, layers=10, k=50, pairs=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--lengths', type=int, nargs='+', default=[512, 128])
    p.add_argument('--quick', action='store_true', help='the shortest length, one pair')
    p.add_argument('--one', choices=('plain', *BARS), help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: return one(a)
    if a.quick: a.pairs,a.lengths = 1,[min(a.lengths)]
    print(f'One optimizer step, {a.layers} layers, {sum(o.numel() for o in student(a.layers).parameters())/1e6:.1f} M parameters, k = {a.k}. Machine: {machine()}.\n')
    return 0 if all([report(a, n, measure(a, n)) for n in a.lengths]) else 1

if __name__=='__main__': sys.exit(main())
