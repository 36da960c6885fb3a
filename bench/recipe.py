#!/usr/bin/env python3
"""What a setting of the demo is worth: its student after a few steps, with a key of the YAML file changed.

usage: recipe.py [--demo demo] [--steps 100] [KEY=VALUE ...]    such as training.optimizer.lr=2e-4 training.schedule.decay=cosine

Needs the folder of a finished demo (`make demo`), whose cache and start it takes; what changes either is not measured here. Trains the student with the settings of
`demo` and once more with each KEY=VALUE in their place, one after the other, by the same batches, and prints the KL to the teacher on the demo's held-out prompts.
"""
import argparse, sys, tempfile
from pathlib import Path

import yaml

from distill_nb.cache import TeacherCache
from distill_nb.config import Config, Loader, preset
from distill_nb.recipes import Run

def changed(steps, *settings):
    "The demo's configuration, shorter and with other values"
    o = preset('demo').model_dump(exclude_unset=True)
    for key,_,value in (s.partition('=') for s in (*settings, f'training.schedule.max_steps={steps}')):
        *path,last = key.split('.')
        at = o
        for k in path: at = at.setdefault(k, {})
        at[last] = yaml.load(value, Loader)
    return Config.from_dict(dict(distillation=o))

def held_out(config, demo, out):
    "KL on held-out prompts after training, in nats per token"
    config.out = out
    r = Run(config, progress=False)
    r.cache = r.judged = TeacherCache(demo/'cache')
    r.start = lambda: demo/'start'
    student = r.learner()
    r.trainer(r.distiller(student, 0), r.stage(0)).fit()
    return r.evaluate(student, r.judged.select(split='heldout')).kl

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--demo', type=Path, default=Path('demo'))
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('settings', nargs='*', metavar='KEY=VALUE')
    a = p.parse_args()
    for s in [(), *((o,) for o in a.settings)]:
        with tempfile.TemporaryDirectory() as out: print(f"{''.join(s) or 'demo':40} {held_out(changed(a.steps, *s), a.demo, out):.3f}", flush=True)

if __name__=='__main__': sys.exit(main())
