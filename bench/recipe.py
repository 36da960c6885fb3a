#!/usr/bin/env python3
"""What a setting of the demo is worth: its student after a few steps, with a key of the YAML file changed.

usage: recipe.py [--demo demo] [--steps 100] [KEY=VALUE ...]    such as training.optimizer.lr=2e-4 training.schedule.decay=cosine

Needs the folder of a finished demo (`make demo`), whose caches it takes; what changes the cache is not measured here. Makes and trains the student with the
demo's settings, and once more for each KEY=VALUE, which replaces that one, by the same batches, and prints the KL to the teacher on held-out prompts before and after.
"""
import argparse, sys, tempfile
from pathlib import Path

import yaml

from distill_nb.cache import TeacherCache
from distill_nb.config import Config, Loader, preset
from distill_nb.pipeline import Run

def changed(steps, *settings):
    "The demo's configuration, shorter and with other values"
    o = preset('demo').model_dump(exclude_unset=True)
    if (odd := [s for s in settings if s.startswith(('teacher.', 'prompts.'))]): raise SystemExit(f'{odd[0]}: the cache is the same for all runs')
    for key,_,value in (s.partition('=') for s in (f'training.schedule.max_steps={steps}', 'training.control_steps=0', *settings)):
        *path,last = key.split('.')
        at = o
        for k in path: at = at.setdefault(k, {})
        at[last] = yaml.load(value, Loader)
    return Config.from_dict(dict(distillation=o))

def held_out(config, cache, judged, out):
    "KL on held-out prompts before and after training, in nats per token"
    config.out = out
    r = Run(config, progress=False)
    r.cache,r.judged = cache,judged
    student,idx = r.learner(),judged.select(split='heldout')
    r.free()
    start = r.evaluate(student, idx).kl
    r.learn(student)
    return start,r.evaluate(student, idx).kl

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--demo', type=Path, default=Path('demo'))
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('settings', nargs='*', metavar='KEY=VALUE')
    a = p.parse_args()
    cache,judged = (TeacherCache(a.demo/o) for o in ('cache', 'cache/judged'))
    for s in [(), *((o,) for o in a.settings)]:
        with tempfile.TemporaryDirectory() as out: start,end = held_out(changed(a.steps, *s), cache, judged, out)
        print(f"{''.join(s) or 'demo':40} {start:.3f} {end:.3f}", flush=True)

if __name__=='__main__': sys.exit(main())
