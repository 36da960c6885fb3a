#!/usr/bin/env python3
"""What a student loses whose teacher was kept by the codec `transform`, at several numbers of nats, against bf16 hidden states.

usage: transform.py [--out build/transform] [--nats .01 .05 .2] [--layers 20] [--refit 64] [--steps 40] [--seeds 3] [--train 160] [--judged 48] [--no-write]

Teacher, students, texts, order and judging are those of ablation.py; the runs of a seed differ in the store alone. Each run is kept as a file in
`--out`, and a second call goes on where the first was stopped. Writes the section "Transform" of RESULTS.md, with one line per bar,
`BAR name value limit ok|short`; exits 1 if one is short. The time to read a batch from each store stands beside it, and its share of a step. Intervals are over prompts, the seeds of a prompt together, paired with bf16.
"""
import argparse, contextlib, sys, time
from pathlib import Path

import torch
from ablation import TOKENS, Ablation, together
from cache import said
from loss import machine, write

from distill_nb.cache import TeacherCache
from distill_nb.eval import better

SPLITS,LIMIT = ('heldout', 'ood'),.01

class Stores(Ablation):
    def runs(self):
        "Name to a function of the seed, as in ablation.py"
        kept = {f'{n:g} nats': (lambda seed, n=n: self.stored(f'{n:g}', seed, codec='transform', nats=n)) for n in self.a.nats}
        return {'bf16': lambda seed: self.plain(seed)} | kept

    def kept(self):
        "KL(teacher || store) at T=1, and CPU seconds of reading a batch of four, of each store"
        at = {'bf16': self.out/'cache'} | {f'{n:g} nats': self.out/f'store-{n:g}' for n in self.a.nats}
        return {k: (TeacherCache(p).fidelity(self.teacher, 32, (1,))[1], self.reading(TeacherCache(p))) for k,p in at.items()}

    def reading(self, cache):
        cache.stats() # opens and verifies every shard
        batches = torch.randperm(self.a.train, generator=torch.Generator().manual_seed(0)).split(4)
        start = time.process_time()
        for b in batches: cache.collate([cache[i] for i in b.tolist()])
        return (time.process_time()-start)/len(batches)

def worse(runs, base, split):
    "KL of the students from a store less that of those from bf16: mean, and the ends of its interval"
    d = better(together(runs, split), together(base, split))
    return -d['diff'],-d['high'],-d['low']

def table(before, res, kept):
    lines = ['| store | nats measured | reading a batch, ms | '+' | '.join(f'KL, {s} | worse by (95%)' for s in SPLITS)+' |', '|---'*7+'|',
        '| student before | | | '+' | '.join(f'{together([before], s).kl:.3f} | ' for s in SPLITS)+' |']
    for n,runs in res.items():
        cells = [f'{together(runs, s).kl:.3f} | '+('' if n=='bf16' else '{:+.4f} ({:+.4f} to {:+.4f})'.format(*worse(runs, res['bf16'], s))) for s in SPLITS]
        lines.append(f'| {n} | {kept[n][0]:.1e} | {kept[n][1]*1e3:.1f} | '+' | '.join(cells)+' |')
    return '\n'.join(lines)

def bars(a, res, kept):
    "Name, value, limit: at 1e-2 nats no student is worse by more than that, and reading takes at most a hundredth of a step"
    for n,runs in res.items():
        if n=='0.01 nats': yield from ((f'{n} worse on {s}', worse(runs, res['bf16'], s)[0], LIMIT) for s in SPLITS)
        yield f'{n} reading over a step',kept[n][1]*a.steps/min(r['cpu_s'] for r in runs),.01

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(layers=20, refit=64, steps=40, seeds=3, train=160, judged=48).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--nats', type=float, nargs='+', default=[.01, .05, .2])
    p.add_argument('--out', default='build/transform')
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    a.only = None
    torch.set_num_threads(1)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        runs = Stores(a)
        before,res = runs.all()
        kept = runs.kept()
    what = (f'The embedded teacher, {a.layers} of its 30 layers, gaps refitted on {a.refit} answers, {a.steps} steps of 4 sequences (responses of at most {TOKENS} tokens), {a.seeds} seeds, judged on '
        f'{a.judged} held-out prompts and {a.judged} out of distribution, against the teacher itself. The runs of a seed differ in the store alone. KL(teacher || student) at T=1, nats per target token.')
    fine,bar = said(bars(a, res, kept))
    text = '\n\n'.join(['## Transform', what, f'Machine: {machine()}.', table(before, res, kept), bar])
    print(text)
    if not a.no_write: write(text)
    return 0 if fine else 1

if __name__=='__main__': sys.exit(main())
