#!/usr/bin/env python3
"""What torch.compile does to the losses on a CPU: forward plus backward, one thread, one process.

usage: compile.py [--tokens 512] [--hidden 576] [--vocab 49152] [--pairs 3] [--no-write]

Prints a Markdown table, and writes it as the section "Compiled" of RESULTS.md beside this file. Inductor needs a C++ compiler.
"""
import argparse, time
from statistics import median

import torch, torch.nn.functional as F

from distill_nb.loss import forward_kl, linear_divergence
from loss import T, inputs, machine, sparse, write

def contenders(a):
    "Losses of `(h, W, target)`, each with its target"
    h,S,hT,Te,y = inputs(a)
    full,kept = Te(hT).detach(),sparse(hT, Te, 50)
    def chunked(target): return linear_divergence(h, S, target, T).loss
    def dense(target): return T**2*forward_kl(S(h), target, T).sum()
    def plain(target): return F.cross_entropy(S(h), target, reduction='sum')
    return {"ours, teacher's hidden states and head": (chunked, (hT,Te)), 'ours, stored dense logits': (chunked, full), 'ours, top-k with bucket': (chunked, kept),
        'forward_kl on full logits': (dense, full), 'plain cross-entropy': (plain, y)}

def seconds(f, target):
    start = time.process_time()
    loss = f(target)
    loss.backward()
    return time.process_time()-start,loss.item()

def measure(f, target, pairs):
    "Seconds to compile and run once, medians as written and compiled, graphs that it fell into, and how far the losses are apart"
    torch._dynamo.reset()
    fast,start = torch.compile(f),time.perf_counter()
    seconds(fast, target)
    first = time.perf_counter()-start
    slow,comp = zip(*((seconds(f, target), seconds(fast, target)) for _ in range(pairs)))
    parts = torch._dynamo.explain(f)(target)
    return first,median(o[0] for o in slow),median(o[0] for o in comp),parts.graph_count,abs(comp[0][1]/slow[0][1]-1)

def row(name, f, target, pairs):
    try: first,a,b,n,off = measure(f, target, pairs)
    except Exception as e: return f'| {name} | | | | not compiled: {type(e).__name__}: {" ".join(str(e).split())[:120]} | | |'
    return f'| {name} | {a:.2f} | {b:.2f} | {b/a:.2f} | {first:.0f} | {n} | {off:.0e} |'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(tokens=512, hidden=576, vocab=49152, pairs=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    torch.set_num_threads(1)
    head = ['| loss | s, as written | s, compiled | ratio | s, first call | graphs | losses off by |', '|---|---|---|---|---|---|---|']
    rows = [row(k, *o, a.pairs) for k,o in contenders(a).items()]
    what = f'`torch.compile` against the same function as written: forward plus backward, {a.tokens:,} tokens, hidden {a.hidden:,}, vocabulary {a.vocab:,}, T = {T:g}, fp32, one thread, CPU time; medians of {a.pairs} interleaved runs. The first call compiles.'
    why = 'A ratio above 1 is slower. The loop of ours works in place in buffers of its own, and falls into several graphs with copies between them; a textbook loss is one graph.'
    text = '\n\n'.join(['## Compiled', what + ' ' + why, f'Machine: {machine()}.', '\n'.join(head + rows)])
    print(text)
    if not a.no_write: write(text)

if __name__=='__main__': main()
