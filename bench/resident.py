#!/usr/bin/env python3
"""How much memory a process takes that reads a whole cache, small and large.

usage: resident.py [--mib 10240] [--no-write]

A cache of a tiny teacher is blown up: shards of 32 MiB, which are links to a few files, so that no disk is filled. A process of its own reads every example of
a tenth of them, and another of all, in shuffled order, and says the most memory it took beyond that of opening the cache, mapped pages included. Linux only.
Prints a Markdown table and then one line per bar, `BAR name value limit ok|short`, writes both as the section "Resident" of RESULTS.md, and exits 1 if one is short.
"""
import argparse, os, random, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from cache import machine, said
from loss import write
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill_nb.cache import TeacherCache, build_cache, shard_path
from distill_nb.files import load_json, save_json, save_tensors, sha256_json
from distill_nb.synthesis import TeacherSynthesizer

D,MIB = 64,32

def tiny():
    "A teacher that has said nothing yet"
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'<end>': 0, 'a': 1}, '<end>')), eos_token='<end>', pad_token='<end>')
    shape = dict(vocab_size=2, hidden_size=D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64)
    return TeacherSynthesizer(LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=0, pad_token_id=0, bos_token_id=None)), tokenizer=tok, device='cpu')

def blow_up(path, mib):
    "A cache of `mib` MiB at `path`"
    build_cache(tiny(), ['a', 'a'], path, max_new_tokens=2, shard_size=2, progress=False)
    m,rows,n = load_json(path/'manifest.json'),[dict(prompt='a')]*64,MIB*2**20//(64*(2*D+4))
    data = dict(input_ids=torch.zeros(64*(n+1), dtype=torch.int32), lens=torch.full((64,), n+1, dtype=torch.int32),
        prompt_lens=torch.ones(64, dtype=torch.int32), hidden=torch.zeros(64*n, D, dtype=torch.bfloat16))
    save_tensors(data, shard_path(path, 0), dict(rows=rows))
    side = load_json(shard_path(path, 0).with_suffix('.json'))
    for i in range(1, max(2, mib//MIB)):
        os.link(shard_path(path, 0), shard_path(path, i))
        save_json(side | dict(file=shard_path(path, i).name), shard_path(path, i).with_suffix('.json'))
    save_json(m | dict(shards=[dict(n=64, prompts=sha256_json(rows))]*max(2, mib//MIB)), path/'manifest.json')

def resident(key): return int(next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(key)).split()[1])/1024

def read(path):
    "Read every example, shuffled in groups of neighbouring shards; print MiB and tokens a second"
    c,tokens,start = TeacherCache(path),0,time.process_time()
    Path('/proc/self/clear_refs').write_text('5')
    before,order = resident('VmRSS'),list(range(len(c)))
    random.Random(0).shuffle(order)
    for i in sorted(order, key=lambda i: i//(64*64)): tokens += len(c[i]['hidden'])
    print(resident('VmHWM')-before, tokens/(time.process_time()-start))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--mib', type=int, default=10240)
    p.add_argument('--no-write', action='store_true', help='print only')
    p.add_argument('--read', type=Path, help='read the cache in this folder, and nothing else')
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.read: return read(a.read)
    res = {}
    for mib in (a.mib//10, a.mib):
        with tempfile.TemporaryDirectory() as d:
            blow_up(Path(d)/'c', mib)
            res[mib] = [float(o) for o in subprocess.run([sys.executable, __file__, '--read', f'{d}/c'], capture_output=True, text=True, check=True).stdout.split()]
    (small,_),(large,_) = res.values()
    fine,bar = said([('resident memory MiB', large, small+96)])
    rows = ['| cache, MiB | most memory, MiB | tokens/s |', '|---|---|---|', *(f'| {k:,} | {m:.0f} | {r:,.0f} |' for k,(m,r) in res.items())]
    what = 'A process reads every example of a cache of a tiny teacher (64 numbers a token), in shuffled order; memory is the most it takes beyond that of opening the cache, mapped pages included.'
    text = '\n\n'.join(['## Resident', what, f'Machine: {machine()}.', '\n'.join(rows), bar])
    print(text)
    if not a.no_write: write(text)
    return 0 if fine else 1

if __name__=='__main__': sys.exit(main())
