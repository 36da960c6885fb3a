#!/usr/bin/env python3
"""What building a cache costs, beside the straightforward recipe and beside asking the teacher and keeping nothing.

usage: synth.py [--quick] [--prompts 64] [--tokens 64] [--dtype bf16] [--no-write]

The default teacher answers training prompts at temperature 0.8, five ways: the recipe (batches of 16 in prompt order, transformers' own sampling, then one
forward pass per batch with full logits and all hidden states, torch.save), transformers' `generate` in the batches of `build_cache` with nothing captured,
`build_cache`, `build_cache` with an extra layer, and `build_cache` with the relations of a block, which needs a second pass. Then it reads those responses, once through `build_cache`
and once in bare forward passes of the same batches. Two things more are measured, in shards of a quarter of the prompts: what share of the time shards are encoded and written, and the
teacher waits for that; and what a batch would cost whose finished rows are replaced by the next prompts, instead of one that closes up. Prints Markdown tables and then one line per
bar, `BAR name value limit ok|short`, writes both as the section "Synthesis" of RESULTS.md, and exits 1 if one is short. `--quick` takes 32 prompts and 24 tokens, and writes nothing.
Rates are of one thread, in CPU time (so a busy machine disturbs them less). What the recipe saves is removed batch by batch.
"""
import argparse, bisect, contextlib, sys, tempfile, time
from concurrent.futures import Future
from pathlib import Path

import torch
from cache import machine, said
from fastcore.basics import chunked
from loss import write

import distill_nb.cache as dc
from distill_nb.cache import build_cache
from distill_nb.shards import read_rows
from distill_nb.synthesis import TeacherSynthesizer, by_tokens, embedded_teacher, load_prompts, pad, trim

SHARD = 64
DTYPES = dict(bf16=torch.bfloat16, fp32=torch.float32)

def clock(f):
    "What `f` gives, and CPU seconds"
    start = time.process_time()
    res = f()
    return res,time.process_time()-start

@torch.no_grad()
def sampled(teacher, prompts, n, size):
    "transformers' own sampling in batches of `size`: yields what was asked, its mask, what came back, and the responses"
    fill = teacher.tokenizer.pad_token_id
    for qs in chunked(prompts, size):
        x,mask = pad(teacher.encode(qs), fill, left=True)
        y = teacher.model.generate(input_ids=x, attention_mask=mask, max_new_tokens=n, do_sample=True, temperature=.8, top_k=0, pad_token_id=fill)
        yield mask,y,[trim(o, set(teacher.ends)) for o in y[:,x.shape[1]:].tolist()]

def bare(teacher, prompts, n):
    "`generate` in the batches of `build_cache`, and nothing else; returns the number of response tokens"
    long = lambda q: len(teacher.encode([q])[0])
    return sum(len(r) for qs in chunked(prompts, SHARD) for *_,rs in sampled(teacher, sorted(qs, key=long), n, SHARD) for r in rs)

@torch.no_grad()
def recipe(teacher, prompts, n, folder):
    "The straightforward way; returns the number of response tokens"
    tokens = 0
    for i,(mask,y,rs) in enumerate(sampled(teacher, prompts, n, 16)):
        mask = torch.cat([mask, pad([[1]*len(r) for r in rs])[0]], 1)
        out = teacher.model(input_ids=y, attention_mask=mask, output_hidden_states=True, use_cache=False)
        torch.save(dict(ids=y, mask=mask, logits=out.logits, hidden=out.hidden_states), folder/f'{i}.pt')
        (folder/f'{i}.pt').unlink()
        tokens += sum(map(len, rs))
    return tokens

@torch.no_grad()
def forward(teacher, exs, head):
    "Forward passes in the batches of `build_cache`, with the output head or without"
    for part in chunked(exs, SHARD):
        for idx in by_tokens([len(e['input_ids']) for e in part], 2048):
            x,mask = pad([part[i]['input_ids'] for i in idx])
            if head: teacher.model(input_ids=x, attention_mask=mask, use_cache=False)
            else: teacher.score(x, mask)

@contextlib.contextmanager
def timed(places):
    "Wall-clock seconds inside some functions, each an owner and a name, in a list"
    spent,old = [0.]*len(places),[getattr(*p) for p in places]
    def _wrap(i):
        def _f(*args, **kw):
            start = time.perf_counter()
            try: return old[i](*args, **kw)
            finally: spent[i] += time.perf_counter()-start
        return _f
    for i,p in enumerate(places): setattr(*p, _wrap(i))
    try: yield spent
    finally:
        for p,f in zip(places, old): setattr(*p, f)

def waiting(build):
    "Shares of the wall-clock time of `build`: encoding a shard; hashing, writing and flushing it; waiting for that"
    start = time.perf_counter()
    with timed(((dc, '_pack'), (dc, 'save_tensors'), (Future, 'result'))) as spent: build()
    return [o/(time.perf_counter()-start) for o in spent]

def step_seconds(teacher, counts, n=12):
    "CPU seconds of a step of decoding, by the number of rows"
    conf,ids = teacher.model.generation_config,teacher.encode(['Tell me a long story about the sea.'])[0]
    old,conf.suppress_tokens = conf.suppress_tokens,teacher.ends
    run = lambda b, k: min(clock(lambda: teacher.generate([ids]*b, k, batch_size=b, progress=False))[1] for _ in range(3))
    try: return {b: (run(b, n+1)-run(b, 1))/n for b in counts}
    finally: conf.suppress_tokens = old

def between(known):
    "The straight lines between known values, as a function"
    xs = sorted(known)
    def _f(x):
        i = min(max(bisect.bisect_left(xs, x), 1), len(xs)-1)
        a,b = xs[i-1],xs[i]
        return known[a]+(known[b]-known[a])*(x-a)/(b-a)
    return _f

def closing(lens, slots, cost): return sum(cost(sum(o>i for o in part)) for part in chunked(lens, slots) for i in range(max(part)))

def refilled(lens, slots, cost):
    "The same responses, where a finished one is followed by the next at once; reading that prompt is not counted"
    left,rest,total = list(lens[:slots]),list(lens[slots:]),0
    while left:
        total += cost(len(left))
        left = [o-1 for o in left if o>1]
        new = slots-len(left)
        left,rest = left+rest[:new],rest[new:]
    return total

def measure(teacher, prompts, n, root):
    "Response tokens and CPU seconds of each way, the shares of waiting, and the number of tokens of each response"
    build = lambda name, rows=prompts, **k: build_cache(teacher, rows, root/name, max_new_tokens=n, progress=False, **dict(shard_size=SHARD) | k)
    count = lambda exs: sum(len(e['input_ids'])-e['prompt_len'] for e in exs)
    torch.manual_seed(0)
    clock(lambda: bare(teacher, prompts[:4], 4))
    res = {k: clock(f) for k,f in {'the recipe': lambda: recipe(teacher, prompts, n, root), 'generate, nothing captured': lambda: bare(teacher, prompts, n)}.items()}
    cache,sec = clock(lambda: build('rides'))
    res['build_cache'] = cache.stats()['response_tokens'],sec
    more,sec = clock(lambda: build('layer', layers=(15,)))
    res['build_cache, one layer more'] = more.stats()['response_tokens'],sec
    twice,sec = clock(lambda: build('twice', relations=15))
    res['build_cache, relations of a block'] = twice.stats()['response_tokens'],sec
    exs = [dict(input_ids=cache[i]['input_ids'].tolist(), prompt_len=cache[i]['prompt_len']) for i in range(len(cache))]
    assert all(more[i]['input_ids'].tolist()==e['input_ids'] for i,e in enumerate(exs))
    say = lambda e: teacher.tokenizer.decode(e['input_ids'][e['prompt_len']:], skip_special_tokens=True)
    rows = [dict(prompt=q, response=say(e), ended=e['input_ids'][-1] in teacher.ends) for q,e in zip(prompts, exs)]
    rows = [r for r in rows if r['response'].strip()]
    read = read_rows(teacher, rows)
    for name,head in (('forward passes', True), ('forward passes without the head', False)): res[name] = count(read),clock(lambda: forward(teacher, read, head))[1]
    cache,sec = clock(lambda: build('read', rows))
    res['build_cache, given responses'] = cache.stats()['response_tokens'],sec
    stores = {'hidden, bf16': {}, 'transform': dict(codec='transform'), 'sampled': dict(codec='sampled')}
    waits = {k: waiting(lambda: build(f'wait {k}', rows, shard_size=len(rows)//4, **o)) for k,o in stores.items()}
    return res,waits,[len(e['input_ids'])-e['prompt_len'] for e in exs]

def bars(res):
    "Name, value, limit, and whether it holds"
    rate = {k: n/s for k,(n,s) in res.items()}
    yield 'build_cache over the recipe', rate['build_cache']/rate['the recipe'], 2.5, '>='
    yield 'build_cache over bare generate', rate['build_cache']/rate['generate, nothing captured'], .85, '>='
    yield 'one layer more over bare generate', rate['build_cache, one layer more']/rate['generate, nothing captured'], .85, '>='
    yield 'second pass over bare generate', rate['build_cache, relations of a block']/rate['generate, nothing captured'], .65, '>='
    yield 'given responses over bare forward', res['build_cache, given responses'][1]/res['forward passes'][1], 1.05

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(prompts=64, tokens=64).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--dtype', choices=DTYPES, default='bf16')
    p.add_argument('--quick', action='store_true', help='32 prompts and 24 tokens, printed only')
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    if a.quick: a.prompts,a.tokens,a.no_write = 32,24,True
    torch.set_num_threads(1)
    teacher = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=DTYPES[a.dtype])
    with tempfile.TemporaryDirectory() as d: res,waits,lens = measure(teacher, load_prompts('train', a.prompts)['prompt'], a.tokens, Path(d))
    step = step_seconds(teacher, [1, 2, 4, 8, 16, 32, 64])
    lines = ['| way | response tokens | CPU s | tokens/s |', '|---|---|---|---|'] + [f'| {k} | {n:,} | {s:.1f} | {n/s:.0f} |' for k,(n,s) in res.items()]
    waited = ['| store | encoding | hashing, writing, flushing | waiting for that |', '|---|---|---|---|'] + [f'| {k} | '+' | '.join(f'{o:.2%}' for o in v)+' |' for k,v in waits.items()]
    refills = ['| rows | batches that close up | places refilled |', '|---|---|---|'] + [f'| {b} | {closing(lens, b, between(step)):.1f} | {refilled(lens, b, between(step)):.1f} |' for b in (16, 32, 64)]
    steps = ', '.join(f'{s*1e3:.0f} ms for {b}' for b,s in step.items())
    fine,bar = said([*bars(res), *((f'waiting for {k}', w, .02) for k,(*_,w) in waits.items())])
    text = '\n\n'.join(['## Synthesis', f'{a.prompts} prompts, at most {a.tokens} tokens each, {a.dtype}. Machine: {machine()}.', '\n'.join(lines),
        'Where the teacher reads given responses, a shard is written by a thread while the next is asked for; only for the last does the teacher have to wait. Shares of wall-clock time:', '\n'.join(waited),
        f'A step of decoding takes {steps} rows. From that, CPU seconds of decoding these {len(lens)} responses of {min(lens)} to {max(lens)} tokens:', '\n'.join(refills), bar])
    print(text)
    if not a.no_write: write(text)
    return 0 if fine else 1

if __name__=='__main__': sys.exit(main())
