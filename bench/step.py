#!/usr/bin/env python3
"""What the options of a training step cost and save: CPU seconds and peak memory of one optimizer step of four examples.

usage: step.py [--length 192] [--layers 20] [--steps 8] [--pairs 3] [--no-write] [--quick]

A student with SmolLM2-135M's widths learns from stored hidden states, on one thread, each variant in a fresh process, first to last by turns. Seconds are
medians of the steps after the first two; memory is the peak of resident memory during the steps (VmHWM) less what was resident before them. Ratios are to
bf16 as torch does it by itself. Writes the section "Step" of RESULTS.md; `--quick` takes a short text and two layers, and writes nothing. Linux with glibc only.
"""
import argparse, json, os, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

from distill_nb.loss import DistillationLoss
from distill_nb.synthesis import Head
from distill_nb.distiller import Distiller
from distill_nb.memory import kept_memory, plain_attention, recompute
from distill_nb.trainer import adamw
from loss import machine, status, write
from train import D, V, batch_of, student

VARIANTS = {'bf16': '', 'bf16, memory kept': 'kept', 'bf16, plain attention': 'plain', 'bf16, both': 'kept plain', 'both, examples one by one': 'kept plain accum',
    'both, blocks recomputed': 'kept plain recompute', 'both, all but products recomputed': 'kept plain selective', 'fp32': 'fp32', 'fp32, memory kept': 'fp32 kept', 'fp32, blocks recomputed': 'fp32 recompute',
    'fp32, all but products recomputed': 'fp32 selective'}

def one(a):
    "Several steps of one variant"
    torch.set_num_threads(1)
    want,model = a.one.split(),student(a.layers)
    head = Head(torch.randn(V, D, generator=torch.Generator().manual_seed(1))*3/D**.5)
    dist = Distiller(model, SimpleNamespace(head=head, gives='hidden', manifest=dict(layers=[])), DistillationLoss(1., 1.))
    if how := {'recompute', 'selective'}&set(want): recompute(model, 'selective' if 'selective' in how else True)
    opt,split = adamw(model.parameters()),[1]*4 if 'accum' in want else [4]
    window,seconds = [batch_of(B, a.length, 'hidden', head, 0) for B in split],[]
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    with ExitStack() as s:
        if 'kept' in want: s.enter_context(kept_memory())
        s.enter_context(plain_attention(model, 'plain' in want))
        for _ in range(a.steps):
            start = time.process_time()
            for b in window:
                with torch.autocast('cpu', torch.bfloat16, enabled='fp32' not in want): loss = dist(b, 4*a.length)['loss']
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            opt.zero_grad()
            seconds.append(time.process_time()-start)
    print(json.dumps(dict(s=median(seconds[2:]), mib=status('VmHWM')-before)))

def spawn(a, want):
    args = [sys.executable, __file__, '--length', str(a.length), '--layers', str(a.layers), '--steps', str(a.steps), '--one', want]
    out = subprocess.run(args, capture_output=True, text=True, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    return json.loads(out.stdout.splitlines()[-1])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(length=192, layers=20, steps=8, pairs=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--no-write', action='store_true', help='print only')
    p.add_argument('--quick', action='store_true', help='short and small, once, printed only')
    p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.quick: a.length,a.layers,a.steps,a.pairs,a.no_write = 16,2,3,1,True
    if a.one is not None: return one(a)
    runs = {k: [] for k in VARIANTS}
    for _ in range(a.pairs):
        for k,want in VARIANTS.items(): runs[k].append(spawn(a, want))
    res = {k: [median(r[o] for r in v) for o in ('s', 'mib')] for k,v in runs.items()}
    s0,m0 = res['bf16']
    what = f'One optimizer step of 4 examples of {a.length} tokens, {a.layers} layers, all positions are targets, one thread. Medians of {a.pairs} interleaved runs, each in a fresh process.'
    rows = ['| step | CPU s | MiB | time ratio | memory ratio |', '|---|---|---|---|---|']
    rows += [f'| {k} | {s:.2f} | {m:.0f} | {s/s0:.2f} | {m/m0:.2f} |' for k,(s,m) in res.items()]
    text = '\n\n'.join(['## Step', what, f'Machine: {machine()}.', '\n'.join(rows)])
    print(text)
    if not a.no_write: write(text)

if __name__=='__main__': sys.exit(main())
