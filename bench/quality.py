#!/usr/bin/env python3
"""Held-out KL against CPU seconds: from the cache, and with TRL's GKD, whose teacher runs along.

usage: quality.py --trl FOLDER [--cache ablation/cache] [--layers 15 12 18] [--steps 48] [--train 64] [--judged 48] [--every 6]

FOLDER is where `pip install --no-deps --target FOLDER trl` put TRL. One teacher, one start, the same batches in the same order, one loop and one
optimizer; only the loss and what it costs differ: TRL's `GKDTrainer.compute_loss` with forward KL (beta 0) against the chunked loss from stored hidden
states. The cache is one that ablation.py made. Seconds are CPU time of the training steps, on one thread; evaluation is not counted, synthesis neither.
Scoring, which a cache needs once for texts that are there already, is measured and added in a second comparison, and in a third: students of all `--layers`
from one cache against as many online runs, each of them run to its end. The curves are those of the first. Writes quality.png and the section "Quality" of RESULTS.md.
"""
import argparse, json, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt, torch

from distill_nb.cache import TeacherCache
from distill_nb.shards import score_rows
from distill_nb.eval import evaluate
from distill_nb.loss import DistillationLoss
from distill_nb.student import freeze_below, prune_student
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher
from distill_nb.distiller import Distiller
from distill_nb.trainer import DistillTrainer, Stage
from loss import machine, write

LR = 4e-4

class GKD(Distiller):
    "TRL's loss, as its trainer calls it"
    def __init__(self, student, cache, loss, teacher):
        from trl.experimental.gkd import GKDTrainer
        super().__init__(student, cache, loss)
        self.own = SimpleNamespace(teacher_model=teacher, beta=0., generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
        self.f = GKDTrainer.compute_loss

    def forward(self, batch, n_tokens=None):
        y = batch['labels']
        n,x = (y!=-100).sum(), dict(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], labels=torch.cat([torch.full_like(y[:,:1], -100), y[:,:-1]], 1))
        loss = self.f(self.own, self.student, x)
        kl = loss.detach().expand(int(n))
        return dict(loss=loss*n/(n_tokens or n), kl=kl, agree=kl*0, logit=kl.sum(), n=int(n), feature=None)

class Clock:
    "CPU seconds of the steps, and the held-out KL from time to time"
    def __init__(self, cache, held, every): self.cache,self.held,self.every,self.spent,self.rows = cache,held,every,0.,[]

    def __call__(self, tr):
        self.spent += time.process_time()-self.start
        n = len(tr.recorder.rows)
        if n%self.every==0 or n==tr.total: self.note(n, tr.distiller.student)
        self.start = time.process_time()

    def note(self, n, student):
        self.rows.append((n, self.spent, evaluate(student, self.cache, self.held).kl))
        print('step {}: {:.1f} s, {:.3f} nats'.format(*self.rows[-1]), file=sys.stderr, flush=True)

def one(a):
    "A run in this process; prints its curve and, for ours, what scoring takes"
    torch.set_num_threads(1)
    cache = TeacherCache(a.cache)
    idx,held = cache.select(split='train')[:a.train],cache.select(split='heldout')[:a.judged]
    texts = [dict(input_ids=(e := cache[i])['input_ids'].tolist(), prompt_len=e['prompt_len']) for i in idx]
    teacher = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=torch.float32)
    student = freeze_below(prune_student(teacher, a.layers[0], texts[:8], 'influence'), 4)
    start = time.process_time()
    score_rows(teacher, texts)
    scoring = time.process_time()-start
    dist = GKD(student, cache, DistillationLoss(), teacher.model) if a.one=='gkd' else Distiller(student, cache, DistillationLoss())
    tmp,clock = tempfile.mkdtemp(),Clock(cache, held, a.every)
    clock.note(0, student)
    tr = DistillTrainer(dist, cache, [Stage(a.one, a.steps, lr=LR)], tmp, idx, device='cpu', save_every=10**6, progress=False, callbacks=[clock])
    clock.start = time.process_time()
    tr.fit()
    shutil.rmtree(tmp)
    print('\n'+json.dumps(dict(rows=clock.rows, scoring=scoring)))

def spawn(a, kind, layers, every):
    "A run in a process of its own"
    args = [sys.executable, __file__, '--one', kind, '--layers', str(layers), '--every', str(every)]
    args += [o for k in ('cache', 'steps', 'train', 'judged', 'trl') for o in (f'--{k}', str(getattr(a, k)))]
    return json.loads(subprocess.run(args, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])

def reached(rows, kl):
    "Seconds at which a curve first is at or below `kl`, on the line between two measurements"
    for (_,s0,k0),(_,s1,k1) in zip(rows, rows[1:]):
        if k1<=kl: return s0+(s1-s0)*(k0-kl)/(k0-k1)
    return float('inf')

def plot(res, extra):
    fig,ax = plt.subplots(figsize=(7, 4), layout='constrained')
    for k,rows,label in (('ours', res['ours'], 'from the cache'), ('ours', [(n, s+extra, o) for n,s,o in res['ours']], 'from the cache, scoring included'), ('gkd', res['gkd'], 'TRL GKD, teacher online')):
        ax.plot([s for _,s,_ in rows], [o for *_,o in rows], 'o--' if 'scoring' in label else 'o-', ms=3, label=label)
    ax.set(xlabel='CPU seconds of training', ylabel='held-out KL(teacher || student)\nnats per token', yscale='log')
    ax.legend()
    fig.savefig(Path(__file__).with_name('quality.png'), dpi=120)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--layers', type=int, nargs='+', default=[15, 12, 18])
    for k,v in dict(steps=48, train=64, judged=48, every=6).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--cache', default='ablation/cache')
    p.add_argument('--trl', required=True, help='folder that TRL was installed into')
    p.add_argument('--one', choices=('ours', 'gkd'), help=argparse.SUPPRESS)
    a = p.parse_args()
    sys.path.append(a.trl)
    if a.one: return one(a)
    runs = {n: {k: spawn(a, k, n, a.steps if i else a.every) for k in ('ours', 'gkd')} for i,n in enumerate(a.layers)}
    first = runs[a.layers[0]]
    res,extra = {k: o['rows'] for k,o in first.items()},first['ours']['scoring']
    ends = {n: {k: o['rows'][-1][1:] for k,o in r.items()} for n,r in runs.items()}
    ours,online = (sum(r[k][0] for r in ends.values()) for k in ('ours', 'gkd'))
    plot(res, extra)
    end = res['gkd'][-1]
    at = reached(res['ours'], end[2])
    bars = [('time_to_trls_final_KL', at/end[1], .65), ('with_scoring', (at+extra)/end[1], .8),
        (f'{len(ends)}_students_with_scoring', (ours+extra)/online, .7)]
    from importlib.metadata import version
    what = (f'The embedded teacher, {a.layers[0]} of its 30 layers, {a.steps} steps of 4 sequences, {a.steps*4/a.train:.2g} passes over {a.train} prompts, judged on {a.judged} held-out prompts, learning rate {LR:g}, one thread. '
        f'TRL {version("trl")} GKD ends at {end[2]:.3f} nats after {end[1]:.0f} CPU seconds, ours at {res["ours"][-1][2]:.3f} after {res["ours"][-1][1]:.0f} (and {extra:.0f} of scoring, once). Synthesis is in neither.')
    rows = ['| step | from the cache: s | nats | TRL GKD: s | nats |', '|---|---|---|---|---|'] + [f'| {n} | {s:.0f} | {k:.3f} | {t:.0f} | {q:.3f} |' for (n,s,k),(_,t,q) in zip(res['ours'], res['gkd'])]
    many = [f'{len(ends)} students from that cache, and as many online runs, each run to its end:\n', '| layers | from the cache: s | nats | TRL GKD: s | nats |', '|---|---|---|---|---|']
    many += ['| {} | {:.0f} | {:.3f} | {:.0f} | {:.3f} |'.format(n, *r['ours'], *r['gkd']) for n,r in ends.items()] + [f'| together, with {extra:.0f} s of scoring | {ours+extra:.0f} | | {online:.0f} | |']
    said = [f"BAR {n} {v:.2f} {lim} {'ok' if v<=lim else 'short'}" for n,v,lim in bars]
    text = '\n\n'.join(['## Quality', what, f'Machine: {machine()}.', '\n'.join(rows), '\n'.join(many), '![Held-out KL against CPU seconds](quality.png)', '```\n'+'\n'.join(said)+'\n```'])
    print(text)
    write(text)
    return 0 if all(v<=lim for _,v,lim in bars) else 1

if __name__=='__main__': sys.exit(main())
