#!/usr/bin/env python3
"""What each technique is worth: one teacher, one start, the same number of steps on the same prompts, three seeds.

usage: ablation.py [--out ablation] [--layers 15] [--refit 64] [--steps 30] [--seeds 3] [--train 160] [--judged 48] [--only NAME ...] [--report] [--no-write]

The embedded teacher and a student of its own blocks (by block influence, the gaps refitted on `--refit` answers; the four lowest blocks and the embeddings
stay as they start, where no other plan is named). Each run is kept as a file in `--out`, and a second call goes on where the first was stopped. At the end
the table is printed, and written as the section "Ablation" of RESULTS.md beside this file. Intervals are over prompts, the seeds of a prompt together, paired
with `logits`. With OMP_NUM_THREADS=1 two calls with different `--only` can work side by side once the cache is there; `--report` makes their table.
"""
import argparse, contextlib, os, shutil, sys, time
from pathlib import Path

import torch

from distill_nb.cache import build_cache
from distill_nb.files import load_json, save_json
from distill_nb.eval import Scores, better, evaluate
from distill_nb.loss import DistillationLoss
from distill_nb.projection import ProjectionHead, map_layers
from distill_nb.relations import capture_qkv, relation_loss
from distill_nb.stages import on_policy, score_cache, self_distill
from distill_nb.student import add_lora, freeze_below, merge_lora, prune_student, refit_gaps
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, load_prompts
from distill_nb.distiller import Distiller
from distill_nb.trainer import DistillTrainer, Stage
from loss import machine, write

LR,TOKENS = 4e-4,48

class Relations(Distiller):
    "Beside the logits, relations of the last block's queries, keys and values; the teacher runs along"
    def __init__(self, student, cache, loss, teacher, share=.3):
        super().__init__(student, cache, loss)
        self.asked,self.share = [teacher],share # in a list, so that its weights are not ours

    def forward(self, batch, n_tokens=None):
        with capture_qkv(self.student, -1) as s: out = super().forward(batch, n_tokens)
        x,mask,t = batch['input_ids'],batch['attention_mask'],self.asked[0]
        with capture_qkv(t.model, -1) as q: t.score(x, mask)
        rel = sum(relation_loss(s[k], q[k], 3, mask).sum() for k in 'qkv')
        w = (out['loss']/rel).detach()
        return out | dict(loss=(1-self.share)*out['loss'] + self.share*w*rel)

class Ablation:
    def __init__(self, a):
        self.a,self.out = a,Path(a.out)
        self.teacher = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=torch.float32)
        rows = [dict(r) for s,n in (('train', a.train), ('heldout', a.judged), ('ood', a.judged)) for r in load_prompts(s, n)]
        self.pairs = {s: map_layers(30, a.layers)[s] for s in (a.layers//2, a.layers)}
        self.cache = build_cache(self.teacher, rows, self.out/'cache', layers=sorted(self.pairs.values()), max_new_tokens=TOKENS)
        self.idx = self.cache.select(split='train')
        self.asked = [r for r in rows if r['split']=='train']
        exs = [dict(input_ids=(e := self.cache[i])['input_ids'].tolist(), prompt_len=e['prompt_len']) for i in self.idx[:a.refit]]
        self.start = refit_gaps(self.teacher.model, prune_student(self.teacher, a.layers, exs[:32], 'influence'), exs).state_dict()

    def student(self, frozen=4):
        s = prune_student(self.teacher, self.a.layers, [], 'uniform')
        s.load_state_dict(self.start)
        return freeze_below(s, frozen)

    def fit(self, dist, name, steps, seed, cache=None, lr=LR, **kw):
        "Train for a stage, and leave no checkpoint behind"
        c,tmp = cache or self.cache,self.out/f'run-{name}-{seed}-{os.getpid()}'
        shutil.rmtree(tmp, ignore_errors=True)
        tr = DistillTrainer(dist, c, [Stage(name, steps, lr=lr, **kw)], tmp, self.idx if c is self.cache else None, device='cpu', seed=seed,
            save_every=10**6, progress=False)
        rows = tr.fit().rows
        shutil.rmtree(tmp, ignore_errors=True)
        return sum(r['n_tokens'] for r in rows)

    def plain(self, seed, frozen=4, name='plain', **kw):
        s = self.student(frozen)
        return s, self.fit(Distiller(s, self.cache, DistillationLoss()), name, self.a.steps, seed, **kw)

    def heads(self): return {s: (t, ProjectionHead(576, 576, direction='student_to_teacher')) for s,t in self.pairs.items()}

    def features(self, seed):
        s = self.student()
        return s, self.fit(Distiller(s, self.cache, DistillationLoss(), self.heads()), 'features', self.a.steps, seed, alpha=.7)

    def relations(self, seed):
        s = self.student()
        return s, self.fit(Relations(s, self.cache, DistillationLoss(), self.teacher), 'relations', self.a.steps, seed)

    def stored(self, name, seed, **codec):
        "From the same texts, kept in another way"
        exs = [self.cache[i] for i in self.idx]
        texts = [dict(input_ids=e['input_ids'].tolist(), prompt_len=e['prompt_len']) for e in exs]
        c,s = score_cache(self.teacher, [e['meta'] for e in exs], texts, self.out/f'store-{name}', **codec),self.student()
        return s, self.fit(Distiller(s, c, DistillationLoss()), name, self.a.steps, seed, c)

    def lora(self, seed):
        s = add_lora(self.student(0), from_block=4)
        n = self.fit(Distiller(s, self.cache, DistillationLoss()), 'lora', self.a.steps, seed, lr=5*LR)
        return merge_lora(s), n

    def stages(self, seed):
        "Logits, then features, then itself"
        s,third,own = self.student(),self.a.steps//3,self.out/f'own-{seed}'
        n = self.fit(Distiller(s, self.cache, DistillationLoss()), 'first', self.a.steps-2*third, seed)
        n += self.fit(Distiller(s, self.cache, DistillationLoss(), self.heads()), 'second', third, seed+100, alpha=.7)
        n += self.fit(self_distill(s, self.cache, own, DistillationLoss(), self.idx), 'third', third, seed+200)
        shutil.rmtree(own)
        return s, n

    def on_policy(self, seed):
        s,third,own = self.student(),self.a.steps//3,self.out/f'policy-{seed}'
        n = self.fit(Distiller(s, self.cache, DistillationLoss()), 'teacher', self.a.steps-third, seed)
        ask = [self.asked[i] for i in torch.randperm(len(self.asked), generator=torch.Generator().manual_seed(seed))[:4*third].tolist()]
        c = on_policy(s, self.teacher, ask, own, TOKENS, seed=seed)
        n += self.fit(Distiller(s, c, DistillationLoss()), 'policy', third, seed, c)
        shutil.rmtree(own)
        return s, n

    def runs(self):
        "Name to a function of the seed that returns a student and the target tokens it was trained on"
        part = lambda **kw: lambda seed: self.plain(seed, **kw)
        kept = {f'transform, {n:g} nats': dict(codec='transform', nats=n) for n in (.01, .05, .5)} | {'top-k 64': dict(codec='topk', k=64), 'sampled': dict(codec='sampled')}
        return {'logits': part(), 'cross-entropy': part(targets='text'), 'T = 2': part(temperature=2.), 'T = 4': part(temperature=4.),
            'reverse KL': part(divergence='reverse_kl'), 'features': self.features, 'relations': self.relations, 'nothing frozen': part(frozen=0),
            'unfreezing': part(frozen=0, unfreeze=[(0., 5), (.3, 10), (.6, 'all')]), 'three stages': self.stages,
            'on-policy round': self.on_policy, 'LoRA': self.lora} | {n: (lambda seed, n=n, o=o: self.stored(n.replace(' ', '_'), seed, **o)) for n,o in kept.items()}

    def judge(self, model): return {s: evaluate(model, self.cache, self.cache.select(split=s)).to_dict() for s in ('heldout', 'ood')}

    def one(self, name, f, seed):
        p = self.out/f"{name.replace(' ', '_')}-{seed}.json"
        if p.exists(): return load_json(p)
        start = time.process_time()
        model,n = f(seed)
        spent = time.process_time()-start
        save_json(dict(name=name, seed=seed, tokens=n, cpu_s=spent, sets=self.judge(model.eval())), p)
        print(f"{name}, seed {seed}: {n} tokens, {spent:.0f} s, KL {Scores.from_dict(load_json(p)['sets']['heldout']).kl:.3f}", flush=True)
        return load_json(p)

    def all(self):
        p,runs = self.out/'before.json',self.runs()
        if not p.exists(): save_json(dict(name='before', sets=self.judge(self.student(0).eval())), p)
        names = self.a.only or list(runs)
        res = {n: [] for n in names}
        for seed in range(self.a.seeds):
            for n in names: res[n].append(self.one(n, runs[n], seed))
        return load_json(p),res

def found(out, seeds):
    "What is there, without running anything: the runs that have all seeds"
    by = {}
    for o in map(load_json, sorted(Path(out).glob('*-[0-9].json'))): by.setdefault(o['name'], {})[o['seed']] = o
    names = sorted((n for n,o in by.items() if set(range(seeds))<=set(o)), key=lambda n: n!='logits')
    return load_json(Path(out)/'before.json'),{n: [by[n][i] for i in range(seeds)] for n in names}

def together(runs, split):
    "Scores of several seeds as one: the examples of all"
    ds = [r['sets'][split] for r in runs]
    return Scores.from_dict({k: None if ds[0][k] is None else [o for d in ds for o in d[k]] for k in ds[0]})

def table(before, res):
    seeds = len(next(iter(res.values())))
    lines = ['| run | tokens | CPU s | held-out KL | less than `logits` (95%) | out of distribution | less than `logits` (95%) |', '|---|---|---|---|---|---|---|']
    cell = lambda x, base: '' if x is base else '{diff:+.3f} ({low:+.3f} to {high:+.3f})'.format(**better(x, base))
    row = lambda n, runs, k, s: f"| {n} | {k} | {s} | " + ' | '.join(
        f"{together(runs, p).kl:.3f} | {'' if n=='logits' else cell(together(runs, p), together(res['logits'][:len(runs)], p))}" for p in ('heldout', 'ood')) + ' |'
    lines.append(row('before', [before]*seeds, 0, 0))
    for n,runs in res.items(): lines.append(row(n, runs, sum(r['tokens'] for r in runs)//len(runs), f"{sum(r['cpu_s'] for r in runs)/len(runs):.0f}"))
    return '\n'.join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(layers=15, refit=64, steps=30, seeds=3, train=160, judged=48).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--out', default='ablation')
    p.add_argument('--only', nargs='+', help='these runs')
    p.add_argument('--report', action='store_true', help='run nothing: the table of what is there')
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    Path(a.out).mkdir(exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr): before,res = found(a.out, a.seeds) if a.report else Ablation(a).all()
    what = (f'The embedded teacher, {a.layers} of its 30 layers by block influence, gaps refitted on {a.refit} answers, {a.steps} steps of 4 sequences (responses of at most {TOKENS} tokens), {a.seeds} seeds, '
        f'judged on {a.judged} held-out prompts and {a.judged} out of distribution. KL(teacher || student) at T=1, nats per target token; differences are positive where the run is better than `logits`.')
    text = '\n\n'.join(['## Ablation', what, f'Machine: {machine()}.', table(before, res)])
    print(text)
    if not (a.no_write or a.only): write(text)

if __name__=='__main__': main()
