#!/usr/bin/env python3
"""Is the memory that `distill plan` states the memory that training takes? On the demo's pair, on the CPU.

usage: plan.py [--demo demo] [--steps 2]

Needs the folder of a finished demo (`make demo`). Trains its student on the four longest examples and compares the growth of the process
(VmHWM less what was resident before the student was loaded) with the sum of the plan. Linux only. Ends with a line
`BAR name value limit ok|short`, and exits 1 where the estimate is more than 20% off.
"""
import argparse, re, sys, tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from distill_nb.cache import TeacherCache
from distill_nb.plan import student_memory
from distill_nb.recipes import preset
from distill_nb.student import freeze_below
from distill_nb.trainer import Distiller, DistillTrainer, Stage

def resident(key):
    "Resident memory of this process, GB"
    return int(re.search(rf'^{key}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.M)[1])*1024/1e9

def train(demo, steps, out):
    "Train on the longest examples; the tokens of the longest, and the growth of the process in GB"
    config,cache = preset('demo'),TeacherCache(demo/'cache')
    lens,before = cache.lengths(),resident('VmRSS')
    idx = sorted(cache.select(split='train'), key=lambda i: -lens[i])[:config.training.memory.batch_size]
    student = freeze_below(AutoModelForCausalLM.from_pretrained(demo/'start', dtype=torch.float32), config.student.freeze_below)
    stage = Stage('bench', steps, config.training.optimizer.lr)
    DistillTrainer(Distiller(student, cache, stage.loss()), cache, [stage], out, idx, len(idx), progress=False, device='cpu').fit()
    return lens[idx[0]],resident('VmHWM')-before

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--demo', type=Path, default=Path('demo'))
    p.add_argument('--steps', type=int, default=2)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as out: length,got = train(a.demo, a.steps, out)
    parts = student_memory(preset('demo'), length, bf16=False)
    want = sum(parts.values())/1e9
    for k,v in parts.items(): print(f'{k:26} {v/1e9:6.2f} GB')
    print(f"{'planned':26} {want:6.2f} GB\n{'measured':26} {got:6.2f} GB, sequences of {length} tokens")
    off = abs(want/got-1)
    print(f"BAR plan_memory_error {off:.2f} 0.20 {'ok' if off<=.2 else 'short'}")
    return int(off>.2)

if __name__=='__main__': sys.exit(main())
